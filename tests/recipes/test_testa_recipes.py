"""TESTA in the recipes: settings, refusals, a run that is killed and goes on, ranks, exports and their evaluation."""

from __future__ import annotations

import json
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from recipes.runs import CASES, Case, assert_same_checkpoint, latest, losses, start_recipe
from recipes.test_recipes import stop_through_launcher
from safetensors import safe_open
from training.processes import RECIPES, exit_codes, start

from tempme_vl.evaluation.options import EVAL_RETRIEVAL, EVAL_VIDEOQA
from tempme_vl.recipes.options.retrieval import PEFT, RETRIEVAL
from tempme_vl.recipes.options.videoqa import VIDEOQA
from tempme_vl.recipes.start import facts
from tempme_vl.tasks.qa.blip import BlipDecoderHead
from tempme_vl.tasks.qa.model import VideoQAModel
from tempme_vl.tasks.retrieval import create_retrieval_model
from tempme_vl.tasks.testa import TestaPretrainingModel, TestaRetrievalModel
from tempme_vl.text.tokenizers import word_vocabulary

TESTA = {"model": "testa:tiny", "batch_size": 12, "save_every": 100}  # 4 steps an epoch
RUNS = {
    name: replace(CASES[name], options={**CASES[name].options, **TESTA, **own})
    for name, own in (
        ("retrieval", {"contrast_options": "queue=24", "rerank": 3}),
        ("decoder", {}),
    )
}


def test_defaults_are_those_of_its_configurations() -> None:
    own = RETRIEVAL.parse(["--data-root", "x", "--model", "testa:b16", "--pretrained", "testa.pth"])
    assert (own.method, own.num_frames, own.sampling, own.augment) == ("testa", 32, "uniform", "none")
    assert (own.lr, own.lr_new, own.epochs, own.batch_size, own.weight_decay) == (1e-5, 1e-5, 10, 32, 0.05)
    assert (own.decay, own.beta2, own.warmup, own.clip_grad, own.precision) == ("all", 0.999, 0.0, 0.0, "fp32")
    assert (own.output, own.pretrained, own.contrast_options) == (Path("runs/msrvtt-testa"), "testa.pth", ())
    plain = RETRIEVAL.parse(["--data-root", "x", "--model", "testa:b16", "--method", "none"])
    assert plain == replace(own, method="none", output=Path("runs/msrvtt-none"), pretrained="none")
    assert PEFT.parse(["--data-root", "x", "--model", "testa:b16"]).output.name == "msrvtt-testa-lora"
    asked = VIDEOQA.parse(["--dataset", "activitynet_qa", "--data-root", "x", "--model", "testa:b16"])
    assert (asked.lr, asked.lr_new, asked.epochs, asked.num_frames, asked.max_words) == (2e-5, 2e-5, 10, 32, 35)
    assert (asked.head, asked.candidates, asked.text_pretrained) == ("decoder", 128, None)
    assert asked.output == Path("runs/activitynet_qa-decoder-testa")
    paragraphs = RETRIEVAL.parse(["--model", "testa:tiny", "--max-words", "128"])
    assert (paragraphs.max_words, paragraphs.num_frames, paragraphs.method) == (128, 8, "testa")


def test_what_its_contrast_is_told_is_checked() -> None:
    given = ["--model", "testa:tiny", "--contrast-options"]
    assert RETRIEVAL.parse([*given, "queue=96", "all_ranks=false"]).of_contrast() == {"queue": 96, "all_ranks": False}
    refused = {"queue=0": "queue.*from 1", "distill=2": "distill.*0 to 1", "que=1": "unknown keys 'que'"}
    for value, message in refused.items():
        with pytest.raises(ValueError, match=f"--contrast-options.*{message}"):
            RETRIEVAL.parse([*given, value])
    recorded = facts(RETRIEVAL.parse(["--model", "umt:tiny"]), {})
    assert "contrast_options" not in recorded  # as runs from before it have it
    with pytest.raises(ValueError, match="queue"):
        create_retrieval_model("open_clip:tiny", method="none", queue=8)


def test_long_videos_have_a_tower_and_frames_of_their_own() -> None:
    """Whichever is named: the data set says how many frames and words, the model how it trains."""
    chosen = RETRIEVAL.parse(["--dataset", "events", "--model", "testa:mini"])
    assert (chosen.num_frames, chosen.max_words, chosen.data_root) == (32, 24, Path("runs/events-data"))
    assert (chosen.method, chosen.batch_size, chosen.of_contrast()["queue"]) == ("testa", 24, 24)
    assert RETRIEVAL.parse(["--dataset", "events", "--num-frames", "96"]).num_frames == 96


