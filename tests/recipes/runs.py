"""What the recipes are tested on, and their runs. Functions named `train...` run in processes of their own."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from training.processes import RECIPES, exit_codes, start

from tempme_vl.command_line import Command
from tempme_vl.data import motion
from tempme_vl.data.datasets import load_questions
from tempme_vl.data.motion import render_motion
from tempme_vl.recipes.options.pretraining import PRETRAINING
from tempme_vl.recipes.options.retrieval import PEFT, RETRIEVAL
from tempme_vl.recipes.options.videollm import VIDEOLLM
from tempme_vl.recipes.options.videoqa import VIDEOQA
from tempme_vl.tasks.qa import load_qa_model
from tempme_vl.tasks.retrieval import load_retrieval_model
from tempme_vl.tasks.videollm import load_video_llm
from tempme_vl.training.engine import Trainer

NUM_TEST = 8
COMMANDS: dict[str, Command[Any]] = {
    command.name: command for command in (RETRIEVAL, PEFT, VIDEOQA, VIDEOLLM, PRETRAINING)
}
UMT = {"model": "umt:tiny", "mode": "per_frame", "deepspeed_config": RECIPES / "ds" / "zero2.json"}


@dataclass(frozen=True)
class Case:
    """A recipe with options that make 6 steps an epoch of the rendered videos.

    Attributes:
        recipe: the command's name.
        load: reads the exported model.
        report: some of what report.json holds in the end.
        options: of every run; None for one that the recipe does not have.
        selecting: how the best epoch is chosen on videos held out; `not_selecting`: how on none.
        two_ranks: how two ranks are run.
    """

    recipe: str
    load: Callable[[Path], nn.Module]
    report: dict[str, Any]
    options: dict[str, Any]
    selecting: dict[str, Any] = field(default_factory=dict)
    not_selecting: dict[str, Any] = field(default_factory=dict)
    two_ranks: dict[str, Any] = field(default_factory=dict)

    def arguments(self, data: Path, output: Path, select: bool = True, **options: Any) -> list[str]:
        """The command line of a run on what `make_data` wrote."""
        places = {key: data / value for key, value in PLACES.items()}
        chosen = {
            "model": "open_clip:tiny",
            "output": output,
            "batch_size": 8,
            "epochs": 2,
            "save_every": 5,
            "decode_timeout": None,
            **self.options,
            **(self.selecting if select else self.not_selecting),
            **options,
        }
        chosen = {name: places.get(value, value) for name, value in chosen.items() if value is not None}
        return [part for name, value in chosen.items() for part in (f"--{name.replace('_', '-')}", str(value))]

    def run(self, log: Path, parts: list[str], *args: Any, world: int = 1) -> list[int | None]:
        """Exit codes of `train` on each rank."""
        return exit_codes(start(train, self.recipe, parts, *args, log=log, world=world))


PLACES = {"ROOT": "motion", "VIDEOS": "motion/videos", "SPLITS": "splits.jsonl", "ONE SPLIT": "train.jsonl"}
OWN_QUESTIONS = {"dataset": "jsonl", "video_root": "VIDEOS"}
CASES = {
    "retrieval": Case(
        "train retrieval",
        load_retrieval_model,
        {
            "split": "msrvtt/test_1k",
            "selected_on": "msrvtt/train_9k, 6 held out, seed 0",
            "videos": NUM_TEST,
            "broken_videos": {},
            "method": "tempme",
        },
        {"dataset": "msrvtt", "data_root": "ROOT"},
        {"holdout": 6},
        {"holdout": 0},
    ),
    "umt": Case(
        "train retrieval",
        load_retrieval_model,
        {"split": "msrvtt/test_1k", "videos": NUM_TEST, "broken_videos": {}, "method": "tempme"},
        {"dataset": "msrvtt", "data_root": "ROOT", **UMT, "rerank": 3},
        {"holdout": 6},
        {"holdout": 0},
    ),
    "lora": Case(
        "train peft",
        load_retrieval_model,
        {"split": "msrvtt/test_1k", "videos": NUM_TEST, "broken_videos": {}, "method": "tempme"},
        {"dataset": "msrvtt", "data_root": "ROOT"},
        {"holdout": 6},
        {"holdout": 0},
        {"deepspeed_config": RECIPES / "ds" / "zero2.json"},
    ),
    "classifier": Case(
        "train videoqa",
        load_qa_model,
        {
            "split": "splits/test",
            "selected_on": "splits/val",
            "total": NUM_TEST,
            "missing": 0,
            "broken_videos": {},
            "head": "classifier",
            "method": "tempme",
        },
        {**OWN_QUESTIONS, "head": "classifier"},
        {"annotations": "SPLITS"},
        {"annotations": "ONE SPLIT"},
    ),
    "decoder": Case(
        "train videoqa",
        load_qa_model,
        {"split": "splits/test", "selected_on": "splits/val", "total": NUM_TEST, "missing": 0, "head": "decoder"},
        {**OWN_QUESTIONS, "head": "decoder"},
        {"annotations": "SPLITS"},
        {"annotations": "ONE SPLIT"},
        UMT,
    ),
    "videollm": Case(
        "train videollm",
        load_video_llm,
        {
            "split": "splits/test",
            "selected_on": "splits/val",
            "match": "normalized",
            "total": NUM_TEST,
            "broken_videos": {},
            "host": "tiny:VideoLlava",
            "method": "tempme",
        },
        {**OWN_QUESTIONS, "model": None, "host": "tiny:VideoLlava"},
        {"annotations": "SPLITS"},
        {"annotations": "ONE SPLIT"},
    ),
}


def make_data(folder: Path) -> Path:
    """MSRVTT's layout with 54 training and 8 test videos; files of one question a video, and `folder` itself."""
    root = render_motion(
        folder / "motion", num_train=54, num_test=NUM_TEST, num_order_train=0, num_order_val=0, num_order_test=0
    )
    lines = {name: questions_of(root, name) for name in ("train", "val", "test")}
    write_lines(folder / "splits.jsonl", [line for part in lines.values() for line in part])
    write_lines(folder / "train.jsonl", [{k: v for k, v in line.items() if k != "split"} for line in lines["train"]])
    return folder


