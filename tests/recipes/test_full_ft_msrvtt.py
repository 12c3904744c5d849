"""The retrieval recipe from its command line: killed, stopped, resumed, broken, wrongly called."""

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
from full_ft_msrvtt import Options, config, parse, source
from recipes.runs import train, train_on_nan
from torch import Tensor
from training.processes import RECIPES, exit_codes, free_port, start

from tempme_vl.data.datasets import USUAL_SPLITS, SplitNames
from tempme_vl.data.motion import render_motion
from tempme_vl.tasks.retrieval import RetrievalModel
from tempme_vl.tasks.umt_retrieval import UMTRetrievalModel

TIMES = ("train_seconds", "train_steps")


@pytest.fixture(scope="module")
def clips(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """MSRVTT's layout with 102 training and 8 test clips."""
    return render_motion(
        tmp_path_factory.mktemp("data") / "motion",
        num_train=102,
        num_test=8,
        num_order_train=0,
        num_order_val=0,
        num_order_test=0,
    )


def arguments(clips: Path, output: Path, **options: Any) -> list[str]:
    chosen = {
        "dataset": "msrvtt",
        "model": "open_clip:tiny",
        "data_root": clips,
        "output": output,
        "holdout": 6,
        "batch_size": 16,
        "epochs": 2,
        "save_every": 5,
        "decode_timeout": None,
        **options,
    }
    return [part for name, value in chosen.items() for part in (f"--{name.replace('_', '-')}", str(value))]


def run_recipe(log: Path, parts: list[str], *args: Any, world: int = 1) -> list[int | None]:
    return exit_codes(start(train, parts, *args, log=log, world=world))


def latest(output: Path) -> str:
    return (output / "checkpoints" / "latest").read_text()


def tensors(value: Any, name: str) -> dict[str, Tensor]:
    """All tensors in nested data, by their place."""
    if isinstance(value, Tensor):
        return {name: value}
    if isinstance(value, dict):
        items = list(value.items())
    else:
        items = list(enumerate(value)) if isinstance(value, list | tuple) else []
    return {k: v for key, part in items for k, v in tensors(part, f"{name}/{key}").items()}


def assert_same_checkpoint(left: Path, right: Path) -> None:
    """Weights, optimizer and random states of all ranks, bit for bit."""
    assert latest(left) == latest(right)
    folders = [output / "checkpoints" / latest(output) for output in (left, right)]
    names = [sorted(path.name for path in folder.glob("*.pt")) for folder in folders]
    assert names[0] == names[1]
    compared = 0
    for name in names[0]:
        first, second = (tensors(torch.load(folder / name, weights_only=False), name) for folder in folders)
        assert first.keys() == second.keys()
        for key in first:
            assert torch.equal(first[key], second[key]), key
        compared += len(first)
    assert compared > 100


def losses(output: Path) -> list[tuple[int, float]]:
    lines = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    return [(line["step"], line["loss"]) for line in lines if "loss" in line]


def test_one_rank_killed_twice_and_stopped_ends_like_an_uninterrupted_run(clips: Path, tmp_path: Path) -> None:
    whole, parts, log = tmp_path / "whole", tmp_path / "parts", tmp_path / "log"
    assert run_recipe(log, arguments(clips, whole)) == [0], log.read_text()
    assert latest(whole) == "step-00000012"
    resumed = arguments(clips, parts, resume="auto")
    assert run_recipe(log, resumed, 4) == [-signal.SIGKILL]  # before any checkpoint: starts anew
    assert run_recipe(log, resumed, 8) == [-signal.SIGKILL]
    assert latest(parts) == "step-00000005"
    assert run_recipe(log, resumed, 8, signal.SIGTERM) == [143]
    assert latest(parts) == "step-00000009"
    assert run_recipe(log, [*resumed, "--max-steps", "11"]) == [0]
    assert latest(parts) == "step-00000011"
    assert not (parts / "report.json").exists()
    assert run_recipe(log, resumed) == [0], log.read_text()
    assert_same_checkpoint(whole, parts)
    assert losses(whole) == losses(parts)
    assert [step for step, _ in losses(whole)] == list(range(1, 13))

    reports = [json.loads((output / "report.json").read_text()) for output in (whole, parts)]
    for report in reports:
        del report["train_seconds"], report["train_steps"]
    assert reports[0] == reports[1]
    assert reports[0]["split"] == "msrvtt/test_1k"
    assert reports[0]["selected_on"] == "msrvtt/train_9k, 6 held out, seed 0"
    assert reports[0]["videos"] == 8 and reports[0]["broken_videos"] == {}
    models = [RetrievalModel.from_pretrained(output / "best").state_dict() for output in (whole, parts)]
    assert all(torch.equal(models[0][name], models[1][name]) for name in models[0])

    # a finished run, resumed, evaluates again and leaves everything as it is
    assert run_recipe(log, resumed) == [0], log.read_text()
    assert_same_checkpoint(whole, parts)
    # a folder with checkpoints is not overwritten
    options = (whole / "options.json").read_bytes()
    assert run_recipe(log, arguments(clips, whole, seed=3)) == [1]
    assert "continue it with --resume auto, or give another --output" in log.read_text()
    assert (whole / "options.json").read_bytes() == options


def test_two_ranks_stopped_through_the_launcher_and_killed_resume_bit_for_bit(clips: Path, tmp_path: Path) -> None:
    whole, parts, log = tmp_path / "whole", tmp_path / "parts", tmp_path / "log"
    options = {"holdout": 0, "epochs": 100, "workers": 1, "save_every": 4, "resume": "auto"}
    resumed = arguments(clips, parts, **options)
    stopped_at = stop_through_launcher(parts, resumed, log)
    assert latest(parts) == f"step-{stopped_at:08d}"
    codes = run_recipe(log, resumed, stopped_at + 6, signal.SIGKILL, 1, world=2)
    assert codes[1] == -signal.SIGKILL and codes[0] not in (0, None)
    done = int(latest(parts)[5:])
    assert stopped_at < done <= stopped_at + 6
    codes = run_recipe(log, resumed, stopped_at + 7, signal.SIGTERM, 1, world=2)
    assert codes == [143, 143]
    assert latest(parts) == f"step-{stopped_at + 8:08d}"
    stop = str(stopped_at + 10)
    assert run_recipe(log, [*resumed, "--max-steps", stop], world=2) == [0, 0]
    assert run_recipe(log, [*arguments(clips, whole, **options), "--max-steps", stop], world=2) == [0, 0]
    assert_same_checkpoint(whole, parts)
    assert losses(whole) == losses(parts)


def stop_through_launcher(output: Path, parts: list[str], log: Path) -> int:
    """Starts two ranks as a user does, sends the node's launcher SIGTERM in mid-run and gives the step it saved."""
    port = free_port()
    command = ["-m", "deepspeed.launcher.runner", "--num_accelerators", "2", "--master_port", str(port)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE"):
        environment.pop(name, None)
    with log.open("a") as stream:
        runner = subprocess.Popen(
            [sys.executable, *command, str(RECIPES / "full_ft_msrvtt.py"), *parts],
            stdout=stream,
            stderr=stream,
            env=environment,
        )
    try:
        limit = time.monotonic() + 90
        while not (output / "metrics.jsonl").is_file() or len(losses(output)) < 3:
            assert runner.poll() is None and time.monotonic() < limit, log.read_text()[-3000:]
            time.sleep(0.1)
        # the runner of a single node does not pass signals on: they go to its child, the node's launcher
        (launcher,) = _children(runner.pid)
        os.kill(launcher, signal.SIGTERM)
        assert runner.wait(timeout=60) == 1
    finally:
        for process in _descendants(runner.pid):
            os.kill(process, signal.SIGKILL)
        runner.kill()
    assert "SIGTERM: saved step" in log.read_text()
    return int(latest(output)[5:])


def _children(process: int) -> list[int]:
    path = Path(f"/proc/{process}/task/{process}/children")
    return [int(child) for child in path.read_text().split()] if path.exists() else []


def _descendants(process: int) -> list[int]:
    return [found for child in _children(process) for found in (child, *_descendants(child))]


def test_a_loss_that_is_nan_ends_the_recipe(clips: Path, tmp_path: Path) -> None:
    output, log = tmp_path / "run", tmp_path / "log"
    codes = exit_codes(start(train_on_nan, arguments(clips, output, holdout=0), 6, log=log))
    assert codes == [1]
    assert "NonFiniteLossError: loss is nan at step 6" in log.read_text()
    assert "video" in log.read_text().split("samples of the batch: ")[1]
    assert latest(output) == "step-00000005"
    saved = torch.load(output / "checkpoints" / latest(output) / "mp_rank_00_model_states.pt", weights_only=False)
    assert all(tensor.isfinite().all() for tensor in saved["module"].values())


def test_broken_clip_is_trained_around_and_reported(clips: Path, tmp_path: Path) -> None:
    videos = tmp_path / "videos"
    videos.mkdir()
    for path in (clips / "videos").iterdir():
        (videos / path.name).write_bytes(b"not a video" if path.stem in ("video2", "video103") else path.read_bytes())
    output, log = tmp_path / "run", tmp_path / "log"
    assert run_recipe(log, arguments(clips, output, video_root=videos, holdout=0, method="tome", r=1)) == [0]
    report = json.loads((output / "report.json").read_text())
    assert set(report["broken_videos"]) == {"video2", "video103"}
    assert (report["videos"], report["unreadable_videos"]) == (8, 1)
    assert report["selected_on"] == "none: last epoch"
    assert "2 videos could not be read" in log.read_text()
    parts = arguments(clips, tmp_path / "strict", video_root=videos, holdout=0, on_broken="raise")
    assert run_recipe(log, parts) == [1]
    assert "VideoError" in log.read_text() and "video2.mp4" in log.read_text()


def test_umt_trains_is_killed_resumes_and_re_ranks(clips: Path, tmp_path: Path) -> None:
    """Dropout and hard negatives are drawn anew in each step; a resumed run draws what an unbroken one does."""
    whole, parts, log = tmp_path / "whole", tmp_path / "parts", tmp_path / "log"
    umt = {"model": "umt:tiny", "mode": "clip", "deepspeed_config": RECIPES / "ds" / "zero2.json", "rerank": 3}
    assert run_recipe(log, arguments(clips, whole, **umt), world=2) == [0, 0], log.read_text()
    resumed = arguments(clips, parts, **umt, resume="auto")
    assert -signal.SIGKILL in run_recipe(log, resumed, 8, world=2)
    assert latest(parts) == "step-00000005"
    assert run_recipe(log, resumed, world=2) == [0, 0], log.read_text()
    assert_same_checkpoint(whole, parts)
    report = json.loads((parts / "report.json").read_text())
    assert report == {**json.loads((whole / "report.json").read_text()), **{k: report[k] for k in TIMES}}
    assert report["reranked"]["rerank_top_k"] == 3 and 24 <= report["reranked"]["rerank_pairs"] <= 48
    assert UMTRetrievalModel.from_pretrained(parts / "best").frontend.schedule.method == "tempme"


def test_help_names_every_option() -> None:
    shown = subprocess.run(
        [sys.executable, str(RECIPES / "full_ft_msrvtt.py"), "--help"], capture_output=True, text=True, check=True
    ).stdout
    for name in Options.__dataclass_fields__:
        assert f"--{name.replace('_', '-')}" in shown
    assert "Gradient caching" in shown


def test_defaults_follow_the_data_set_and_the_model() -> None:
    motion = parse([])
    assert (motion.dataset, motion.model, motion.pretrained) == ("motion", "open_clip:tiny", "none")
    assert motion.data_root == Path("runs/motion-data") and motion.output == Path("runs/motion-tempme")
    msrvtt = parse(["--data-root", "x", "--lr", "1e-5", "--method", "tome"])
    assert (msrvtt.dataset, msrvtt.lr, msrvtt.lr_new, msrvtt.freeze) == ("msrvtt", 1e-5, 1e-4, "clip4clip")
    assert (msrvtt.output, msrvtt.train_split, msrvtt.test_split) == (Path("runs/msrvtt-tome"), "train_9k", "test_1k")
    small = parse(["--data_root", "x", "--model", "open_clip:tiny"])
    assert (small.dataset, small.pretrained, small.freeze, small.holdout) == ("msrvtt", "none", "none", 500)
    umt = parse(["--data-root", "x", "--model", "umt:b16", "--pretrained", "b16_25m.pth"])
    assert (umt.lr, umt.epochs, umt.batch_size, umt.weight_decay, umt.beta2) == (2e-5, 10, 256, 0.02, 0.999)
    assert (umt.mode, umt.augment, umt.sampling, umt.freeze) == ("clip", "crop_flip", "segment", "none")
    for dataset in set(USUAL_SPLITS) - {"motion"}:
        options = parse(["--dataset", dataset, "--data-root", "x", "--annotations", "a", "--video-root", "v"])
        assert (options.dataset, options.output) == (dataset, Path(f"runs/{dataset}-tempme"))
        assert (config(options).batch_size, config(options).output) == (128, options.output)


def test_missing_options_are_named() -> None:
    with pytest.raises(ValueError, match="--chunks caches gradients of a contrastive loss alone"):
        parse(["--model", "umt:tiny", "--chunks", "2"])
    with pytest.raises(ValueError, match="--dataset jsonl needs --annotations FILE and --video-root FOLDER"):
        parse(["--dataset", "jsonl", "--video-root", "v"])
    with pytest.raises(ValueError, match="--dataset msvd needs --data-root"):
        parse(["--dataset", "msvd"])
    with pytest.raises(ValueError, match=r"unknown data set 'nothing'; expected one of .*msrvtt"):
        parse(["--dataset", "nothing"])


def read(options: Options) -> Any:
    names = SplitNames(options.train_split, options.val_split, options.test_split, options.holdout)
    return source(options).read_all(names, options.seed)


def test_jsonl_splits(tmp_path: Path) -> None:
    file = tmp_path / "clips.jsonl"
    given = ["--dataset", "jsonl", "--annotations", str(file), "--video-root", str(tmp_path)]

    def write(*splits: dict[str, str]) -> None:
        entries = [{"file": f"{i}.mp4", "caption": f"clip {i}", **split} for i, split in enumerate(splits)]
        file.write_text("".join(json.dumps(entry) + "\n" for entry in entries))

    write({}, {}, {})
    train_split, val, test = read(parse(given))
    assert (len(train_split.clips), val, test.name) == (3, None, "clips/all")
    train_split, val, test = read(parse([*given, "--holdout", "1"]))
    assert val is not None
    assert (len(train_split.clips), len(val.clips)) == (2, 1)
    write(*({"split": name} for name in ("train", "train", "val", "test", "test", "test")))
    train_split, val, test = read(parse(given))
    assert val is not None
    assert (len(train_split.clips), len(val.clips), len(test.clips)) == (2, 1, 3)
