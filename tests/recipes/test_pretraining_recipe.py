"""TESTA's pre-training: settings, refusals, a run that is killed and goes on, and what starts from its export."""

from __future__ import annotations

import json
import signal
from pathlib import Path

import pytest
import torch
from PIL import Image
from recipes.runs import Case, assert_same_checkpoint, latest, losses
from recipes.test_recipes import stop_through_launcher
from safetensors import safe_open
from training.processes import RECIPES

from tempme_vl.data.datasets import load_split
from tempme_vl.recipes.options.pretraining import PRETRAINING
from tempme_vl.recipes.pretraining import OF_PICTURES, with_warmup
from tempme_vl.tasks.qa import create_qa_model
from tempme_vl.tasks.qa.blip import BlipDecoderHead
from tempme_vl.tasks.testa import TestaPretrainingModel, create_testa_retrieval_model

PUBLISHED = ["--annotations", "pairs.json", "--model", "testa:b16"]


def test_defaults_are_those_of_its_configuration() -> None:
    own = PRETRAINING.parse(PUBLISHED)
    assert (own.dataset, own.method, own.num_frames, own.sampling, own.augment) == (
        *("pairs", "none", 8, "headtail", "crop_augment"),
    )
    assert (own.lr, own.lr_new, own.lr_floor, own.epochs, own.batch_size) == (5e-6, 5e-6, 0.1, 20, 96)
    assert (own.schedule, own.warmup_steps, own.weight_decay, own.decay) == ("by_epoch", 5000, 0.05, "all")
    assert (own.max_words, own.temporal_scaling, own.precision) == (30, True, "fp32")
    assert own.of_contrast() == {"queue": 57600} and own.vocabulary == "bert-base-uncased"
    tiny = PRETRAINING.parse([])
    assert (tiny.dataset, tiny.model, tiny.train_split) == ("motion", "testa:tiny", "train_9k")
    assert tiny.augment == "none"  # which way things move is what its texts say
    assert OF_PICTURES[own.augment] == "crop_flip_augment"


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["--model", "umt:tiny"], "expected a --model that has pre-training, testa:tiny or testa:b16; got 'umt:tiny'"),
        (["--contrast-options", "queue=0"], "--contrast-options.*queue.*from 1"),
        (["--dataset", "pairs"], "--dataset pairs needs --annotations FILE"),
        (["--dataset", "msvd_qa"], "'msvd_qa' has no captions"),
    ],
)
def test_what_cannot_be_pre_trained_is_refused(given: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        PRETRAINING.parse(given)


def test_steps_of_warm_up_are_a_share_of_all(data: Path) -> None:
    train = load_split("msrvtt", data / "motion", "train_9k")
    assert train.num_captions == 54
    for steps, share in ((0, 0.1), (5, 0.25), (100, 1.0)):
        options = PRETRAINING.parse([f"--warmup-steps={steps}", "--warmup=0.1", "--batch-size=10", "--epochs=4"])
        assert with_warmup(options, train).warmup == share


CASE = Case(
    "train pretraining",
    TestaPretrainingModel.from_pretrained,
    {},
    {
        "model": "testa:tiny",
        "dataset": "pairs",
        "annotations": "ROOT",
        "batch_size": 12,
        "contrast_options": "queue=24",
        "warmup_steps": 2,
        "num_frames": 4,
        "augment": "crop_augment",
        "sampling": "headtail",
    },
)


@pytest.fixture(scope="module")
def pairs(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two files of 42 videos and 6 pictures."""
    folder = tmp_path_factory.mktemp("pairs")
    split = load_split("msrvtt", data / "motion", "train_9k")
    videos = zip(split.videos[:42], split.captions, strict=False)
    entries = [{"path": str(video.path), "caption": texts[0]} for video, texts in videos]
    (folder / "videos.json").write_text(json.dumps(entries))
    for number in range(6):
        Image.new("RGB", (40, 24), (40 * number, 0, 200)).save(folder / f"{number}.png")
    stills = [{"image": f"{number}.png", "caption": f"a red square number {number}"} for number in range(6)]
    (folder / "pictures.json").write_text(json.dumps(stills))
    return folder


@pytest.mark.slow
def test_a_run_that_is_killed_goes_on_bit_for_bit_and_others_start_from_it(
    pairs: Path, data: Path, tmp_path: Path
) -> None:
    log, whole, parts = tmp_path / "log", tmp_path / "whole", tmp_path / "parts"
    assert CASE.run(log, CASE.arguments(data, whole, annotations=pairs)) == [0], log.read_text()
    resumed = CASE.arguments(data, parts, annotations=pairs, resume="auto")
    assert CASE.run(log, resumed, 6) == [-signal.SIGKILL]
    assert latest(parts) == "step-00000005"
    assert CASE.run(log, resumed) == [0], log.read_text()
    assert_same_checkpoint(whole, parts)
    seen = losses(whole)
    assert [step for step, _ in seen] == list(range(1, 9)) and losses(parts)[-3:] == seen[-3:]
    report = json.loads((parts / "report.json").read_text())
    assert (report["method"], report["input_tokens"], report["broken_videos"]) == ("none", 1 + 4 * 16, {})
    with safe_open(parts / "checkpoints" / latest(parts) / "rank-0000-0000.safetensors", "pt") as file:
        names = set(file.keys())
    assert {"buffer/queue.place", "weight/momentum.copies.text_proj.weight"} <= names

    model = CASE.load(parts / "best")
    assert isinstance(model, TestaPretrainingModel) and model.options is None
    given = "testa:tiny", model.vocabulary
    retrieval = create_testa_retrieval_model(*given, str(parts / "best"), "none", 8)
    asked = create_qa_model(*given, "decoder", ("red",), str(parts / "best"), "none", 8)
    assert isinstance(asked.head, BlipDecoderHead)
    word = model.text.embeddings.word_embeddings.weight
    for other in (retrieval.text, asked.head.questions.text, asked.head.decoder):
        assert torch.equal(other.embeddings.word_embeddings.weight, word)


@pytest.mark.slow
def test_two_ranks_stopped_through_the_launcher_resume_bit_for_bit(pairs: Path, data: Path, tmp_path: Path) -> None:
    whole, parts, log = tmp_path / "whole", tmp_path / "parts", tmp_path / "log"
    options = {"annotations": pairs, "epochs": 100, "save_every": 4, "resume": "auto", "workers": 1}
    options["deepspeed_config"] = RECIPES / "ds" / "zero2.json"
    resumed = CASE.arguments(data, parts, **options)
    stopped_at = stop_through_launcher(CASE.recipe, parts, resumed, log)
    assert latest(parts) == f"step-{stopped_at:08d}"
    stop = ["--max-steps", str(stopped_at + 2)]
    assert CASE.run(log, [*resumed, *stop], world=2) == [0, 0], log.read_text()
    assert CASE.run(log, [*CASE.arguments(data, whole, **options), *stop], world=2) == [0, 0]
    assert_same_checkpoint(whole, parts)
    assert losses(whole) == losses(parts)
