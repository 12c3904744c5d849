"""A run is continued with the options that decide its result, and with no others."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from recipes.runs import CASES, COMMANDS, latest, write_lines

from tempme_vl.data.splits import RetrievalSplit, Video
from tempme_vl.data.videoqa import QASplit, Question
from tempme_vl.recipes.start import LATER, MAY_CHANGE, content, facts


def test_other_options_are_refused_and_what_may_change_goes_on(data: Path, tmp_path: Path) -> None:
    case, output, log = CASES["classifier"], tmp_path / "run", tmp_path / "log"
    first = {"epochs": 1, "batch_size": 24, "workers": 0, "max_steps": 1}
    assert case.run(log, case.arguments(data, output, **first)) == [0], log.read_text()
    before = (output / "options.json").read_bytes()

    other = {"method": "tome", "lr": 1e-5, "augment": "randaugment", "num_answers": 3}
    changed = {**first, "resume": "auto", **other}
    assert case.run(log, case.arguments(data, output, **changed)) == [1]
    said = log.read_text()
    for difference in (
        "method tempme, now tome",
        "lr 0.001, now 1e-05",
        "augment none, now randaugment",
        "num_answers 1500, now 3",
        "model_config.schedule.method tempme, now tome",
    ):
        assert difference in said
    assert (output / "options.json").read_bytes() == before

    lines = [json.loads(line) for line in (data / "splits.jsonl").read_text().splitlines()]
    lines[0]["question"] += " now"
    edited = write_lines(tmp_path / "edited.jsonl", lines)
    arguments = case.arguments(data, output, **{**first, "resume": "auto", "annotations": edited})
    assert case.run(log, arguments) == [1]
    assert "annotations.train " in log.read_text().replace(said, "")

    moved = tmp_path / "elsewhere"
    shutil.copytree(data / "motion" / "videos", moved / "videos")
    copied = shutil.copy(data / "splits.jsonl", moved / "splits.jsonl")
    goes_on = {"resume": "auto", "annotations": copied, "video_root": moved / "videos", "workers": 1, "max_steps": 2}
    assert case.run(log, case.arguments(data, output, **{**first, **goes_on})) == [0], log.read_text()
    assert latest(output) == "step-00000002"


@pytest.mark.parametrize("recipe", COMMANDS)
def test_an_option_is_compared_unless_it_is_listed(recipe: str) -> None:
    options = COMMANDS[recipe].parse([])
    names = set(type(options).__dataclass_fields__)
    # what the engine compares itself
    engine = {"chunks", "epochs", "batch_size", "warmup", "lr_floor", "schedule", "clip_grad", "seed"}
    compared = set(facts(options, {})) - {"model_config", "annotations"}
    assert compared | MAY_CHANGE | engine >= names - set(LATER)
    # runs from before such an option was there go on; a value that changes something is compared
    assert not [name for name in compared & set(LATER) if getattr(options, name) == LATER[name]]
    assert facts(replace(options, method_options=("a=1",)), {})["method_options"]
    assert not compared & MAY_CHANGE
    assert {"method", "r", "merge_layers", "lr", "lr_new", "weight_decay", "optimizer", "augment"} <= compared
    assert {name for command in COMMANDS.values() for name in vars(command.parse([]))} >= MAY_CHANGE


def test_the_content_of_a_split_counts_and_not_where_it_lies() -> None:
    split = RetrievalSplit("a", (Video("x", Path("/here/x.mp4"), 0.0, 2.0),), (("a caption",),))
    moved = replace(split, videos=(Video("x", Path("/there/x.mp4"), 0.0, 2.0),))
    assert content(moved) == content(split)
    others = (
        replace(split, captions=(("another caption",),)),
        replace(split, captions=(("a caption", "a caption"),)),
        replace(split, videos=(Video("x", Path("/here/x.mp4"), 0.0, 3.0),)),
        replace(split, videos=(Video("x", Path("/here/y.mp4"), 0.0, 2.0),)),
        replace(split, videos=(Video("y", Path("/here/x.mp4"), 0.0, 2.0),)),
    )
    assert len({content(other) for other in (split, *others)}) == 6


def test_annotations_have_the_hash_that_checkpoints_recorded_before_their_fields_were_renamed() -> None:
    videos = Video("a", Path("/x/a.mp4"), 1.0, 2.5), Video("b", Path("b.mp4"))
    asked = Question("1", videos[0], "what", ("x", "y")), Question("2", videos[1], "who", ("x",), ("x", "z"))
    captions = RetrievalSplit("d/train", videos, (("one", "two"), ("three",)), 12, 8)
    assert content(captions) == "8e446da61bfca9c3"
    assert content(QASplit("q/train", asked, "note")) == "a2c22df20d490761"


def test_a_mode_has_the_name_that_checkpoints_recorded_before() -> None:
    parse = COMMANDS["train retrieval"].parse
    recorded = [facts(parse(["--model", "umt:tiny", *given]), {})["mode"] for given in ([], ["--mode", "clip"])]
    assert recorded == ["clip", "clip"]
    assert facts(parse(["--model", "umt:tiny", "--mode", "joint"]), {})["mode"] == "joint"
