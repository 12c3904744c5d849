"""Manifests: what was changed, cut, lost or added since a folder was saved is said, and how to go on."""

from __future__ import annotations

import json
import logging
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from towers import tempme_schedule, tiny_frontend

from tempme_vl import VisualFrontend, manifest
from tempme_vl.manifest import MANIFEST_FILE, FolderError, check_manifest, write_manifest


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "tokenizer").mkdir()
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "model.safetensors").write_bytes(bytes(range(200)))
    (tmp_path / "tokenizer" / "tokenizer.json").write_text("[]")
    write_manifest(tmp_path)
    return tmp_path


def change(path: Path, place: int) -> None:
    data = bytearray(path.read_bytes())
    data[place] ^= 1
    path.write_bytes(data)


def test_a_folder_as_it_was_saved_passes(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    check_manifest(folder)
    assert set(json.loads((folder / MANIFEST_FILE).read_text())["files"]) == {
        *("config.json", "model.safetensors", "tokenizer/tokenizer.json")
    }
    # what nobody reads is nobody's
    for name in ("notes.txt", "results.json", "README.md", ".hidden", "tokenizer/README.md"):
        (folder / name).write_text("x")
    check_manifest(folder)
    assert not caplog.records


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda f: change(f / "model.safetensors", 150), "model.safetensors has other content"),
        (lambda f: (f / "config.json").write_text("{"), "config.json has 1 bytes instead of 2"),
        (lambda f: (f / "tokenizer/tokenizer.json").unlink(), "tokenizer/tokenizer.json is missing"),
        (lambda f: (f / "model.safetensors.index.json").write_text("{}"), "model.safetensors.index.json would be read"),
        (lambda f: (f / "tokenizer/added_tokens.json").write_text("{}"), "tokenizer/added_tokens.json would be read"),
        (lambda f: (f / MANIFEST_FILE).write_text("{"), f"{MANIFEST_FILE}.*damaged"),
        (lambda f: (f / MANIFEST_FILE).write_text('{"files": {}, "format": 2}'), f"{MANIFEST_FILE}, 'format'"),
        (lambda f: (f / MANIFEST_FILE).write_text('{"files": {}}'), "config.json, model.safetensors.* would be read"),
        (
            lambda f: (f / MANIFEST_FILE).write_text('{"files": {"../x": {"size": 1, "sha256": ""}}}'),
            "would be read|expected files of this folder",
        ),
    ],
)
def test_damage_is_named_with_what_to_do(folder: Path, damage: Callable[[Path], object], said: str) -> None:
    damage(folder)
    with pytest.raises(FolderError, match=said) as caught:
        check_manifest(folder)
    assert str(folder) in str(caught.value) and "python -m tempme_vl.manifest" in str(caught.value)


def test_a_manifest_names_no_file_outside(folder: Path) -> None:
    for name in ("../config.json", "/etc/hostname"):
        (folder / MANIFEST_FILE).write_text(json.dumps({"files": {name: {"size": 1, "sha256": ""}}}))
        with pytest.raises(FolderError, match="expected files of this folder"):
            check_manifest(folder, only=("x",))


def test_a_folder_changed_on_purpose(folder: Path) -> None:
    change(folder / "model.safetensors", 3)
    with pytest.raises(FolderError):
        check_manifest(folder)
    done = subprocess.run([sys.executable, "-m", "tempme_vl.manifest", folder], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    check_manifest(folder)
    done = subprocess.run([sys.executable, "-m", "tempme_vl.manifest", folder / "no"], capture_output=True, text=True)
    assert done.returncode == 1 and "usage" in done.stderr


def test_large_files_of_checkpoints_count_by_samples(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(manifest, "SAMPLED", 1000)
    monkeypatch.setattr(manifest, "_BLOCK", 4)
    data = bytes(1001)
    (tmp_path / "optimizer.pt").write_bytes(data)
    (tmp_path / "small.pt").write_bytes(data[:999])
    write_manifest(tmp_path, everything=True)
    files = json.loads((tmp_path / MANIFEST_FILE).read_text())["files"]
    assert {name: entry["sampled"] for name, entry in files.items()} == {"optimizer.pt": True, "small.pt": False}
    check_manifest(tmp_path)
    for place in (0, 3, 997, 1000):  # the first and the last block
        change(tmp_path / "optimizer.pt", place)
        with pytest.raises(FolderError, match=r"optimizer\.pt has other content"):
            check_manifest(tmp_path)
        change(tmp_path / "optimizer.pt", place)
    for start in range(0, 1001, 40):  # a torn part is found wherever it is
        (tmp_path / "optimizer.pt").write_bytes(data[:start] + b"\1" * 20 + data[start + 20 :])
        if start + 20 <= 1001:
            with pytest.raises(FolderError, match=r"optimizer\.pt has other content"):
                check_manifest(tmp_path)
    (tmp_path / "optimizer.pt").write_bytes(data[:-1])
    with pytest.raises(FolderError, match=r"optimizer\.pt has 1000 bytes instead of 1001"):
        check_manifest(tmp_path)


def test_folders_of_older_versions_are_read_and_that_is_logged(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    saved = tiny_frontend(tempme_schedule())
    saved.save_pretrained(tmp_path)
    (tmp_path / MANIFEST_FILE).unlink()
    with caplog.at_level(logging.WARNING):
        loaded = VisualFrontend.from_pretrained(tmp_path)
    assert [record.getMessage() for record in caplog.records] == [
        f"{tmp_path} has no {MANIFEST_FILE}: its files are read as they are, unchecked"
    ]
    assert all(torch.equal(value, saved.state_dict()[key]) for key, value in loaded.state_dict().items())


def test_saving_again_in_place_writes_the_manifest_anew(tmp_path: Path) -> None:
    for value in (1.0, 2.0):
        model = tiny_frontend(tempme_schedule())
        torch.nn.init.constant_(model.norm.weight, value)
        model.save_pretrained(tmp_path)
        assert (VisualFrontend.from_pretrained(tmp_path).norm.weight == value).all()
