"""The table equals the paper and real forwards; measuring takes turns and accounts for memory."""

from __future__ import annotations

import json
import runpy
import sys
from pathlib import Path

import pytest
import torch

from tempme_vl import create_frontend
from tempme_vl.evaluation.efficiency import (
    PAPER_GFLOPS,
    Peak,
    Workload,
    build_step,
    cost_row,
    cost_table,
    format_costs,
    format_measured,
    measured_rows,
    paired_times,
)

COMMAND = Path(__file__).parents[2] / "eval" / "efficiency.py"
CPU = torch.device("cpu")
TINY = {"r": 1, "merge_layers": (2, 3, 4), "merge_frames": (2, 2, 2), "cross_percent": 30, "intra_percent": 10}


@pytest.mark.parametrize("key", [key for key in PAPER_GFLOPS if key[1] == 12], ids=str)
def test_12_frames_cost_what_the_paper_says(key):
    row = cost_row(*key)
    assert row.verified
    assert row.gflops == pytest.approx(row.paper_gflops, rel=0.002)
    assert abs(row.deviation) <= 0.2
    if row.paper_tokens is not None:
        assert row.output_tokens == row.paper_tokens


def test_64_frames_cost_a_little_more_than_the_paper_says():
    rows = [row for row in cost_table(frames=(64,)) if row.paper_gflops is not None]
    assert len(rows) == 3
    assert all(2 < row.deviation < 4 for row in rows)


def test_the_table_has_every_method_and_marks_guessed_settings():
    rows = cost_table()
    assert len({(row.backbone, row.frames, row.method) for row in rows}) == len(rows) == 16
    assert {row.method for row in rows if not row.verified} == {"tempme", "temporal only"}
    assert all(row.frames == 64 for row in rows if not row.verified)
    assert {row.output_tokens for row in rows if row.method == "temporal only"} == {600, 3200, 2364, 12608}
    assert format_costs(rows).count(" * ") == 4 and "unverified" in format_costs(rows)


@pytest.mark.parametrize("method, options", [("none", {}), ("tome", {"r": 1}), ("tempme", TINY)])
def test_predicted_tokens_are_those_of_a_forward(method, options):
    frontend = create_frontend("open_clip:tiny", None, method, 8, **options)
    counts = []
    for block in frontend.blocks:
        block.register_forward_hook(lambda _, __, state: counts.append((state.num_clips, state.x.shape[1])))
    with torch.no_grad():
        out = frontend(torch.randn(2, 8, 3, 32, 32))
    assert counts == frontend.schedule.token_counts
    assert out.tokens.shape[1] == frontend.schedule.output_tokens


def test_predicted_tokens_of_the_paper_are_those_of_a_real_tower():
    row = cost_row("B/32", 12, "tempme")
    frontend = create_frontend("open_clip:ViT-B-32-quickgelu")
    with torch.no_grad():
        out = frontend(torch.randn(1, 12, 3, 224, 224))
    assert out.tokens.shape[1] == row.output_tokens == 97
    assert int(out.size.sum()) == row.input_tokens == 600
    assert frontend.gflops() == row.gflops


def test_rows_are_timed_in_turn_and_the_first_round_does_not_count():
    calls = []
    times = paired_times({name: lambda name=name: calls.append(name) for name in "abc"}, 3, CPU)
    assert calls == list("abc") * 4
    assert {name: len(row) for name, row in times.items()} == {"a": 3, "b": 3, "c": 3}


def test_ratios_are_medians_of_pairs_not_ratios_of_medians():
    memory = {"a": Peak(2**20, 0), "b": Peak(2**21, 0)}
    a, b = measured_rows({"a": [1.0, 2.0, 10.0], "b": [1.0, 1.0, 9.0]}, memory)
    assert (a.seconds, a.ratio) == (2.0, 1.0)
    assert (b.seconds, b.ratio) == (1.0, 0.9)
    shown = format_measured([a, b]).splitlines()
    assert "time / a" in shown[0] and "0.900" in shown[2]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("train", [False, True], ids=["forward", "train"])
def test_every_row_can_be_measured(train, dtype):
    options = {"tempme": TINY, "tome": {"r": 1}}
    work = Workload("open_clip:tiny", CPU, frames=8, batch=2, train=train, dtype=dtype, options=options)
    for row in work.rows:
        build_step(work, row)()


def test_a_training_step_gives_every_trained_parameter_a_gradient(monkeypatch):
    seen = []

    class Spy(torch.optim.AdamW):
        def step(self):
            seen.extend(p.grad for group in self.param_groups for p in group["params"])

    monkeypatch.setattr(torch.optim, "AdamW", Spy)
    build_step(Workload("open_clip:tiny", CPU, frames=8, batch=2, train=True, options={"tempme": TINY}), "tempme")()
    assert len(seen) > 100
    assert all(grad is not None and bool(grad.isfinite().all()) for grad in seen)


def test_the_command_measures_and_writes_json(tmp_path, monkeypatch, capsys):
    """One run for all: the table, the tiny tower's time, and its memory from a process of its own."""
    file = tmp_path / "out" / "report.json"
    command = f"{COMMAND} --measure --model open_clip:tiny --frames 8 --repeats 2 --threads 1 --rows tempme --r 1"
    command += f" --merge-layers 2 3 4 --merge-frames 2 2 2 --cross-percent 30 --intra-percent 10 --json {file}"
    monkeypatch.setattr(sys, "argv", command.split())
    runpy.run_path(str(COMMAND), run_name="__main__")
    report, shown = json.loads(file.read_text()), capsys.readouterr().out
    assert len(report["costs"]) == 16
    row = next(row for row in report["costs"] if (row["backbone"], row["method"]) == ("B/32", "tempme"))
    assert row["output_tokens"] == 97 and abs(row["deviation_percent"]) < 0.2
    (row,) = report["measured"]["rows"]
    assert (row["name"], row["ratio"]) == ("tempme", 1.0)
    assert 0 < row["memory"]["before"] < row["memory"]["peak"]
    assert report["measured"]["setting"]["threads"] == 1
    for word in ("this machine", f"torch {torch.__version__}", "threads 1", "dtype float32", "device"):
        assert word in shown
