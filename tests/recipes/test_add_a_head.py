"""Two heads from outside of the package, as docs/add_a_head.md adds them: each a file and a line."""

from __future__ import annotations

import importlib
import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from recipes.runs import CASES, OWN_QUESTIONS, losses, questions_of, start_recipe, write_lines
from towers import random_video
from training.processes import exit_codes, start

from tempme_vl import HEADS, VideoQA, VideoRetrieval, create_retrieval_model
from tempme_vl.cli import COMMANDS
from tempme_vl.recipes.options.videoqa import VIDEOQA
from tempme_vl.registries import SIMILARITY_HEADS
from tempme_vl.tasks.heads import HeadNames, find_head
from tempme_vl.tasks.qa import create_qa_model, load_qa_model
from tempme_vl.tasks.qa.base import QAHead
from tempme_vl.tasks.retrieval import RetrievalModel
from tempme_vl.text.tokenizers import word_vocabulary

PAGE = Path(__file__).parents[2] / "docs" / "add_a_head.md"
QUESTION = "which way does the object move"
WORDS, ANSWERS = word_vocabulary([QUESTION]), ("left", "right", "up", "down")
MERGING: dict[str, Any] = {"num_frames": 4, "r": 1, "merge_layers": (2, 3), "merge_frames": (2, 2)}
MERGING |= {"cross_percent": 30, "intra_percent": 10}


def add(folder: Path) -> None:
    """The page's files, and its line for each."""
    blocks = re.findall(r"```python\n# (\w+)\.py\n(.*?)```", PAGE.read_text(), re.S)
    assert [name for name, _ in blocks] == ["bag", "nearest"]
    for name, text in blocks:
        (folder / f"{name}.py").write_text(text)
        HEADS.register(name, getattr(importlib.import_module(name), f"{name.title()}Head"))


def with_it(folder: Path, name: str, arguments: list[str]) -> None:
    """A command's process."""
    sys.path.insert(0, str(folder))
    add(folder)
    start_recipe(next(command for command in COMMANDS if command.name == name), arguments)


