"""How cost grows: what is computed is what a model does, what is measured is there, and a file holds all of it."""

from __future__ import annotations

import csv
import json
import runpy
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from tempme_vl import create_frontend
from tempme_vl.evaluation.growth import Growth, computed, panels, to_csv
from tempme_vl.evaluation.measure import Workload

COMMAND = Path(__file__).parents[2] / "eval" / "growth.py"
TEMPME: dict[str, Any] = {
    "r": 2,
    "merge_layers": (2, 3),
    "merge_frames": (2, 2),
    "cross_percent": 30,
    "intra_percent": 10,
}


def test_tokens_and_similarities_are_those_of_a_forward(monkeypatch: pytest.MonkeyPatch) -> None:
    work = Workload("open_clip:tiny", torch.device("cpu"), frames=4, options={"tempme": TEMPME})
    row = computed(work, "tempme")
    largest = []
    product = torch.Tensor.__matmul__

    def counted(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        result = product(a, b)
        if result.ndim == 3:  # similarities (R, A, B), and no projection
            largest.append(result.numel())
        return result

    frontend = create_frontend("open_clip:tiny", None, "tempme", 4, **TEMPME).eval()
    monkeypatch.setattr(torch.Tensor, "__matmul__", counted)
    with torch.no_grad():
        tokens = frontend(torch.zeros(1, 4, 3, 32, 32)).tokens
    monkeypatch.undo()
    assert row.tokens == tokens.shape[1] and row.gflops == frontend.gflops()
    assert row.compared == max(largest) and row.input_tokens == 4 * 17
    assert computed(work, "none").compared == 0 and row.seconds is None


def test_what_was_not_measured_is_empty_and_not_drawn() -> None:
    row = Growth("ViT-B-32-quickgelu", "none", 12, 1, 600, 600, 0, 53.0)
    ran = Growth("ViT-B-32-quickgelu", "none", 12, 4, 600, 600, 0, 53.0, 1.0, 0.5, 3 * 2**20, 5 * 2**20)
    first, second = csv.DictReader(to_csv([row, ran]).splitlines())
    assert (first["seconds"], first["kept"]) == ("", "") and (second["cpu_seconds"], second["kept"]) == (
        "0.5",
        "5242880",
    )
    assert panels([row]) == []
    (drawn,) = panels([row, ran])  # of four videos there is no panel of one video's frames
    assert drawn.across == "videos of 12 frames" and [(p.x, p.y) for p in drawn.points] == [(4, 3.0), (4, 5.0)]


def test_the_command_computes_and_measures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = f"--csv {tmp_path}/g.csv --plot {tmp_path}/g.svg --json {tmp_path}/g.json"
    command = f"{COMMAND} --models tiny --frames 4 8 --batch 1 --methods tempme --measured 0.02 --threads 1 {files}"
    monkeypatch.setattr(sys, "argv", command.split())
    runpy.run_path(str(COMMAND), run_name="__main__")
    small, large = json.loads((tmp_path / "g.json").read_text())["rows"]
    assert small["frames"] == 4 and min(small["above_weights"], small["kept"], small["cpu_seconds"]) > 0
    assert large["gflops"] > 0.02 and large["kept"] is None
    assert (tmp_path / "g.svg").read_text().startswith("<svg") and len(
        (tmp_path / "g.csv").read_text().splitlines()
    ) == 3
