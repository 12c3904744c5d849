"""Runs side by side: rows, intervals, the table and the plot; at last a grid that is really trained."""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import threading
import xml.etree.ElementTree as ET
from dataclasses import replace
from pathlib import Path
from typing import TextIO

import numpy as np
import pytest

from tempme_vl.data.motion import render_motion
from tempme_vl.evaluation.compare import Row, Run, compared, markdown, paired_difference, plot
from tempme_vl.evaluation.compare_command import arguments, grid, main
from tempme_vl.evaluation.folder import check_alike, with_section
from tempme_vl.evaluation.intervals import Interval, over_seeds
from tempme_vl.evaluation.options import COMPARE, CompareOptions
from tempme_vl.evaluation.plot import ticks

SVG = "{http://www.w3.org/2000/svg}"


def run(seed: int, t2v: list[float], v2t: list[float] | None = None, **report: float) -> Run:
    known = {"output_tokens": 10, "input_tokens": 20, "gflops": 1.5, "trainable_params": 1234, "train_seconds": 7.0}
    found = {"t2v": {"r1": 12.5 + seed}, "v2t_max_pooled": {"r1": 25.0}}
    return Run(seed, {**known, **found, **report}, {"t2v": t2v, "v2t": t2v if v2t is None else v2t})


@pytest.mark.parametrize("text", ["none", "tempme+lora", "tome:r=4", "tome+full:r=4,budget=0.5"])
def test_a_row_is_read_and_named(text: str) -> None:
    assert Row.parse(text).name == text
    assert not set(Row.parse(text).folder) & set(":=/, ")


@pytest.mark.parametrize("text", ["tomy", "tome+lorry", "tome:r", ""])
def test_other_rows_are_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"expected METHOD, METHOD\+TUNING .* tempme.*clip4clip"):
        Row.parse(text)


def test_the_grid_is_every_method_with_every_tuning_and_no_row_twice() -> None:
    rows = grid(CompareOptions(methods=("none", "tome+lora:r=1"), tunings=("full", "clip4clip")))
    assert [row.name for row in rows] == ["none+full", "none+clip4clip", "tome+lora:r=1"]
    for options in (CompareOptions(methods=("none", "none")), CompareOptions(seeds=(1, 1)), CompareOptions(seeds=())):
        with pytest.raises(ValueError, match="expected one or more, each once"):
            grid(options)


def test_a_run_is_trained_with_its_row_and_what_all_have_alike() -> None:
    options = CompareOptions(output=Path("out"), train=("epochs=1", "merge-layers=1 2"))
    given = arguments(options, Row.parse("tome+full:r=4,budget=0.5,odd=x,num_frames=6"), 3)
    pairs = dict(itertools.pairwise(given))
    assert (pairs["--method"], pairs["--tuning"], pairs["--seed"], pairs["--r"]) == ("tome", "full", "3", "4")
    assert (pairs["--epochs"], pairs["--budget"], pairs["--method-options"]) == ("1", "0.5", "odd=x")
    assert pairs["--num-frames"] == "6"
    assert given[given.index("--merge-layers") + 1 :][:2] == ["1", "2"]
    assert pairs["--output"] == "out/tome+full_r-4_budget-0.5_odd-x_num_frames-6-seed3"


def test_intervals_are_students() -> None:
    assert over_seeds([5.0]) == Interval(5.0)
    # the mean of 1, 2, 3 with its 95 % interval: 2 +- 4.303 * 1 / sqrt(3)
    interval = over_seeds([1.0, 2.0, 3.0])
    assert interval.mean == 2.0 and interval.high == pytest.approx(4.4843, abs=1e-3)
    assert interval.shown() == "2.0 [-0.5, 4.5]" and interval.shown(signed=True) == "+2.0 [-0.5, +4.5]"


def test_differences_are_paired_by_query_and_seed() -> None:
    rng = np.random.default_rng(1)
    hard = rng.uniform(0, 200, size=(3, 500))  # queries differ by far more than the two models do
    base = [run(seed, list(hard[seed])) for seed in range(3)]
    better = [run(seed, list(hard[seed] + rng.normal(5, 1, 500))) for seed in range(3)]
    difference = paired_difference(better, base, "t2v", draws=500)
    assert difference.mean == pytest.approx(5, abs=0.1)
    assert difference.low is not None and difference.high is not None
    assert 4.5 < difference.low < difference.mean < difference.high < 5.5
    assert paired_difference(base, base, "t2v", draws=10) == Interval(0.0, 0.0, 0.0)
    with pytest.raises(ValueError, match=r"the same seeds; got \[0, 1, 2\] and \[0, 1\]"):
        paired_difference(base, base[:2], "t2v")
    with pytest.raises(ValueError, match="the same queries"):
        paired_difference([run(0, [1.0])], [run(0, [1.0, 2.0])], "t2v")


