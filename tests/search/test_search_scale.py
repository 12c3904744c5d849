"""The scripts that say what search and indexing take, of few vectors and few videos."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from search.search_runs import save_model

SCRIPTS = Path(__file__).parents[2] / "eval"


def run(script: str, report: Path, *given: object) -> Any:
    command = [sys.executable, str(SCRIPTS / script), *map(str, given), "--json", str(report)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(report.read_text())["rows"]


def test_what_very_many_clips_take(tmp_path: Path) -> None:
    rates = ("--decode-seconds", 2, "--gpu-rate", 10, "--encode-seconds", 3, "--write-seconds", 0.5, "--exact-ms", 4)
    rows = run("search_cost.py", tmp_path / "cost.json", "--clips", 360_000, "--gpus", 5, "--tokens", "int8", *rates)
    assert rows == pytest.approx(
        {
            "CPU hours of decoding": 200,
            "GPU hours of encoding": 10,
            "or CPU hours of encoding": 300,
            "hours of encoding with 5 GPUs": 2,
            "CPU cores that keep up with them": 100,
            "hours of the writer": 50,
            "MB a second that come to the writer": 3.19465,
            "GB of the index": 23.00148,
            "GB more with --ann": 0.10116,
            "s of an exact search": 1.44,
            "MB that an approximate search reads": 101.16,
        }
    )


@pytest.mark.slow
def test_approximate_and_exact_search_are_counted(tmp_path: Path) -> None:
    pytest.importorskip("lancedb")
    given = ("--vectors", 3000, "--queries", 20, "--made", "noise", "--output", tmp_path / "out")
    (row,) = run("search_scale.py", tmp_path / "scale.json", *given)
    assert row["exact: recall"] == 1 and 0.9 <= row["ann: recall"] <= 1
    assert row["bytes a vector"] > 2048 and row["ann: ms"] > 0 < row["exact: MB"]


@pytest.mark.slow
def test_a_cluster_is_timed_beside_one_process(tmp_path: Path) -> None:
    for name in ("lancedb", "ray", "psutil"):
        pytest.importorskip(name)
    model = save_model(tmp_path / "model")
    given = ("--checkpoint", model, "--clips", 20, "--nodes", 1, "--output", tmp_path / "out")
    alone, cluster = run("search_cluster.py", tmp_path / "cluster.json", *given)
    assert (alone["segments"], cluster["segments"]) == (20, 20)
    assert cluster["largest difference"] < 1e-6 and alone["CPU ms a clip, decoding"] > 0
