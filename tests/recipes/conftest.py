"""Makes the recipes importable, which are scripts outside the package; the data that they are tested on."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "recipes"))


@pytest.fixture(scope="package")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """See `make_data`."""
    from recipes.runs import make_data

    return make_data(tmp_path_factory.mktemp("recipes"))
