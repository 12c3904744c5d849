"""Question answering on UMT's public checkpoints: which parts they fill, in which forms, and what does not fit."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from safetensors.torch import save_file
from tasks.qa_runs import ANSWERS, FRAMES, OPTIONS, VOCABULARY, make_batch
from torch import Tensor

from tempme_vl import MergeSchedule
from tempme_vl.backbones.umt import to_umt_names
from tempme_vl.tasks.inputs import VideoInput
from tempme_vl.tasks.qa import ClassifierHead, DecoderHead, VideoQAModel
from tempme_vl.tasks.qa.create import create_qa_model
from tempme_vl.tasks.qa.umt import umt_qa_from_state_dict
from tempme_vl.text import BertDecoder, bert_to_umt, decoder_to_umt


def decoder_of(model: VideoQAModel) -> DecoderHead:
    assert isinstance(model.head, DecoderHead)
    return model.head


def public(model: VideoQAModel) -> dict[str, Tensor]:
    """Its weights under the names of UMT's files, in the QA form, the tied projection included."""
    vision, head = to_umt_names(model.frontend.state_dict()), decoder_of(model)
    bert, decoder = bert_to_umt(head.questions.text, head.questions.fusion), head.decoder
    state = {f"vision_encoder.{key}": value for key, value in vision.items() if key.startswith("encoder.")}
    state |= {f"text_encoder.{key}": value for key, value in bert.items()}
    state |= {f"text_decoder.{key}": value for key, value in decoder_to_umt(decoder).items()}
    state["text_decoder.cls.predictions.decoder.weight"] = decoder.embeddings.word_embeddings.weight
    state["text_decoder.cls.predictions.decoder.bias"] = decoder.head.bias
    return {key: value.detach().clone() for key, value in state.items()}


def pretraining(model: VideoQAModel) -> dict[str, Tensor]:
    """The same before fine-tuning: "bert." within the text encoder, which has the language head; no decoder."""
    state = {k.replace("text_encoder.", "text_encoder.bert."): v for k, v in public(model).items()}
    for key in [key for key in state if key.startswith("text_decoder.")]:
        value = state.pop(key)
        if ".cls." in key and not key.endswith("decoder.weight"):
            state[key.replace("text_decoder.", "text_encoder.")] = value
    return state


def create(file: Path, **changes: Any) -> VideoQAModel:
    options: dict[str, Any] = {"vocabulary": VOCABULARY, "method": "none", "num_frames": FRAMES, **changes}
    return create_qa_model("umt:tiny", pretrained=str(file), **options)


def direct(state: dict[str, Tensor]) -> VideoQAModel:
    return umt_qa_from_state_dict(state, 4, 4, 32, "per_frame", MergeSchedule.identity(6, 6, 16, 0), VOCABULARY)


def other_weights(method: str = "none", layers: int = 1) -> VideoQAModel:
    """As a checkpoint would be, no weight as it starts; of the sizes of "umt:tiny"."""
    torch.manual_seed(5)
    options = OPTIONS if method == "tempme" else {}
    model = create_qa_model("umt:tiny", VOCABULARY, method=method, num_frames=FRAMES, **options)
    head = decoder_of(model)
    head.decoder = BertDecoder(head.questions.shape, layers)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    return model.eval()


