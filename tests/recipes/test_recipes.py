"""What holds for every recipe, from its command line: killed, stopped, resumed, broken."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from recipes.runs import CASES, COMMANDS, assert_same_checkpoint, latest, losses, train_on_nan
from training.processes import LIMIT, ROOT, SCRIPTS, exit_codes, free_port, start

from tempme_vl.training.checkpoint import Tensors

TIMES = ("train_seconds", "train_steps", "date")


def slow(*values: Any) -> Any:
    """A second case of what another one holds."""
    return pytest.param(*values, marks=pytest.mark.slow)


# "umt" draws most: dropout, dropped paths and hard negatives anew in each step
@pytest.mark.parametrize("name", ["umt", slow("retrieval"), slow("lora"), slow("classifier")])
def test_one_rank_killed_twice_and_stopped_ends_like_an_uninterrupted_run(
    name: str, data: Path, tmp_path: Path
) -> None:
    case = CASES[name]
    whole, parts, log = tmp_path / "whole", tmp_path / "parts", tmp_path / "log"
    assert case.run(log, case.arguments(data, whole)) == [0], log.read_text()
    assert latest(whole) == "step-00000012"
    resumed = case.arguments(data, parts, resume="auto")
    assert case.run(log, resumed, 4) == [-signal.SIGKILL]  # before any checkpoint: starts anew
    assert case.run(log, resumed, 8) == [-signal.SIGKILL]
    assert latest(parts) == "step-00000006"
    assert case.run(log, resumed, 8, signal.SIGTERM) == [143]
    assert latest(parts) == "step-00000009"
    assert case.run(log, [*resumed, "--max-steps", "11"]) == [0]
    assert latest(parts) == "step-00000011"
    assert not (parts / "report.json").exists()
    assert case.run(log, resumed) == [0], log.read_text()
    assert_same_checkpoint(whole, parts)
    assert losses(whole) == losses(parts)
    assert [step for step, _ in losses(whole)] == list(range(1, 13))

    reports = [json.loads((output / "report.json").read_text()) for output in (whole, parts)]
    for report in reports:
        for key in TIMES:
            del report[key]
    assert reports[0] == reports[1]
    assert {key: reports[0][key] for key in case.report} == case.report
    if name == "umt":
        again = reports[0]["reranked"]
        assert again["rerank_top_k"] == 3 and 24 <= again["rerank_pairs"] <= 48
    models = [case.load(output / "best").state_dict() for output in (whole, parts)]
    assert models[0].keys() == models[1].keys()
    assert all(torch.equal(models[0][name], models[1][name]) for name in models[0])

    # a finished run, resumed, evaluates again and leaves everything as it is
    assert case.run(log, resumed) == [0], log.read_text()
    assert_same_checkpoint(whole, parts)
    # a folder with checkpoints is not overwritten
    options = (whole / "options.json").read_bytes()
    assert case.run(log, case.arguments(data, whole, seed=3)) == [1]
    assert "continue it with --resume auto, or give another --output" in log.read_text()
    assert (whole / "options.json").read_bytes() == options


@pytest.mark.slow  # one rank stopped by the same signal is above; here the processes of the launcher stand between
@pytest.mark.parametrize("name", ["retrieval", "decoder"])
def test_two_ranks_stopped_through_the_launcher_resume_bit_for_bit(name: str, data: Path, tmp_path: Path) -> None:
    case = CASES[name]
    whole, parts, log = tmp_path / "whole", tmp_path / "parts", tmp_path / "log"
    options = {**case.two_ranks, "epochs": 100, "workers": 1, "save_every": 4, "resume": "auto"}
    resumed = case.arguments(data, parts, select=False, **options)
    stopped_at = stop_through_launcher(case.recipe, parts, resumed, log)
    assert latest(parts) == f"step-{stopped_at:08d}"
    stop = ["--max-steps", str(stopped_at + 3)]
    assert case.run(log, [*resumed, *stop], world=2) == [0, 0], log.read_text()
    assert case.run(log, [*case.arguments(data, whole, select=False, **options), *stop], world=2) == [0, 0]
    assert_same_checkpoint(whole, parts)
    assert losses(whole) == losses(parts)


def stop_through_launcher(recipe: str, output: Path, parts: list[str], log: Path) -> int:
    """Starts two ranks as a user does, sends the node's launcher SIGTERM in mid-run and gives the step it saved."""
    port = free_port()
    command = ["-m", "deepspeed.launcher.runner", "--num_accelerators", "2", "--master_port", str(port)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE"):
        environment.pop(name, None)
    with log.open("a") as stream:
        runner = subprocess.Popen(
            [sys.executable, *command, str(ROOT / SCRIPTS[recipe]), *parts],
            stdout=stream,
            stderr=stream,
            env=environment,
        )
    try:
        limit = time.monotonic() + LIMIT
        while not (output / "metrics.jsonl").is_file() or len(losses(output)) < 3:
            assert runner.poll() is None and time.monotonic() < limit, log.read_text()[-3000:]
            time.sleep(0.1)
        # the runner of a single node does not pass signals on: they go to its child, the node's launcher
        (launcher,) = (child for child in _children(runner.pid) if b"deepspeed.launcher.launch" in _command(child))
        os.kill(launcher, signal.SIGTERM)
        assert runner.wait(timeout=LIMIT) == 1
    finally:
        for process in _descendants(runner.pid):
            os.kill(process, signal.SIGKILL)
        runner.kill()
    assert "SIGTERM: saved step" in log.read_text()
    return int(latest(output)[5:])


def _children(process: int) -> list[int]:
    path = Path(f"/proc/{process}/task/{process}/children")
    return [int(child) for child in path.read_text().split()] if path.exists() else []


def _command(process: int) -> bytes:
    return Path(f"/proc/{process}/cmdline").read_bytes()


def _descendants(process: int) -> list[int]:
    return [found for child in _children(process) for found in (child, *_descendants(child))]


@pytest.mark.parametrize("name", ["retrieval", slow("decoder")])
def test_a_loss_that_is_nan_ends_the_recipe(name: str, data: Path, tmp_path: Path) -> None:
    case, output, log = CASES[name], tmp_path / "run", tmp_path / "log"
    codes = exit_codes(start(train_on_nan, case.recipe, case.arguments(data, output, select=False), 6, log=log))
    assert codes == [1]
    assert "NonFiniteLossError: loss is nan at step 6" in log.read_text()
    assert "video" in log.read_text().split("samples of the batch: ")[1]
    assert latest(output) == "step-00000006"
    saved = Tensors(output / "checkpoints" / latest(output))
    weights = [saved[name] for name in saved.names if name.startswith("weight/")]
    assert weights and all(weight.isfinite().all() for weight in weights)


@pytest.mark.parametrize(
    ("name", "options", "counted"),
    [
        (
            "retrieval",
            {"method": "tome", "r": 1, "batch_size": 24, "epochs": 1},
            {"videos": 8, "unreadable_videos": 1, "selected_on": "no validation split: last epoch"},
        ),
        # all three questions about a video that cannot be read are missing
        slow(
            "classifier",
            {"dataset": "msrvtt_qa", "data_root": "ROOT", "batch_size": 24, "epochs": 1},
            {"total": 24, "missing": 3, "selected_on": "msrvtt_qa/val", "split": "msrvtt_qa/test"},
        ),
    ],
)
def test_broken_video_is_trained_around_and_reported(
    name: str, options: dict[str, Any], counted: dict[str, Any], data: Path, tmp_path: Path
) -> None:
    videos = tmp_path / "videos"
    videos.mkdir()
    for path in (data / "motion" / "videos").iterdir():
        (videos / path.name).write_bytes(b"not a video" if path.stem in ("video2", "video55") else path.read_bytes())
    case, output, log = CASES[name], tmp_path / "run", tmp_path / "log"
    options = {"video_root": videos, **{key: value for key, value in options.items() if key != "video_root"}}
    assert case.run(log, case.arguments(data, output, select=False, **options)) == [0], log.read_text()
    report = json.loads((output / "report.json").read_text())
    assert set(report["broken_videos"]) == {"video2", "video55"}
    assert {key: report[key] for key in counted} == counted
    assert "2 videos could not be read" in log.read_text()
    options = {**options, "on_broken": "raise"}
    assert case.run(log, case.arguments(data, tmp_path / "strict", select=False, **options)) == [1]
    assert "VideoError" in log.read_text() and "video2.mp4" in log.read_text()


@pytest.mark.parametrize(
    ("recipe", "said"),
    [
        ("train retrieval", "Gradient caching"),
        ("train videoqa", "the first word twice"),
        ("train videollm", "LoRA on all linear layers"),
    ],
)
def test_help_names_every_option(recipe: str, said: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        COMMANDS[recipe].parse(["--help"])
    shown = capsys.readouterr().out
    assert ended.value.code == 0
    for name in set(vars(COMMANDS[recipe].parse([]))) - set(COMMANDS[recipe].without):
        assert f"--{name.replace('_', '-')}" in shown
    assert said in " ".join(shown.split())