def test_the_table_and_the_plot_have_every_row() -> None:
    runs = {"none": [run(0, [100.0, 300.0])], "tome:r=1": [run(0, [200.0, 300.0], [0.0, 100.0], gflops=1.0)]}
    rows = compared(runs, {"none": [0.002, 0.004], "tome:r=1": [0.001, 0.003]})
    first, second = rows
    assert first.rsum.mean == 400 and first.difference is None and first.ratio == 1.0
    assert (second.t2v.mean, second.v2t.mean, second.rsum.mean) == (250.0, 50.0, 300.0)
    assert second.difference is not None and second.difference.mean == -100
    assert second.milliseconds == 2.0 and second.ratio == pytest.approx(0.625)
    lines = markdown(rows).splitlines()
    assert len({line.count("|") for line in lines}) == 1 and len(lines) == 4
    assert lines[3].startswith("| tome:r=1 | 300.0 | -100.0 [-200.0, +0.0] | 250.0 | 50.0 | 12.5 | 25.0 | 10 of 20 |")
    assert [recall.mean for recall in compared({"none": [run(0, [0.0]), run(1, [0.0])]}, {"none": [1.0]})[0].first] == [
        13.0,
        25.0,
    ]
    drawn = ET.fromstring(plot(rows))
    assert len(list(drawn.iter(f"{SVG}circle"))) == 3 * 2 + 2  # three panels, and the legend
    shown = [text.text for text in drawn.iter(f"{SVG}text")]
    assert {"none", "tome:r=1", "GFLOPs a video", "tokens of a video"} <= set(shown)


def test_a_page_keeps_what_others_wrote() -> None:
    page = with_section("# Title\n\nWords.\n", "motion", "one")
    both = with_section(page, "detail", "two") + "\nMore words.\n"
    anew = with_section(both, "motion", "three")
    assert anew == both.replace("one", "three") and anew.startswith("# Title\n\nWords.\n")
    assert anew.index("three") < anew.index("two") < anew.index("More words")
    with pytest.raises(ValueError, match="expected the line '<!-- end of detail -->' behind"):
        with_section(both.replace("<!-- end of detail -->", ""), "detail", "four")


@pytest.mark.parametrize(("low", "high"), [(0.0, 1.0), (299.0, 301.5), (3.0, 3.0), (0.0, 0.0), (12.3, 9876.0)])
def test_ticks_are_few_and_around_all_values(low: float, high: float) -> None:
    found = ticks(low, high)
    assert 2 <= len(found) <= 7 and found == sorted(found) and found[0] <= low and found[-1] >= high


def test_a_folder_holds_runs_that_were_trained_alike(tmp_path: Path) -> None:
    given = {"train": ("epochs=1",), "data_root": tmp_path}
    check_alike(tmp_path, given)
    check_alike(tmp_path, given)
    with pytest.raises(ValueError, match=r"have --train \['epochs=1'\]: give the same, or another --output"):
        check_alike(tmp_path, {**given, "train": ()})


def test_a_run_that_fails_or_stops_early_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for code, said, expected in (
        (2, "error: no such data", "none-seed0 failed: error: no such data .*output.txt"),
        (-9, "step 3", "none-seed0 failed: exit code -9 "),
        (
            0,
            "stopped after 4 of 615 steps",
            "it ended before all of its steps, so it has no report: leave max-steps out",
        ),
    ):

        def ended(command: list[str], stdout: TextIO, code: int = code, said: str = said, **_: object) -> object:
            stdout.write(f"{said}\n")
            return subprocess.CompletedProcess(command, code)

        monkeypatch.setattr(subprocess, "run", ended)
        options = CompareOptions(methods=("none",), seeds=(0,), output=tmp_path / str(code))
        with pytest.raises(ValueError, match=expected):
            main(options)


def test_runs_at_a_time_have_cores_of_their_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two runs with a thread a core each, on the same cores, took sixteen times as long as one."""
    both, seen, before = threading.Barrier(2, timeout=20), [], os.sched_getaffinity(0)

    def started(command: list[str], **_: object) -> object:
        seen.append(os.sched_getaffinity(0))
        both.wait()
        return subprocess.CompletedProcess(command, 1)

    monkeypatch.setattr(subprocess, "run", started)
    with pytest.raises(ValueError, match="tome-seed0 failed"):
        main(CompareOptions(methods=("none", "tome"), seeds=(0,), output=tmp_path, parallel=2))
    assert os.sched_getaffinity(0) == before == seen[0] | seen[1]
    assert not seen[0] & seen[1] or len(before) == 1


@pytest.mark.slow  # two runs through the launcher
def test_a_grid_is_trained_once_and_compared(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = tmp_path / "motion"
    render_motion(root, num_train=24, num_test=8)
    train = ["model=open_clip:tiny", "epochs=1", "batch-size=8", "max-steps=2", "frame-cache=memory", "holdout=4"]
    given = ["--methods", "none", "tome:r=1", "--seeds", "0", "--output", str(tmp_path / "out"), "--repeats", "2"]
    options = COMPARE.parse(
        [*given, "--dataset", "msrvtt", "--data-root", str(root), "--train", *train, "--parallel", "2"]
    )
    main(options)
    shown = capsys.readouterr().out
    assert "0 runs are there, 2 to train" in shown and "| tome:r=1 | " in shown
    made = {path.name for path in options.output.iterdir()}
    assert made >= {"comparison.md", "comparison_msrvtt.svg", "comparison.json", "none-seed0", "tome_r-1-seed0"}
    report = json.loads((options.output / "comparison.json").read_text())
    assert [row["name"] for row in report["rows"]] == ["none", "tome:r=1"] and len(report["runs"]["none"]) == 1
    for row in report["rows"]:  # what each query found is what the runs' own tests reported
        of_runs = [run["t2v"]["rsum"] for run in report["runs"][row["name"]]]
        assert row["t2v"]["mean"] == pytest.approx(sum(of_runs), abs=1e-9)
    main(options)
    assert "2 runs are there, 0 to train" in capsys.readouterr().out
    bad = replace(options, methods=("none", "tome:r=-1"))
    with pytest.raises(ValueError, match=r"tome_r--1-seed0 failed: .*error: .*r counts the pairs"):
        main(bad)
