"""What a command leaves behind."""

from __future__ import annotations

import json
import logging
import sys
from datetime import datetime, timedelta, timezone
from functools import partial
from pathlib import Path

import pytest
import torch

from tempme_vl.reports import finish, provenance, write_json, write_whole


def test_provenance_names_versions_date_and_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["eval/retrieval.py", "--data-root", "my data"])
    made = provenance()
    assert set(made) == {"versions", "date", "command"}
    assert set(made["versions"]) == {"tempme_vl", "torch", "transformers", "open_clip", "python"}
    assert torch.__version__.startswith(made["versions"]["torch"])
    assert sys.version.startswith(made["versions"]["python"])
    assert made["command"] == "eval/retrieval.py --data-root 'my data'"
    date = datetime.fromisoformat(made["date"])
    assert date.utcoffset() == timedelta(0) and abs(datetime.now(timezone.utc) - date) < timedelta(minutes=1)


def test_a_result_is_shown_and_logged_before_its_file_is_written(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").write_text("")
    for bad, cause in ((tmp_path / "file" / "report.json", "exists|Not a directory"), (tmp_path, "directory")):
        with caplog.at_level(logging.INFO, "tempme_vl"), pytest.raises(ValueError, match=cause) as caught:
            finish("the table", {"accuracy": 1}, bad)
        assert str(bad) in str(caught.value) and capsys.readouterr().out == "the table\n"
        assert caplog.messages.pop() == "the table"
    assert [entry.name for entry in tmp_path.iterdir()] == ["file"], "nothing half written"
    with pytest.raises(ValueError, match="could not be written"):
        finish("the table", {}, tmp_path, partial(write_whole, tmp_path / "embeddings", b"kept"))
    assert (tmp_path / "embeddings").read_bytes() == b"kept"


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="Linux has a disk that is always full")
def test_a_full_disk_is_named_and_a_device_is_not_replaced(tmp_path: Path) -> None:
    link = tmp_path / "report.json"
    link.symlink_to("/dev/full")
    with pytest.raises(ValueError, match=r"report\.json could not be written: No space left on device"):
        write_json(link, {"a": 1})
    assert link.is_symlink() and Path("/dev/full").is_char_device()


def test_a_file_is_replaced_whole(tmp_path: Path) -> None:
    file = tmp_path / "new" / "folder" / "report.json"
    finish("", {"accuracy": 50.0, "name": "é"}, file)
    written = json.loads(file.read_text())
    assert written.pop("accuracy") == 50.0 and written.pop("name") == "é" and set(written) == set(provenance())
    other = tmp_path / "link.json"
    other.symlink_to(file)
    write_json(other, [1])
    assert other.is_symlink() and file.read_text() == "[\n  1\n]\n"
    with pytest.raises(TypeError):
        write_json(file, {"a": object()})
    assert file.read_text() == "[\n  1\n]\n" and len(list(file.parent.iterdir())) == 1
