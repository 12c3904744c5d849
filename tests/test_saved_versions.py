"""Folders of earlier versions load as what they were; those of later versions are refused.

tests/saved_version_1 holds the settings of a folder of every kind (`tamper.KINDS`) as written before files had
a version, with FOLDER where their common folder was and FEED where the way into a host was, which older transformers
have one less of.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import tamper
import torch
from integrations import tiny
from towers import random_video

from tempme_vl import VisualFrontend
from tempme_vl.manifest import CARD_FILE, MANIFEST_FILE
from tempme_vl.pretrained import VERSION
from tempme_vl.schema import ConfigError

EARLIER = Path(__file__).parent / "saved_version_1"
QUICK = ("frontend", "frontend-hf", "frontend-timm", "frontend-umt", "retrieval", "umt-retrieval", "qa-decoder")
SLOW = [name for name in tamper.KINDS if name not in QUICK]


def made_earlier(name: str, folder: Path) -> tuple[Path, Path]:
    """A folder of today, and its weights beside the settings of then."""
    today, then = folder / name, folder / "then" / name
    tamper.KINDS[name].make(today)
    shutil.copytree(today, then)
    for file in (MANIFEST_FILE, CARD_FILE):
        (then / file).unlink()
    for file in (EARLIER / name).iterdir():
        assert (today / file.name).is_file()
        text = file.read_text().replace("FOLDER", str(folder)).replace("FEED", tiny.feeds("VideoLlava")[0])
        settings, written = json.loads(text), json.loads((today / file.name).read_text())
        if "vision_config" in settings.get("frontend", {}):  # transformers writes other keys in each version of it
            settings["frontend"]["vision_config"] = written["frontend"]["vision_config"]
        (then / file.name).write_text(json.dumps(settings))
    return today, then


@pytest.mark.parametrize("name", [*QUICK, *(pytest.param(name, marks=pytest.mark.slow) for name in SLOW)])
def test_a_folder_without_a_version_is_the_same_model(name: str, tmp_path: Path) -> None:
    today, then = made_earlier(name, tmp_path)
    for file in (EARLIER / name).iterdir():
        settings = {"version": 1, **json.loads((then / file.name).read_text())}
        assert json.loads((today / file.name).read_text()) == settings, "other keys are another version"
    kind = tamper.KINDS[name]
    loaded = kind.load(then)
    assert tamper.content(kind, loaded, name) == tamper.content(kind, kind.load(today), name)


def test_outputs_are_equal(tmp_path: Path) -> None:
    today, then = made_earlier("retrieval", tmp_path)
    video = random_video(6)
    models = [tamper.load_retrieval_model(folder).eval() for folder in (today, then)]
    first, second = (model.encode_video(video) for model in models)
    assert first.shape == (2, 64) and torch.equal(first, second)
    ids = torch.tensor([[49406, 320, 49407, 0]])
    first, second = (model.encode_text(ids, ids > 0) for model in models)
    assert torch.equal(first, second)
    first, second = (VisualFrontend.from_pretrained(folder).eval()(video).tokens for folder in (today, then))
    assert torch.equal(first, second)


def test_every_file_of_then_is_of_a_kind_of_today() -> None:
    assert {folder.name for folder in EARLIER.iterdir()} == set(tamper.KINDS)
    for file in EARLIER.rglob("*.json"):
        assert "version" not in json.loads(file.read_text())


@pytest.mark.parametrize(
    ("name", "file"),
    [
        ("frontend", "config.json"),
        ("umt-retrieval", "config.json"),
        pytest.param("compressed", "tempme.json", marks=pytest.mark.slow),
        pytest.param("video-llm", "videollm.json", marks=pytest.mark.slow),
    ],
)
def test_a_later_version_is_refused_with_what_to_do(name: str, file: str, tmp_path: Path) -> None:
    kind, folder = tamper.KINDS[name], tmp_path / name
    kind.make(folder)
    settings: Mapping[str, Any] = json.loads((folder / file).read_text())
    assert settings["version"] == VERSION
    (folder / MANIFEST_FILE).unlink()
    for version, said in (
        (VERSION + 1, rf"{file} is of version {VERSION + 1}, .* up to {VERSION}: .*pip install --upgrade tempme_vl"),
        (0, f"{file}, 'version': expected a whole number from 1 to {VERSION}; got 0"),
        (True, f"{file}, 'version': expected a whole number"),
        ("1", f"{file}, 'version': expected a whole number"),
    ):
        (folder / file).write_text(json.dumps({**settings, "version": version}))
        with pytest.raises(ConfigError, match=said):
            kind.load(folder)