def test_qa_file_loads_every_part(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    source, batch = other_weights(), make_batch()
    torch.save({"model": public(source)}, tmp_path / "umt.pth")
    with caplog.at_level(logging.INFO, "tempme_vl"):
        made = create(tmp_path / "umt.pth").eval()
    assert "of the qa form, converted to qa" in caplog.text and "0 missing" in caplog.text
    for model in (made, direct(public(source)).eval()):
        head = decoder_of(model)
        assert head.questions.vocabulary == VOCABULARY and not head.questions.proportional
        assert (head.rule, head.answers, model.input) == ("generate", (), VideoInput("segment"))
        assert torch.equal(model(batch)["losses"], source(batch)["losses"])


@pytest.mark.parametrize("name", ["likelihood", "umt", "generate"])
def test_public_weights_rank_a_list(name: Literal["likelihood", "umt", "generate"], tmp_path: Path) -> None:
    """By name with a list, or from a state dict with its head's parts in another: the same answers."""
    source, batch = other_weights(), make_batch()
    torch.save(public(source), tmp_path / "umt.pth")
    made = create(tmp_path / "umt.pth", answers=ANSWERS, rule=name, candidates=4).eval()
    model = direct(public(source))
    head = decoder_of(model)
    again = VideoQAModel(model.frontend, DecoderHead(head.questions, head.decoder, ANSWERS, name, 4), model.input)
    asked = {key: value for key, value in batch.items() if not key.startswith("answer_")}
    prediction = made(asked)["prediction"]
    assert prediction.shape == (4, 4 if name == "generate" else 1)
    assert torch.equal(again.eval()(asked)["prediction"], prediction)


def test_decoders_may_be_deeper_than_the_fusion() -> None:
    source, batch = other_weights(layers=3), make_batch()
    model = direct(public(source)).eval()
    head = decoder_of(model)
    assert len(head.decoder.layers) == 3 and len(head.questions.fusion.layers) == 1
    assert torch.equal(model(batch)["losses"], source(batch)["losses"])


def test_pretraining_file_starts_the_decoder_from_the_fusion(tmp_path: Path) -> None:
    source = other_weights()
    theirs = decoder_of(source)
    save_file(pretraining(source), tmp_path / "umt.safetensors")
    for model in (create(tmp_path / "umt.safetensors"), direct(pretraining(source))):
        head = decoder_of(model)
        decoder, fusion = head.decoder.state_dict(), head.questions.fusion.state_dict()
        assert all(torch.equal(decoder[key], value) for key, value in fusion.items())
        assert all(torch.equal(v, theirs.questions.fusion.state_dict()[key]) for key, v in fusion.items())
        words = "embeddings.word_embeddings.weight"
        assert torch.equal(decoder[words], theirs.questions.text.state_dict()[words])
        assert torch.equal(decoder["head.dense.weight"], theirs.decoder.head.dense.weight)


@pytest.mark.parametrize("form", [public, pretraining])
def test_a_classifier_takes_the_question_encoder(form: Any, tmp_path: Path) -> None:
    """In any form; its MLP is its own, and a public decoder stays behind."""
    source = other_weights()
    torch.save(form(source), tmp_path / "umt.pth")
    model = create(tmp_path / "umt.pth", head="classifier", answers=ANSWERS)
    assert isinstance(model.head, ClassifierHead) and model.head.questions.proportional
    loaded, theirs = model.state_dict(), source.state_dict()
    for key in (key for key in theirs if not key.startswith(("head.decoder.", "frontend.head."))):
        assert torch.equal(loaded[key], theirs[key]), key
    learnt = {key.split(".")[1] for key in loaded if model.is_new_parameter(key)}
    assert learnt == {"classifier"}


def test_vision_file_leaves_the_text_side_at_random(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    source = other_weights("tempme")
    stage1 = {k: v for k, v in to_umt_names(source.frontend.state_dict()).items() if k.startswith("encoder.")}
    torch.save(stage1, tmp_path / "stage1.pth")
    for head in ("decoder", "classifier"):
        caplog.clear()
        with caplog.at_level(logging.INFO, "tempme_vl"):
            model = create(tmp_path / "stage1.pth", method="tempme", head=head, answers=ANSWERS, **OPTIONS)
        assert "text_encoder.*" in caplog.text and "text_decoder.bert.*" in caplog.text
        loaded, theirs = model.state_dict(), source.state_dict()
        same = {key for key in theirs.keys() & loaded.keys() if torch.equal(loaded[key], theirs[key])}
        visual = {k for k in theirs if k.startswith("frontend.") and ".head." not in k and "position" not in k}
        assert same == visual
    with pytest.raises(ValueError, match=r"not the weights of UMT's question answering: 9 missing: text_encoder\.\*"):
        direct(stage1)


@pytest.mark.parametrize(
    ("drop", "add", "message"),
    [
        ("text_decoder.cls.predictions.bias", {}, "1 missing: text_decoder.cls.predictions.bias$"),
        ("text_decoder.bert.encoder.layer.0.output.dense.bias", {}, r"1 missing: .*layer\.0\.output\.dense\.bias$"),
        ("", {"mlm_head.weight": (2, 2)}, "1 unknown: mlm_head.weight$"),
        ("", {"text_decoder.cls.predictions.decoder.weight": (30, 64)}, "these weights are others"),
        ("", {"text_decoder.cls.predictions.transform.dense.weight": (9, 9)}, "do not fit the decoder"),
    ],
)
def test_weights_that_do_not_fit(drop: str, add: dict[str, tuple[int, ...]], message: str) -> None:
    state: dict[str, Any] = {key: value for key, value in public(other_weights()).items() if key != drop}
    state |= {key: torch.zeros(shape) for key, shape in add.items()}
    with pytest.raises(ValueError, match=f"(?s){message}"):
        direct(state)


def test_names_vocabularies_and_depths_that_do_not_fit(tmp_path: Path) -> None:
    file = tmp_path / "umt.pth"
    torch.save(public(other_weights()), file)
    for head in ("decoder", "classifier"):
        with pytest.raises(ValueError, match=r"text side is .*vocab_size=30,.*; the model wants .*vocab_size=29,"):
            create(file, vocabulary=VOCABULARY[:-1], head=head, answers=ANSWERS)
    torch.save(public(other_weights(layers=2)), file)
    with pytest.raises(ValueError, match=r"a decoder of 1 layers has no such weights: .*layer.1"):
        create(file)
    with pytest.raises(ValueError, match="UMT has no model 'b17'; expected one of tiny, b16, l16"):
        create_qa_model("umt:b17", VOCABULARY, method="none")