def questions_of(root: Path, split: str) -> list[dict[str, Any]]:
    """The first question about each video, which way it moves, as lines of a JSON-lines file."""
    firsts = {question.video: question for question in reversed(load_questions("msrvtt_qa", root, split).questions)}
    return [
        {"file": video.path.name, "question": q.question, "answer": q.answers[0], "id": q.question_id, "split": split}
        for video, q in reversed(firsts.items())
    ]


def write_lines(path: Path, lines: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def latest(output: Path) -> str:
    """The last checkpoint of a run."""
    return (output / "checkpoints" / "latest").read_text()


def losses(output: Path) -> list[tuple[int, float]]:
    """Steps of a run with their losses."""
    lines = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    return [(line["step"], line["loss"]) for line in lines if "loss" in line]


def assert_same_checkpoint(left: Path, right: Path) -> None:
    """Weights, optimizer and random states of all ranks, bit for bit."""
    assert latest(left) == latest(right)
    folders = [output / "checkpoints" / latest(output) for output in (left, right)]
    names = [sorted(path.name for path in folder.glob("*.safetensors")) for folder in folders]
    assert names[0] == names[1]
    compared = 0
    for name in names[0]:
        first, second = (load_file(folder / name) for folder in folders)
        assert first.keys() == second.keys()
        for key in first:
            assert torch.equal(first[key], second[key]), key
        compared += len(first)
    assert compared > 100


def start_recipe(command: Command[Any], arguments: list[str]) -> None:
    command.load()(command.parse(arguments))


def train(recipe: str, arguments: list[str], die_at: int | None = None, number: int = signal.SIGKILL) -> None:
    """A recipe's command line; the first rank sends itself a signal in the update after step `die_at`."""
    update = Trainer.update

    def deadly(self: Trainer, *args: Any) -> float:
        if self.step == die_at and int(os.environ["RANK"]) == 0:
            os.kill(os.getpid(), number)
        return update(self, *args)

    Trainer.update = deadly
    start_recipe(COMMANDS[recipe], arguments)


def train_on_rendered(arguments: list[str]) -> None:
    """The video QA recipe on the embedded data set as --data-root holds it, whatever its size."""
    motion.render_motion = lambda root: root
    start_recipe(VIDEOQA, arguments)


def train_on_nan(recipe: str, arguments: list[str], bad_step: int) -> None:
    """A recipe with a loss that is NaN at a step."""
    update = Trainer.update

    def broken(self: Trainer, batch: Any, loss_fn: Callable[..., Tensor]) -> float:
        def loss(*args: Any) -> Tensor:
            return loss_fn(*args) * (float("nan") if self.step == bad_step else 1.0)

        return update(self, batch, loss)

    Trainer.update = broken
    start_recipe(COMMANDS[recipe], arguments)