@pytest.fixture(autouse=True)
def head(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.syspath_prepend(tmp_path)
    add(tmp_path)
    yield
    for name in ("bag", "nearest"):
        HEADS.unregister(name)
        del sys.modules[name]


def test_it_is_created_trained_saved_loaded_and_gone_on_from(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = create_qa_model("open_clip:tiny", WORDS, "bag", ANSWERS, width=8, **MERGING)
    assert model.head.told.width == 8 and model.answers == ANSWERS
    new = {name for name, _ in model.named_parameters() if model.is_new_parameter(name)}
    assert new >= {f"head.{name}" for name, _ in model.head.named_parameters()} != set()
    videos = {"video": random_video(4, 32), "frame_mask": torch.ones(2, 4)}
    pairs = [model.tokenize(QUESTION, answer) for answer in ("right", "none of them")]
    batch = videos | {name: torch.stack([pair[name] for pair in pairs]) for name in pairs[0]} | {"valid": torch.ones(2)}
    loss = model.loss(model(batch), batch)
    loss.backward()
    assert loss.isfinite() and all(p.grad is not None for p in model.head.parameters())
    asked = {name: value[None].expand(2, -1) for name, value in model.tokenizer()(QUESTION).items()}
    model.eval().save_pretrained(tmp_path / "saved")
    with torch.no_grad():
        said, again = model(videos | asked), load_qa_model(tmp_path / "saved").eval()(videos | asked)
    assert said["scores"].shape == (2, 4) and torch.equal(said["scores"], again["scores"])
    second = create_qa_model("open_clip:tiny", WORDS, "bag", ANSWERS, str(tmp_path / "saved"), width=8, **MERGING)
    assert all(torch.equal(value, second.state_dict()[name]) for name, value in model.state_dict().items())


def test_the_recipe_lists_it_and_reads_its_options(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        VIDEOQA.parse(["--head", "bag", "--help"])
    shown = capsys.readouterr().out
    assert "--head {classifier,decoder,llm,bag}" in shown
    assert re.search(r"--max-words INT .*\(default: 20\)", shown.replace("\n", " ")), "its own number"
    options = VIDEOQA.parse(["--head", "bag", "--head-options", "width=16"])
    assert options.of_head() == {"width": 16, "max_words": 20}
    assert VIDEOQA.parse(["--head", "bag", "--max-words", "9"]).of_head() == {"max_words": 9}
    for given, message in (
        ("wdth=16", "head 'bag': unknown keys 'wdth'; expected width, max_words"),
        ("width=0", "head 'bag', 'width': expected a whole number from 1"),
        ("width", "expected NAME=VALUE; got 'width'"),
    ):
        with pytest.raises(ValueError, match=message):
            VIDEOQA.parse(["--head", "bag", "--head-options", given])


@pytest.mark.slow
def test_ten_steps_stopped_and_resumed_then_evaluated_and_asked(data: Path, tmp_path: Path) -> None:
    lines = [*questions_of(data / "motion", "train")[:40], *questions_of(data / "motion", "test")]
    file = write_lines(tmp_path / "questions.jsonl", lines)
    given: dict[str, Any] = {**OWN_QUESTIONS, "annotations": file, "video_root": data / "motion" / "videos"}
    shared = [part for name, value in given.items() for part in (f"--{name.replace('_', '-')}", str(value))]
    run, log = tmp_path / "run", tmp_path / "log"
    training = ["--model", "open_clip:tiny", "--head", "bag", "--head-options", "width=16", "--output", str(run)]
    training += ["--batch-size", "8", "--epochs", "2", "--decode-timeout", "None", "--lr-new", "1e-2", *shared]
    for more in (["--max-steps", "5"], ["--resume", "auto"]):
        assert exit_codes(start(with_it, tmp_path, "train videoqa", [*training, *more], log=log)) == [0], (
            log.read_text()
        )
    assert [step for step, _ in losses(run)] == list(range(1, 11))
    report = json.loads((run / "report.json").read_text())
    assert (report["head"], report["total"], report["missing"], report["train_steps"]) == ("bag", 8, 0, 5)

    again = ["--checkpoint", str(run / "best"), "--annotations", str(file), "--split", "test", "--workers", "0"]
    again += ["--video-root", str(given["video_root"]), "--json", str(tmp_path / "again.json")]
    assert exit_codes(start(with_it, tmp_path, "eval videoqa", again, log=log)) == [0], log.read_text()
    assert json.loads((tmp_path / "again.json").read_text())["accuracy"] == report["accuracy"]

    qa = VideoQA.from_pretrained(run / "best", timeout=None)
    said = json.loads((run / "predictions.json").read_text())
    tests = [line for line in lines if line["split"] == "test"]
    files = [given["video_root"] / line["file"] for line in tests]
    found = qa.best_answers(files, [line["question"] for line in tests], top_k=2)
    assert [best[0].text for best in found] == [said[line["id"]] for line in tests]
    assert all(len(best) == 2 and best[0].score >= best[1].score for best in found)


def test_names_of_heads(tmp_path: Path) -> None:
    assert list(HeadNames("qa")) == ["classifier", "decoder", "llm", "bag"]
    with pytest.raises(ValueError, match="there is a head 'bag' already"):
        HEADS.register("bag", HEADS["bag"])
    HEADS.register("sack", HEADS["bag"])
    with pytest.raises(ValueError, match="the head 'sack' calls itself 'bag'"):
        find_head("sack", "qa")
    HEADS.unregister("sack")
    assert list(HeadNames("retrieval")) == [*SIMILARITY_HEADS, "nearest"]
    with pytest.raises(ValueError, match="'mean' is for another task, and is no head for question answering"):
        find_head("mean", "qa")
    with pytest.raises(ValueError, match="'nothing' is no head for question answering; expected one of class"):
        find_head("nothing", "qa")


@pytest.mark.parametrize("name", ["classifier", "decoder", "llm"])
def test_options_with_names_of_their_own_are_those_of_the_head(name: str) -> None:
    from tempme_vl.tasks.qa.options import NAMED

    head: Any = HEADS[name]
    assert issubclass(head, QAHead) and head.name == name and head.options is NAMED[name]


def test_a_similarity_head_is_saved_loaded_and_compares(data: Path, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = create_retrieval_model("open_clip:tiny", head="nearest", **MERGING).eval()
    files = sorted((data / "motion" / "videos").glob("*.mp4"))[:3]
    texts = ["a red ball", "something moves left then up"]
    scores = VideoRetrieval(model, timeout=None).similarity(texts, files)
    model.save_pretrained(tmp_path / "saved")
    retrieval = VideoRetrieval.from_pretrained(tmp_path / "saved", timeout=None)
    assert isinstance(retrieval.model, RetrievalModel) and retrieval.model.head.name == "nearest"
    assert torch.equal(retrieval.similarity(texts, files), scores) and scores.shape == (2, 3)
    frames = torch.stack([model.frontend.preprocess(file) for file in files])
    with torch.no_grad():
        found = torch.nn.functional.normalize(model.frontend(frames).frames, dim=-1)
        words = retrieval.encode_text(texts)
    torch.testing.assert_close(scores, (found @ words.T).amax(dim=1).T, rtol=0, atol=1e-5)
    with pytest.raises(ValueError, match="the head 'nearest' also compares frame_mask: give texts and videos"):
        retrieval.similarity(words, retrieval.encode_video(files))
    with pytest.raises(ValueError, match="zero-shot answers compare one embedding of a video with one of a text"):
        VideoQA.from_pretrained(tmp_path / "saved", ("left",))


@pytest.mark.slow
@pytest.mark.parametrize("head", ["nearest", *list(SIMILARITY_HEADS)[1:]])
def test_the_retrieval_recipe_trains_resumes_and_evaluates_it(head: str, data: Path, tmp_path: Path) -> None:
    case, run, log = CASES["retrieval"], tmp_path / "run", tmp_path / "log"
    training = [*case.arguments(data, run, resume="auto", epochs=1), "--head", head]
    for more in (["--max-steps", "3"], []):
        ended = exit_codes(start(with_it, tmp_path, "train retrieval", [*training, *more], log=log, world=2))
        assert ended == [0, 0], log.read_text()
    report = json.loads((run / "report.json").read_text())
    assert (report["head"], report["videos"], report["train_steps"]) == (head, 8, 3)
    again = ["--checkpoint", str(run / "best"), "--dataset", "msrvtt", "--data-root", str(data / "motion")]
    again += ["--json", str(tmp_path / "again.json"), "--workers", "0"]
    assert exit_codes(start(with_it, tmp_path, "eval retrieval", again, log=log)) == [0], log.read_text()
    assert json.loads((tmp_path / "again.json").read_text())["t2v"] == pytest.approx(report["t2v"])
