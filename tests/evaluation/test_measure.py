"""Measuring takes turns, gives training rows one set of weights, and accounts for memory."""

from __future__ import annotations

import json
import runpy
import sys
from pathlib import Path

import pytest
import torch

from tempme_vl import create_frontend
from tempme_vl.evaluation import efficiency_command
from tempme_vl.evaluation.measure import (
    Peak,
    Workload,
    build_steps,
    format_measured,
    measured_rows,
    paired_times,
)
from tempme_vl.evaluation.options import EFFICIENCY
from tempme_vl.evaluation.papers import settings

COMMAND = Path(__file__).parents[2] / "eval" / "efficiency.py"
CPU = torch.device("cpu")
TINY = {"r": 1, "merge_layers": (2, 3, 4), "merge_frames": (2, 2, 2), "cross_percent": 30, "intra_percent": 10}
MODELS = ["open_clip:tiny", "umt:tiny"]


def test_rows_are_timed_in_turn_and_the_first_round_does_not_count():
    calls = []
    times = paired_times({name: lambda name=name: calls.append(name) for name in "abc"}, 3, CPU)
    assert calls == list("abc") * 4
    assert {name: len(row) for name, row in times.items()} == {"a": 3, "b": 3, "c": 3}


def test_ratios_are_medians_of_pairs_not_ratios_of_medians():
    memory, gflops = {"a": Peak(2**20, 0), "b": Peak(2**21, 0)}, {"a": 8.0, "b": 6.0}
    times = {"a": [1.0, 2.0, 10.0], "b": [1.0, 1.0, 9.0]}
    a, b = measured_rows(times, gflops, memory)
    assert (a.seconds, a.ratio) == (2.0, 1.0)
    assert (b.seconds, b.ratio) == (1.0, 0.9)
    shown = format_measured([a, b]).splitlines()
    assert "time / a" in shown[0] and "0.900" in shown[2] and "0.750" in shown[2] and "peak MiB" in shown[0]
    assert "peak" not in format_measured(measured_rows(times, gflops, {}))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("train", [False, True], ids=["forward", "train"])
@pytest.mark.parametrize("model", MODELS)
def test_every_row_can_be_measured(model, train, dtype):
    options = {"tempme": TINY, "tome": {"r": 1}}
    work = Workload(model, CPU, frames=8, batch=2, train=train, dtype=dtype, options=options)
    steps = build_steps(work, work.usual)
    assert tuple(steps) == work.usual and len(steps) == (4 if "clip" in model and not train else 3)
    for step in steps.values():
        step()


@pytest.mark.parametrize("model", MODELS)
def test_training_rows_share_weights_and_each_trains_all_of_its_own(monkeypatch, model):
    optimizers = []

    class Spy(torch.optim.AdamW):
        def __init__(self, params, **options):
            super().__init__(params, **options)
            optimizers.append(self)

        def step(self):
            params = self.param_groups[0]["params"]
            self.trained = {p for p in params if p.grad is not None}
            assert all(bool(p.grad.isfinite().all()) for p in self.trained)

    monkeypatch.setattr(torch.optim, "AdamW", Spy)
    work = Workload(model, CPU, frames=8, batch=2, train=True, options={"tempme": TINY, "tome": {"r": 1}})
    steps = build_steps(work, work.usual)
    build_steps(work, work.usual[:1])
    together, alone = optimizers
    positions = set(together.param_groups[0]["params"][len(alone.param_groups[0]["params"]) :])
    assert [tuple(p.shape) for p in positions] and len(positions) == len(TINY["merge_layers"])
    for row, step in steps.items():
        step()
        missed = set(together.param_groups[0]["params"]) - together.trained
        assert missed == (set() if "tempme" in row else positions)
    assert len(together.trained) > 100


@pytest.mark.slow  # a process of its own for each row
def test_the_command_measures_and_writes_json(tmp_path, monkeypatch, capsys):
    """One run for all: the table, the tiny tower's time, and its memory from a process of its own."""
    file = tmp_path / "out" / "report.json"
    command = f"{COMMAND} --measure --model umt:tiny --frames 8 --repeats 2 --threads 1 --rows per_frame+tempme --r 1"
    command += (
        f" --merge-layers 2 3 4 --merge-frames 2 2 2 --cross-percent 30 --intra-percent 10 --json {file} --batch 1 2"
    )
    monkeypatch.setattr(sys, "argv", command.split())
    runpy.run_path(str(COMMAND), run_name="__main__")
    report, shown = json.loads(file.read_text()), capsys.readouterr().out
    assert len(report["rows"]) == 69 and len(report["fusion"]) == 4
    promised = [
        "method",
        "tuning",
        "backbone",
        "frames",
        "gflops",
        "tokens",
        "trainable_params",
        "paper_gflops",
        "status",
    ]
    assert all({*promised} <= row.keys() for row in report["rows"])
    first, second = report["measured"]
    assert [part["setting"]["batch"] for part in (first, second)] == [1, 2]
    (row,) = first["rows"]
    assert (row["name"], row["ratio"]) == ("per_frame+tempme", 1.0)
    assert 0 < row["memory"]["before"] < row["memory"]["peak"]
    assert row["gflops"] == pytest.approx(create_frontend("umt:tiny", None, "tempme", 8, **TINY).gflops())
    assert first["setting"]["threads"] == 1
    for word in ("this machine", f"torch {torch.__version__}", "threads 1", "dtype float32", "device", "GMAC a pair"):
        assert word in shown


def test_all_methods_with_a_setting_are_measured_beside_their_gflops(monkeypatch, capsys):
    """Of ViT-B/16, without running it: what is timed is told before."""
    timed = {}

    def steps(work, names):
        timed[work.batch] = names
        return {name: lambda: None for name in names}

    monkeypatch.setattr(efficiency_command, "build_steps", steps)
    command = "--measure --rows all --model open_clip:ViT-B-16-quickgelu --batch 1 8 --repeats 1 --no-memory"
    options = EFFICIENCY.parse(command.split())
    for batch in options.batch:
        rows = efficiency_command.measure(options, batch)["rows"]
        gflops = {row["name"]: row["gflops"] for row in rows}
        assert tuple(gflops) == timed[batch] and all(row["memory"] is None for row in rows)
        published = {row.method for row in settings() if (row.backbone, row.frames) == ("B/16", 12)}
        assert {*gflops} == {"open_clip", *published}
        assert gflops["open_clip"] == gflops["none"] == pytest.approx(211.29, abs=0.01)
        assert gflops["tempme"] == pytest.approx(121.59, abs=0.01)
    assert [*timed] == [1, 8] and "GFLOPs / open_clip" in capsys.readouterr().out


def test_rows_of_another_family_are_refused(monkeypatch, capsys):
    command = f"{COMMAND} --measure --no-costs --model umt:tiny --rows open_clip"
    monkeypatch.setattr(sys, "argv", command.split())
    with pytest.raises(SystemExit) as end:
        runpy.run_path(str(COMMAND), run_name="__main__")
    assert end.value.code == 2
    assert "expected some of joint, per_frame, per_frame+tempme" in capsys.readouterr().err
