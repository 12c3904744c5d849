"""A data set from outside of the package, as docs/add_a_dataset.md adds it: a file and a line.

Run as a program, this file writes docs/datasets.md.
"""

from __future__ import annotations

import csv
import importlib
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import tempme_vl
from tempme_vl.cli import COMMANDS
from tempme_vl.data.dataset import DataSet, Place, SplitNames, Texts
from tempme_vl.data.datasets import ASKED, CAPTIONED, Source, overview
from tempme_vl.data.drawing import COLORS
from tempme_vl.data.motion import DIRECTIONS, MoveVideo, Thing, render_frames
from tempme_vl.data.rendered import write_video
from tempme_vl.data.splits import Video, make_split

DOCS = Path(__file__).parents[2] / "docs"
SPLITS = {"train": 20, "val": 4, "test": 6}


def add(folder: Path) -> None:
    """The page's file, and its line."""
    ((name, text),) = re.findall(r"```python\n# (\w+)\.py\n(.*?)```", (DOCS / "add_a_dataset.md").read_text(), re.S)
    (folder / f"{name}.py").write_text(text)
    tempme_vl.DATASETS.register(name, importlib.import_module(name).DATASET)


@pytest.fixture
def toy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.syspath_prepend(tmp_path)
    add(tmp_path)
    yield
    tempme_vl.DATASETS.unregister("toy")
    del sys.modules["toy"]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """toy.csv and its videos."""
    folder = tmp_path_factory.mktemp("toy")
    (folder / "videos").mkdir()
    rows = []
    for split, count in SPLITS.items():
        for i in range(count):
            color, direction = list(COLORS)[i % len(COLORS)], list(DIRECTIONS)[i // len(COLORS)]
            video = MoveVideo(Thing(color, "ring", 0.0, 0.0, 12.0), direction, 15.0, "black")
            write_video(folder / "videos" / f"{split}{i}.mp4", render_frames(video))
            caption = f"a {color} ring moves {direction}"
            rows.append([f"{split}{i}", split, caption, "what color is it", color])
    with (folder / "toy.csv").open("w", newline="") as file:
        csv.writer(file).writerows([["video", "split", "caption", "question", "answer"], *rows])
    return folder


@pytest.mark.usefixtures("toy")
def test_its_captions_and_questions_are_read(root: Path) -> None:
    source = Source("toy", root)
    for splits in (source.all_captions(), source.all_questions()):
        assert [split and (split.name, len(split.videos)) for split in splits] == [
            (f"toy/{name}", count) for name, count in SPLITS.items()
        ]
    test = source.captions("testing")
    assert test == source.captions() and (test.max_words, test.num_frames) == (12, 8)
    assert test.videos[0] == Video("test0", root / "videos" / "test0.mp4")
    assert test.captions[0] == ("a red ring moves left",)
    question = source.questions("val").questions[1]
    assert (question.question, question.answers, question.video.path.name) == (
        "what color is it",
        ("green",),
        "val1.mp4",
    )


@pytest.mark.usefixtures("toy")
def test_every_command_offers_it_for_what_it_has(capsys: pytest.CaptureFixture[str]) -> None:
    captions = DataSet(title="without questions", files="none", captions=Texts(lambda place, split: None))
    tempme_vl.DATASETS.register("no_questions", captions)
    try:
        for name, questions in (
            ("train retrieval", False),
            ("train peft", False),
            ("eval retrieval", False),
            ("train videoqa", True),
            ("train videollm", True),
            ("eval videoqa", True),
        ):
            command = next(command for command in COMMANDS if command.name == name)
            with pytest.raises(SystemExit):
                command.parse(["--help"])
            (choices,) = re.findall(r"--dataset \{(.*?)\}", re.sub(r"\n\s+", "", capsys.readouterr().out))
            assert choices.split(",") == list(ASKED if questions else CAPTIONED)
            assert "toy" in choices.split(",") and ("no_questions" in choices) == (not questions)
        assert "| `toy` | a toy | toy.csv | train / val / test | train / val / test | 12 | 8 |" in overview()
        with pytest.raises(ValueError, match="the data set 'no_questions' has no questions; expected one of motion"):
            Source("no_questions", Path()).questions()
    finally:
        tempme_vl.DATASETS.unregister("no_questions")


@pytest.mark.usefixtures("toy")
def test_commands_know_it_of_an_installed_package(tmp_path: Path) -> None:
    info = tmp_path / "of_others-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: of-others\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[tempme_vl.datasets]\ntoy = toy:DATASET\nbad = no_such_module:DATASET\n")
    path = os.pathsep.join([str(tmp_path), str(DOCS.parent)])

    def ask(*arguments: str) -> str:
        command = [sys.executable, "-m", "tempme_vl.cli", "train", "videoqa", *arguments]
        done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": path})
        return re.sub(r"\s+", "", done.stdout + done.stderr)

    assert "jsonl,toy,bad}" in ask("--help")  # one that cannot be imported spoils no other
    assert "datasetbad'ofof-others(no_such_module:DATASET)cannotbeimported" in ask("--dataset", "bad").replace(
        "'bad", "bad"
    )


