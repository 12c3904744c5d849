"""The video QA recipe: its defaults, what it needs, options to choose among, the answers and the report it writes."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import metadata_load
from recipes.runs import CASES, questions_of, train_on_rendered, write_lines
from training.processes import RECIPES, exit_codes, start

from tempme_vl.data.datasets import load_questions
from tempme_vl.data.motion import question_kind
from tempme_vl.data.splits import Video
from tempme_vl.data.videoqa import QASplit, Question, answer_vocabulary
from tempme_vl.evaluation.videoqa import accuracy, accuracy_by, format_accuracy
from tempme_vl.recipes.options.presets import ANY, PRESETS
from tempme_vl.recipes.options.videoqa import VIDEOQA
from tempme_vl.recipes.videoqa import build_model, describe
from tempme_vl.tasks.qa import ClassifierHead, DecoderHead, load_qa_model

parse = VIDEOQA.parse
VIDEO = Video("v", Path("v"))
TRAIN = QASplit(
    "toy/train",
    (
        Question("1", VIDEO, "which way does it move", ("left",)),
        Question("2", VIDEO, "what color is it", ("red", "dark-red")),
        Question("3", VIDEO, "what color is it", ("red",)),
    ),
)


def test_defaults_follow_the_data_set_and_the_model() -> None:
    motion = parse([])
    assert (motion.dataset, motion.model, motion.pretrained, motion.head) == (
        "motion",
        "open_clip:tiny",
        "none",
        "classifier",
    )
    assert motion.data_root == Path("runs/motion-data") and motion.output == Path("runs/motion-classifier-tempme")
    assert (motion.decode_timeout, motion.augment, motion.sampling) == (None, "none", "uniform")
    assert motion.vocabulary is None and motion.deepspeed_config == Path("zero1")
    small = parse(["--data_root", "x", "--model", "umt:tiny", "--head", "decoder", "--method", "tome"])
    assert (small.dataset, small.model, small.pretrained) == ("msrvtt_qa", "umt:tiny", "none")
    assert (small.output, small.data_root) == (Path("runs/msrvtt_qa-decoder-tome"), Path("x"))
    writer = parse(["--head", "llm", "--llm", "x"])
    assert (writer.max_words, writer.answer_words, writer.text_pretrained) == (64, 8, None)
    vit = parse(["--data-root", "x", "--model", "open_clip:ViT-B-16-quickgelu", "--lr", "1e-6"])
    assert vit.text_pretrained == vit.vocabulary == "bert-base-uncased"
    assert (vit.head, vit.pretrained, vit.vocabulary, vit.lr) == ("classifier", "openai", "bert-base-uncased", 1e-6)
    assert vit.num_frames == 12
    umt = parse(["--data-root", "x", "--model", "umt:b16", "--pretrained", "b16_25m.pth"])
    assert (umt.lr, umt.epochs, umt.batch_size, umt.weight_decay, umt.beta2) == (2e-5, 8, 256, 0.02, 0.999)
    assert (umt.mode, umt.augment, umt.sampling, umt.head) == ("per_frame", "crop_flip", "segment", "decoder")
    assert (umt.output, umt.pretrained) == (Path("runs/msrvtt_qa-decoder-tempme"), "b16_25m.pth")
    assert parse(["--data-root", "x", "--model", "umt:b16", "--head", "classifier"]).output.name == (
        "msrvtt_qa-classifier-tempme"
    )
    large = parse(["--data-root", "x", "--model", "umt:l16"])
    assert (large.vocabulary, large.head) == ("bert-large-uncased", "decoder")
    for dataset in ("msrvtt_qa", "msvd_qa", "activitynet_qa", "jsonl"):
        options = parse(["--dataset", dataset, "--data-root", "x", "--annotations", "a", "--video-root", "v"])
        assert (options.dataset, options.output) == (dataset, Path(f"runs/{dataset}-classifier-tempme"))
        assert (options.batch_size, options.output) == (128, options.output)
    for model in set(PRESETS["videoqa"]) - {ANY}:
        assert parse(["--dataset", "motion", "--model", model]).model == model


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["--dataset", "nothing"], "'nothing'"),
        (["--head", "something"], "'something'"),
        (["--rule", "guess"], "'guess'"),
        (["--no-such-option", "1"], "--no-such-option"),
    ],
)
def test_unknown_names_are_refused(given: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parse(given)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["--dataset", "jsonl", "--video-root", "v"], "--dataset jsonl needs --annotations FILE and --video-root FOLD"),
        (["--dataset", "msrvtt_qa", "--data-root", "nowhere"], "nowhere"),
    ],
)
def test_missing_options_are_named(given: list[str], message: str, tmp_path: Path) -> None:
    log = tmp_path / "log"
    assert CASES["classifier"].run(log, [*given, "--output", str(tmp_path / "run")]) == [1]
    assert f"ValueError: {message}" in log.read_text() or message in log.read_text().splitlines()[-1]
    assert not (tmp_path / "run").exists()


def test_options_that_only_some_questions_have_are_refused_before_training(data: Path, tmp_path: Path) -> None:
    plain = {split: questions_of(data / "motion", split) for split in ("train", "test")}
    choice = {split: [{**line, "options": ["left", "right", "up", "down"]} for line in plain[split]] for split in plain}
    for number, (test, message) in enumerate(
        (
            (plain["test"], "mine/train teaches to choose among options; the questions of mine/test have none"),
            ([*plain["test"][:2], *choice["test"][2:]], "mine/test: 2 questions have no options, others do"),
        )
    ):
        file, log = write_lines(tmp_path / "mine.jsonl", [*choice["train"], *test]), tmp_path / f"{number}.log"
        arguments = CASES["classifier"].arguments(data, tmp_path / "run", annotations=file)
        assert CASES["classifier"].run(log, arguments) == [1]
        assert f"ValueError: {message}" in log.read_text() and not (tmp_path / "run").exists()


# ---- what is built


def built(answers: tuple[str, ...] = (), **options: Any) -> Any:
    torch.manual_seed(0)
    return build_model(replace(parse([]), **options), TRAIN, answers)


def test_a_model_knows_the_words_of_the_training_split_and_its_answers() -> None:
    answers = answer_vocabulary(TRAIN)
    model = built(answers, num_frames=8, max_words=7, sampling="fps1")
    assert isinstance(model.head, ClassifierHead) and model.answers == answers == ("red", "dark-red", "left")
    words = {"which", "way", "does", "it", "move", "what", "color", "is", "left", "red", "dark"}
    assert set(model.head.questions.vocabulary[5:]) == words
    assert model.input.sampling == "fps1" and model.frontend.schedule.frames == 8
    assert model.tokenize("what color is it")["question_ids"].shape == (7,)
    decoder = built(answers, head="decoder", answer_words=4, candidates=2, rule="umt").head
    assert isinstance(decoder, DecoderHead)
    assert (decoder.rule, decoder.candidates, decoder.answer_words) == ("umt", 2, 4)
    assert built(answers, head="decoder").head.rule == "likelihood"
    assert built((), head="decoder").head.rule == "generate"
    assert built(answers, model="umt:tiny", mode="per_frame").frontend.config.family == "umt"


def test_words_from_a_folder(tmp_path: Path) -> None:
    (tmp_path / "vocab.txt").write_text("[PAD]\n[UNK]\n[CLS]\n[SEP]\n[MASK]\nred\n")
    assert built(("red",), vocabulary=str(tmp_path)).head.questions.vocabulary[5:] == ("red",)


def test_data_are_described_with_the_ceiling_of_the_answers() -> None:
    said = describe(TRAIN, None, replace(TRAIN, name="toy/test"), ("red",))
    assert said.splitlines() == [
        "train: 3 questions",
        "test: 3 questions",
        "1 answers of the training split, which hold an answer to 66.67 % of toy/test",
    ]
    assert describe(TRAIN, TRAIN, TRAIN, ()).splitlines() == [
        f"{name}: 3 questions" for name in ("train", "val", "test")
    ]


# ---- runs


def run_recipe(data: Path, output: Path, world: int = 1, head: str = "classifier", **options: Any) -> dict[str, Any]:
    """The report of a short run."""
    case, log = CASES[head], output.with_suffix(".log")
    arguments = case.arguments(data, output, select=False, **options)
    assert case.run(log, arguments, world=world) == [0] * world, log.read_text()
    return json.loads((output / "report.json").read_text())


@pytest.mark.parametrize(
    ("head", "world", "stage"),
    [("classifier", 1, "zero1"), pytest.param("decoder", 2, "zero3", marks=pytest.mark.slow)],
)
def test_choosing_among_options(head: str, world: int, stage: str, data: Path, tmp_path: Path) -> None:
    """Two to four options a question, different ones; the answers need not be a list for that."""
    lines = []
    for split, count in (("train", 16), ("val", 5), ("test", 8)):
        for number, line in enumerate(questions_of(data / "motion", split)[:count]):
            others = [way for way in ("left", "right", "up", "down") if way != line["answer"]]
            lines.append({**line, "options": [*others[: 1 + number % 3], line["answer"]]})
    file = write_lines(tmp_path / "choices.jsonl", lines)
    options = {"annotations": file, "epochs": 1, "deepspeed_config": RECIPES / "ds" / f"{stage}.json"}
    report = run_recipe(data, tmp_path / "run", world, head, **options)
    assert (report["split"], report["selected_on"]) == ("choices/test", "choices/val")
    assert (report["total"], report["missing"], report["ranks"], report["head"]) == (8, 0, world, head)
    assert report["vocabulary_size"] is None and report["ceiling"] is None
    said = json.loads((tmp_path / "run" / "predictions.json").read_text())
    asked = {line["id"]: line for line in lines if line["split"] == "test"}
    assert said.keys() == asked.keys() and all(said[i] in line["options"] for i, line in asked.items())
    assert report["correct"] == sum(said[i] == line["answer"] for i, line in asked.items())
    model = load_qa_model(tmp_path / "run" / "best")
    assert model.answers == () and model.head.name == head


def test_report_holds_what_the_predictions_are_worth_and_what_made_them(data: Path, tmp_path: Path) -> None:
    """On the embedded data set, where questions have kinds; the decoder writes freely."""
    output, log, root = tmp_path / "run", tmp_path / "log", data / "motion"
    options = {"dataset": "motion", "data_root": "ROOT", "frame_cache": "memory", "batch_size": 48, "epochs": 1}
    options |= {"rule": "generate", "num_answers": 3, "seed": 4}
    arguments = CASES["decoder"].arguments(data, output, select=False, **options)
    assert exit_codes(start(train_on_rendered, arguments, log=log)) == [0], log.read_text()
    report = json.loads((output / "report.json").read_text())
    said = json.loads((output / "predictions.json").read_text())
    split = replace(load_questions("msrvtt_qa", root, "test"), name="motion/test")
    answers = answer_vocabulary(load_questions("msrvtt_qa", root, "train"), 3)
    expected = accuracy(said, split, answers)
    assert {key: report[key] for key in expected} == expected
    assert report["vocabulary_size"] == 3 and report["missing"] == 24 - len(said)
    by_kind = accuracy_by(said, split, question_kind)
    assert report["by_kind"] == {kind: list(values) for kind, values in by_kind.items()}
    assert by_kind.keys() == {"direction", "color", "shape", "background"}
    assert (report["selected_on"], report["selected_step"]) == ("motion/val", 3)
    assert (report["head"], report["method"], report["model"]) == ("decoder", "tempme", "open_clip:tiny")
    assert (report["seed"], report["ranks"], report["train_steps"]) == (4, 1, 3)
    assert report["output_tokens"] < report["input_tokens"] == 8 * 17 and report["gflops"] > 0
    assert report["train_seconds"] > 0 and report["broken_videos"] == {}
    assert json.loads((output / "options.json").read_text())["num_answers"] == 3
    card = metadata_load(output / "best" / "README.md")
    (result,) = card["model-index"][0]["results"]
    assert card["datasets"] == ["motion"] and result["dataset"]["split"] == "motion/test"
    assert [(one["type"], one["value"]) for one in result["metrics"]] == [("accuracy", round(report["accuracy"], 4))]
    assert "| tuning | full |" in (output / "best" / "README.md").read_text()
    assert load_qa_model(output / "best").head.name == "decoder"
    shown = log.read_text()
    assert "3 answers of the training split, which hold an answer to " in shown
    assert "best epoch chosen on motion/val" in shown and format_accuracy(report) in shown
    for kind, (percent, count) in by_kind.items():
        assert f"{kind:<10}{count:>10}{percent:>12.2f}" in shown
    lines = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "val_accuracy" in line] == [3]
