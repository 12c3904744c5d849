"""The scripts that measure TESTA's encoder and the reading of long videos, at tiny sizes."""

from __future__ import annotations

import json
import runpy
import sys
from pathlib import Path
from typing import Any

import pytest

EVAL = Path(__file__).parents[2] / "eval"


@pytest.mark.parametrize("step", ["forward", "training"])
def test_aggregation_is_measured_beside_none(step: str) -> None:
    module: dict[str, Any] = runpy.run_path(str(EVAL / "testa_speed.py"))
    options = module["Options"](model="testa:tiny", grad_checkpointing=True)
    rows = [module["measured"](options, 8, step, method) for method in module["METHODS"]]
    assert [row.tokens for row in rows] == [1 + 8 * 16, 29]
    assert rows[1].gflops < 0.7 * rows[0].gflops and min(row.cpu for row in rows) > 0
    first, second = module["rows_shown"](rows).splitlines()[1:]
    assert first.split()[2:4] == ["off", "129"] and second.split()[2:4] == ["on", "29"]


def test_frames_of_a_long_video_are_of_all_of_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    script, file, report = EVAL / "long_video.py", tmp_path / "long.mp4", tmp_path / "rows.json"
    given = ["--file", str(file), "--seconds", "6", "--frames", "3", "--repeats", "2", "--json", str(report)]
    monkeypatch.setattr(sys, "argv", [str(script), *given])
    runpy.run_path(str(script), run_name="__main__")
    rows = json.loads(report.read_text())["rows"]
    assert [(row["first frame at"], row["last frame at"]) for row in rows] == [(0.0, pytest.approx(5.96))] * 2
    assert "3 frames of" in capsys.readouterr().out
    assert [path.name for path in tmp_path.glob("*.mp4")] == ["long.mp4"]
