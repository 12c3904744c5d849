"""What a recipe does before its first step, and a run that has none."""

from __future__ import annotations

import fcntl
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from recipes.runs import CASES, COMMANDS, write_lines

from tempme_vl.recipes import retrieval
from tempme_vl.recipes.build import merging
from tempme_vl.recipes.start import check_numbers


@pytest.mark.parametrize("recipe", COMMANDS)
def test_numbers_that_mean_nothing_are_refused(recipe: str) -> None:
    options = COMMANDS[recipe].parse([])
    check_numbers(replace(options, epochs=0, workers=0, warmup=0.0, clip_grad=0.0, most_missing=1.0))
    for name, value, words in (
        ("workers", -1, "--workers must be 0 or more; got -1"),
        ("epochs", -1, "--epochs must be 0 or more; got -1"),
        ("batch_size", 0, "--batch-size must be 1 or more; got 0"),
        ("save_every", 0, "--save-every must be 1 or more; got 0"),
        ("warmup", 2.0, "--warmup is a share, 0 to 1; got 2.0"),
        ("most_missing", -0.1, "--most-missing is a share, 0 to 1; got -0.1"),
        ("lr", float("nan"), "--lr must be 0 or more; got nan"),
    ):
        with pytest.raises(ValueError, match=words):
            check_numbers(replace(options, **{name: value}))


@pytest.mark.parametrize("recipe", sorted(set(COMMANDS) - {"train pretraining"}))  # which merges nothing
def test_a_budget_takes_the_place_of_a_presets_merging(recipe: str) -> None:
    parse = COMMANDS[recipe].parse
    preset = merging(parse([]), 8)
    assert {"r", "merge_layers", "cross_percent"} < preset.keys()
    common = {key: preset[key] for key in ("method", "num_frames", "clip_position_std")}
    assert merging(parse(["--budget", "0.5"]), 8) == {**common, "budget": 0.5}
    assert merging(parse(["--tokens", "30", "--r", "2"]), 8) == {**common, "tokens": 30, "r": 2}


@pytest.mark.parametrize("case", [CASES["retrieval"], CASES["classifier"]], ids=lambda case: case.recipe)
def test_many_missing_videos_are_listed_before_anything_is_trained(data: Path, tmp_path: Path, case: Any) -> None:
    output, log = tmp_path / "run", tmp_path / "log"
    options: dict[str, Any] = {"video_root": tmp_path, "workers": 0, "max_steps": 1}
    for path in sorted((data / "motion" / "videos").iterdir())[20:]:
        (tmp_path / path.name).symlink_to(path)
    gone = {path.name for path in (data / "motion" / "videos").iterdir() if not (tmp_path / path.name).exists()}
    assert case.run(log, case.arguments(data, output, **options)) == [1]
    assert "videos are missing, more than the share of 0.1" in log.read_text() and "--most-missing" in log.read_text()
    listed = (output / "missing_videos.txt").read_text().splitlines()
    assert {Path(path).name for path in listed} == gone and len(listed) == 20
    assert [path.name for path in output.iterdir()] == ["missing_videos.txt"]

    assert case.run(log, case.arguments(data, output, **options, most_missing=0.5)) == [0], log.read_text()
    assert "20 videos are missing" in log.read_text()


def test_nothing_is_written_to_a_folder_in_use(data: Path, tmp_path: Path) -> None:
    case, log, output = CASES["videollm"], tmp_path / "log", tmp_path / "run"
    output.mkdir()
    with (output / ".lock").open("w") as lock:
        fcntl.lockf(lock, fcntl.LOCK_EX)
        assert case.run(log, case.arguments(data, output)) == [1]
    assert "in use by another process" in log.read_text()
    assert [path.name for path in output.iterdir()] == [".lock"]


def test_no_epochs_evaluate_the_model_as_it_starts(data: Path, tmp_path: Path) -> None:
    case, log = CASES["retrieval"], tmp_path / "log"
    arguments = case.arguments(data, tmp_path / "run", epochs=0, workers=0)
    assert case.run(log, arguments) == [0], log.read_text()
    report = json.loads((tmp_path / "run" / "report.json").read_text())
    assert (report["train_steps"], report["selected_step"], report["videos"]) == (0, 0, 8)
    assert {"versions", "date", "command"} <= report.keys()

    options = COMMANDS["train retrieval"].parse(arguments)
    torch.manual_seed(options.seed)
    train = options.source().captions(options.train_split)
    start = retrieval.build_model(options, train).state_dict()
    exported = case.load(tmp_path / "run" / "best").state_dict()
    assert start.keys() == exported.keys()
    assert all(torch.equal(start[name], exported[name]) for name in start)


def test_a_report_says_that_its_videos_were_trained_on(data: Path, tmp_path: Path) -> None:
    case, log = CASES["classifier"], tmp_path / "log"
    lines = [json.loads(line) for line in (data / "train.jsonl").read_text().splitlines()]
    file = write_lines(tmp_path / "mine.jsonl", lines[:20])
    arguments = case.arguments(data, tmp_path / "run", False, annotations=file, epochs=1, workers=0)
    assert case.run(log, arguments) == [0], log.read_text()
    note = json.loads((tmp_path / "run" / "report.json").read_text())["note"]
    assert "20 of these 20" in note and "trained on" in note
    assert note in log.read_text().split("accuracy %")[0].splitlines()[-2]
