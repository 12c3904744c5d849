"""The scripts that time training steps and the loader, at tiny sizes."""

from __future__ import annotations

import json
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
from data.video_files import write_video

EVAL = Path(__file__).parents[2] / "eval"


def test_the_loader_is_timed_decoding_and_from_both_caches(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    script, report = EVAL / "loader_speed.py", tmp_path / "rows.json"
    (tmp_path / "videos").mkdir()
    for name in ("one.mp4", "two.mp4"):
        write_video(tmp_path / "videos" / name)
    given = ["--videos", str(tmp_path / "videos"), "--frames", "2", "--image-size", "32", "--workers", "0"]
    monkeypatch.setattr(sys, "argv", [str(script), *given, "--passes", "3", "--batch-size", "2", "--json", str(report)])
    runpy.run_path(str(script), run_name="__main__")
    rows = json.loads(report.read_text())["rows"]
    assert [row["source"] for row in rows] == ["decoded", "cache, raw", "cache, jpeg"]
    assert all(row["clips"] > 0 for row in rows)
    assert all(0 < row["waited"] < 1 for row in rows[1:])
    assert "2 videos, 2 frames of 32 px" in capsys.readouterr().out


@pytest.mark.slow
def test_steps_of_training_are_timed(tmp_path: Path) -> None:
    report = tmp_path / "rows.json"
    given = ["--model", "open_clip:tiny", "--frames", "2", "--batch-size", "2", "--steps", "1", "--chunks", "1", "2"]
    command = [sys.executable, str(EVAL / "training_speed.py"), *given, "--json", str(report)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    rows = json.loads(report.read_text())["rows"]
    cases = [tuple(row["case"].values()) for row in rows]
    assert cases == [(m, p, c) for p in ("fp32", "bf16") for c in (1, 2) for m in ("none", "tempme")]
    assert all(row["seconds"] > 0 and row["memory"] > 0 for row in rows)