def test_the_share_of_what_the_copies_say_rises_over_the_first_epoch() -> None:
    words = word_vocabulary(["a dog"])
    model = create_retrieval_model("testa:tiny", None, "none", 2, vocabulary=words, queue=8, distill=0.2)
    assert isinstance(model, TestaRetrievalModel)
    shares = []
    for step in (0, 1, 3, 4, 9):
        model.begin_step(step, 4)
        shares.append(model.distill)
    assert shares == pytest.approx([0, 0.05, 0.15, 0.2, 0.2])
    assert TestaPretrainingModel.ramp_epochs == 2


def evaluate(recipe: str, arguments: list[str]) -> None:
    start_recipe(EVAL_RETRIEVAL if recipe == "train retrieval" else EVAL_VIDEOQA, arguments)


@pytest.mark.parametrize("name", RUNS)
def test_a_run_that_is_killed_goes_on_bit_for_bit_and_its_export_is_evaluated(
    name: str, data: Path, tmp_path: Path
) -> None:
    case, log = RUNS[name], tmp_path / "log"
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert case.run(log, case.arguments(data, whole)) == [0], log.read_text()
    resumed = case.arguments(data, parts, resume="auto")
    assert case.run(log, resumed, 5) == [-signal.SIGKILL]
    assert latest(parts) == "step-00000004"
    assert case.run(log, resumed) == [0], log.read_text()

    assert_same_checkpoint(whole, parts)
    seen = losses(whole)
    assert [step for step, _ in seen] == list(range(1, 9)) and losses(parts)[-4:] == seen[-4:]
    assert seen[-1][1] < 0.8 * seen[0][1]
    report = json.loads((parts / "report.json").read_text())
    assert report["method"] == "testa" and report["output_tokens"] < report["input_tokens"]
    assert_exported(case, name, parts, report)
    assert_evaluated(case, data, parts, report, log)


@pytest.mark.slow
def test_divided_copies_stopped_through_the_launcher_go_on_bit_for_bit(data: Path, tmp_path: Path) -> None:
    """At ZeRO stage 3, every weight in parts: copies and queue come back whole, and divided again."""
    case, log, whole, parts = RUNS["retrieval"], tmp_path / "log", tmp_path / "whole", tmp_path / "parts"
    settings = json.loads((RECIPES / "ds" / "zero3.json").read_text())
    settings["zero_optimization"]["stage3_param_persistence_threshold"] = 0
    (tmp_path / "ds.json").write_text(json.dumps(settings))
    options = {"epochs": 100, "save_every": 4, "resume": "auto", "deepspeed_config": tmp_path / "ds.json"}
    resumed = case.arguments(data, parts, **options)
    stopped_at = stop_through_launcher(case.recipe, parts, resumed, log)
    assert latest(parts) == f"step-{stopped_at:08d}"
    stop = ["--max-steps", str(stopped_at + 2)]
    assert case.run(log, [*resumed, *stop], world=2) == [0, 0], log.read_text()
    assert case.run(log, [*case.arguments(data, whole, **options), *stop], world=2) == [0, 0]
    assert_same_checkpoint(whole, parts)
    assert losses(whole) == losses(parts)


def assert_exported(case: Case, name: str, output: Path, report: dict[str, Any]) -> None:
    model = case.load(output / "best")
    with safe_open(output / "checkpoints" / latest(output) / "rank-0000-0000.safetensors", "pt") as file:
        names = set(file.keys())
    if name == "retrieval":
        assert isinstance(model, TestaRetrievalModel) and model.options is None
        again = report["reranked"]
        assert again["rerank_top_k"] == 3 and 24 <= again["rerank_pairs"] <= 48
        assert {"buffer/queue.ids", "buffer/queue.place", "weight/momentum.copies.text_proj.weight"} <= names
        assert not any(name.startswith("optimizer/") and ".copies." in name for name in names)
    else:
        assert isinstance(model, VideoQAModel) and isinstance(model.head, BlipDecoderHead)


def assert_evaluated(case: Case, data: Path, output: Path, report: dict[str, Any], log: Path) -> None:
    """eval/retrieval.py and eval/videoqa.py say of the export what the recipe said."""
    given = {
        "checkpoint": output / "best",
        "json": output / "again.json",
        "dataset": case.options["dataset"],
        "workers": 0,
        "decode_timeout": None,
    }
    if case.recipe == "train retrieval":
        given |= {"data_root": data / "motion", "rerank": 3}
    else:
        given |= {"annotations": data / "splits.jsonl", "video_root": data / "motion" / "videos", "split": "test"}
    arguments = [part for key, value in given.items() for part in (f"--{key.replace('_', '-')}", str(value))]
    assert exit_codes(start(evaluate, case.recipe, arguments, log=log)) == [0], log.read_text()
    again = json.loads((output / "again.json").read_text())
    compared = ("t2v", "v2t", "reranked") if case.recipe == "train retrieval" else ("accuracy", "total", "missing")
    assert {key: again[key] for key in compared} == {key: report[key] for key in compared}
