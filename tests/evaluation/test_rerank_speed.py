"""The command times all four ways, and caching changes no score."""

from __future__ import annotations

import json
import runpy
import sys
from pathlib import Path
from typing import Any

import pytest

COMMAND = Path(__file__).parents[2] / "eval" / "rerank_speed.py"
CAPTIONS = 7


def speeds(monkeypatch: pytest.MonkeyPatch, file: Path, more: str) -> list[dict[str, Any]]:
    command = f"{COMMAND} --model umt:tiny --videos 5 --captions {CAPTIONS} --tokens 48 6 --pairs-per-batch 3 {more}"
    monkeypatch.setattr(sys, "argv", [*command.split(), "--json", str(file)])
    runpy.run_path(str(COMMAND), run_name="__main__")
    return json.loads(file.read_text())


@pytest.mark.parametrize(
    ("more", "uncached_pairs", "cached_pairs"),
    [("", 5 * CAPTIONS, 5 * CAPTIONS), ("--uncached-videos 2", 2 * CAPTIONS, 5 * CAPTIONS)],
    ids=["all", "fewer uncached"],
)
def test_the_command_times_all_ways_and_caching_changes_no_score(
    more: str,
    uncached_pairs: int,
    cached_pairs: int,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    rows = speeds(monkeypatch, tmp_path / "out" / "rows.json", more)
    assert [(row["tokens"], row["cached"]) for row in rows] == [(48, False), (48, True), (6, False), (6, True)]
    assert [row["pairs"] for row in rows] == 2 * [uncached_pairs, cached_pairs]
    for row in rows:
        assert row["seconds"] > 0 and row["difference"] < 1e-4 * row["spread"]
    assert rows[0]["macs"] > rows[2]["macs"] > rows[3]["macs"] and rows[0]["macs"] > rows[1]["macs"]
    shown = capsys.readouterr().out
    assert shown.count("cached") == 2 and shown.count("for each pair") == 2 and "this machine" in shown


def test_fewer_candidates_make_fewer_pairs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = speeds(monkeypatch, tmp_path / "rows.json", "--top-k 2 --uncached-videos 3")
    assert 2 * CAPTIONS <= rows[1]["pairs"] < 5 * CAPTIONS
    assert all(row["difference"] < 1e-4 * row["spread"] for row in rows)
