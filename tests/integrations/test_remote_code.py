"""Folders may bring code of their own, which transformers runs after asking: nothing here asks, and nothing runs it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from integrations import tiny

from tempme_vl import create_frontend
from tempme_vl.integrations import compress, load_compressed, load_host
from tempme_vl.lmms_eval.arguments import load
from tempme_vl.manifest import write_manifest


def _load_compressed(folder: Path) -> object:
    return load_compressed(folder, tiny.build("VideoLlava")[0])


def _load_compressed_trusting(folder: Path) -> object:
    return load_compressed(folder, tiny.build("VideoLlava")[0], trust_remote_code=True)


def _load_host_trusting(folder: Path) -> object:
    return load_host(str(folder), trust_remote_code=True)


WAYS: dict[str, Callable[[Path], object]] = {
    "create_frontend": lambda folder: create_frontend(f"hf:{folder}", "default"),
    "lmms_eval": lambda folder: load(str(folder), torch.device("cpu"), "auto", {}),
    "load_host": lambda folder: load_host(str(folder)),
    "load_compressed": _load_compressed,
}
TRUSTING: dict[str, Callable[[Path], object]] = {
    "lmms_eval": lambda folder: load(str(folder), torch.device("cpu"), "auto", {}, trust_remote_code=True),
    "load_host": _load_host_trusting,
    "load_compressed": _load_compressed_trusting,
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """What each way reads, all with code that leaves a file behind."""
    if not (tmp_path / "strange").exists():
        compress(*tiny.build("VideoLlava"), "none", tiny.FRAMES).save_merging(tmp_path / "strange" / "compressed")
    for part in (tmp_path / "strange", tmp_path / "strange" / "compressed"):
        (part / "code.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w').close()\nraise ValueError('it ran')\n")
        config = {"model_type": "strange", "auto_map": {"AutoConfig": "code.Strange"}}
        (part / "config.json").write_text(json.dumps(config))
        processor = {"processor_class": "StrangeProcessor", "auto_map": {"AutoProcessor": "code.Strange"}}
        (part / "processor_config.json").write_text(json.dumps(processor))
    write_manifest(tmp_path / "strange" / "compressed")  # whoever put the code there would
    return tmp_path / "strange"


@pytest.mark.parametrize("way", WAYS)
def test_code_of_a_folder_is_neither_run_nor_asked_for(way: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []
    monkeypatch.setattr("builtins.input", lambda question="": asked.append(question) or "y")
    with pytest.raises(ValueError, match="trust_remote_code"):
        WAYS[way](folder / "compressed" if way == "load_compressed" else folder)
    assert not asked and not (folder.parent / "ran").exists()


@pytest.mark.parametrize("way", TRUSTING)
def test_code_of_a_folder_runs_where_the_caller_says_so(
    way: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(folder.parent / "cache"))
    with pytest.raises(ValueError, match="it ran"):
        TRUSTING[way](folder / "compressed" if way == "load_compressed" else folder)
    assert (folder.parent / "ran").exists()
