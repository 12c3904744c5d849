"""The data that the recipes are tested on."""

from pathlib import Path

import pytest


@pytest.fixture(scope="package")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """See `make_data`."""
    from recipes.runs import make_data

    return make_data(tmp_path_factory.mktemp("recipes"))