def train_and_evaluate(folder: Path, root: Path, output: Path, steps: int) -> dict[str, Any]:
    """The retrieval recipe up to a step, goes on where it was; in the end what eval retrieval says of its export."""
    sys.path.insert(0, str(folder))
    add(folder)
    commands = {command.name: command for command in COMMANDS}
    shared = ["--dataset", "toy", "--data-root", str(root), "--workers", "0", "--decode-timeout", "None"]
    train = ["--model", "open_clip:tiny", "--output", str(output), "--batch-size", "4", "--epochs", "2"]
    command = commands["train retrieval"]
    command.load()(command.parse([*shared, *train, "--max-steps", str(steps), "--resume", "auto"]))
    if not (output / "report.json").exists():
        return {}
    command, report = commands["eval retrieval"], output / "evaluated.json"
    command.load()(command.parse([*shared, "--checkpoint", str(output / "best"), "--json", str(report)]))
    return json.loads(report.read_text())


def test_ten_steps_are_resumed_exported_and_evaluated(root: Path, tmp_path: Path) -> None:
    from training.processes import run

    output = tmp_path / "run"
    for part in ("first", "second"):
        (tmp_path / part).mkdir()
    assert run(train_and_evaluate, tmp_path / "first", root, output, 5) == [{}]
    assert (output / "checkpoints" / "latest").read_text() == "step-00000005"
    (evaluated,) = run(train_and_evaluate, tmp_path / "second", root, output, 10)
    lines = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "loss" in line] == list(range(1, 11))
    report = json.loads((output / "report.json").read_text())
    assert (report["split"], report["selected_on"], report["videos"]) == ("toy/test", "toy/val", SPLITS["test"])
    assert {way: evaluated[way] for way in ("t2v", "v2t")} == {way: report[way] for way in ("t2v", "v2t")}
    assert evaluated["num_frames"] == 8


def test_records_that_mean_nothing_are_refused() -> None:
    read: Any = make_split
    with pytest.raises(ValueError, match="mine: a data set has captions, questions or both"):
        DataSet(title="mine", files="")
    with pytest.raises(ValueError, match="mine: only videos with captions can be held out"):
        DataSet(title="mine", files="", questions=Texts(read, usual=SplitNames(holdout=5)))
    with pytest.raises(ValueError, match="mine: a place has no folder"):
        DataSet(title="mine", files="", captions=Texts(read), needs=("folder",))
    assert set(Place.__dataclass_fields__) == {"data_root", "video_root", "annotations"}


def page() -> str:
    """docs/datasets.md."""
    return f"""# Data sets

What `--dataset` knows, of `tempme_vl.DATASETS`; other packages [add theirs](add_a_dataset.md). Captions and questions:
what is trained / chosen / tested on unless one says otherwise (`--train-split`, `--val-split`, `--test-split`,
`--holdout`). Words of a caption and frames of a video are the usual ones. Written by
`python tests/data/test_add_a_dataset.py`.

{overview()}
"""


def test_the_page_is_of_the_records() -> None:
    assert (DOCS / "datasets.md").read_text() == page(), "write it anew: python tests/data/test_add_a_dataset.py"


if __name__ == "__main__":
    (DOCS / "datasets.md").write_text(page())
