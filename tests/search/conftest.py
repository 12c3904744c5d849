"""A small folder of videos, a tiny model, and their index, which tests only read."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from search.search_runs import SETTINGS, render_folder, save_model

import tempme_vl.search
from tempme_vl.search import Embedder, SearchIndex


@pytest.fixture(scope="session")
def videos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return render_folder(tmp_path_factory.mktemp("search") / "videos")


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("search") / "model")


@pytest.fixture(scope="session")
def embedder(model: Path) -> Embedder:
    return Embedder.from_pretrained(model, "cpu")


@pytest.fixture(scope="session")
def made(videos: Path, embedder: Embedder, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("search") / "index"
    tempme_vl.search.build(videos, folder, embedder, **SETTINGS)
    return folder


@pytest.fixture
def index(made: Path, embedder: Embedder) -> SearchIndex:
    return tempme_vl.search.open(made, embedder)


@pytest.fixture
def copied(videos: Path, made: Path, tmp_path: Path) -> Callable[[], tuple[Path, Path]]:
    """Copies of the videos and of their index, which a test may change."""

    def copy() -> tuple[Path, Path]:
        here, index = tmp_path / "videos", tmp_path / "index"
        shutil.copytree(videos, here)  # with their times
        shutil.copytree(made, index)
        tempme_vl.search.store.Store(index).move(str(here.resolve()))
        return here, index

    return copy
