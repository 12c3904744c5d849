"""A folder that the package wrote, as the start of another run: all families, and the text sides of their models."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import CLIPVisionConfig, CLIPVisionModel

from tempme_vl import create_frontend
from tempme_vl.manifest import write_manifest
from tempme_vl.tasks.qa.create import create_qa_model
from tempme_vl.tasks.umt_retrieval import create_umt_retrieval_model
from tempme_vl.text.tokenizers import word_vocabulary

WORDS = word_vocabulary(["a red ball moves left", "a green cube"])
OTHERS = word_vocabulary(["some other words stand here now", "and here"])
UMT: dict[str, Any] = {"num_frames": 4, "method": "none"}
TEMPME: dict[str, Any] = {
    **{"num_frames": 4, "method": "tempme", "r": 1, "merge_layers": (2, 3), "merge_frames": (2, 2)},
    **{"cross_percent": 30, "intra_percent": 10},
}
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "umt": ("umt:tiny", {}),
    "timm": ("timm:vit_tiny_patch16_224", {"image_size": 32}),
    "open_clip": ("open_clip:tiny", {}),
}


def assert_same(actual: nn.Module, expected: nn.Module) -> None:
    own, theirs = actual.state_dict(), expected.state_dict()
    assert own.keys() == theirs.keys()
    for key, value in theirs.items():
        assert torch.equal(own[key], value), key


def drawn(seed: int, model: nn.Module) -> nn.Module:
    """Random weights, those too that start at constants."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator)
    return model


@pytest.mark.parametrize("family", [*FAMILIES, "hf"])
def test_every_family_goes_on_from_its_own_front_end(family: str, tmp_path: Path) -> None:
    name, options = FAMILIES.get(family, (f"hf:{tmp_path / 'clip'}", {}))
    if family == "hf":
        sizes = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 2, "num_hidden_layers": 5}
        CLIPVisionModel(CLIPVisionConfig(**sizes, image_size=32, patch_size=8)).save_pretrained(tmp_path / "clip")
    first = create_frontend(name, **TEMPME, **options)
    drawn(1, first)
    first.save_pretrained(tmp_path)
    assert_same(create_frontend(name, str(tmp_path), **TEMPME, **options), first)
    plain = create_frontend(name, str(tmp_path), method="none", num_frames=2, **options)
    expected = {key: value for key, value in first.state_dict().items() if "clip_position" not in key}
    assert plain.state_dict().keys() == expected.keys()
    assert all(torch.equal(value, expected[key]) for key, value in plain.state_dict().items())


def test_another_tower_is_refused(tmp_path: Path) -> None:
    create_frontend("timm:vit_tiny_patch16_224", method="none", num_frames=1, image_size=32).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"holds another tower: .*'img_size': 32.* instead of .*'img_size': 48"):
        create_frontend("timm:vit_tiny_patch16_224", str(tmp_path), method="none", num_frames=1, image_size=48)
    with pytest.raises(ValueError, match=r"holds a tower of the family 'timm'; expected one of 'umt'"):
        create_frontend("umt:tiny", str(tmp_path), method="none", num_frames=1)
    config = json.loads((tmp_path / "config.json").read_text())
    config["frontend"]["options"]["num_heads"] = 6  # which no shape shows
    (tmp_path / "config.json").write_text(json.dumps(config))
    write_manifest(tmp_path)
    with pytest.raises(ValueError, match=r"holds another tower: .*'num_heads': 6"):
        create_frontend("timm:vit_tiny_patch16_224", str(tmp_path), method="none", num_frames=1, image_size=32)


def test_weights_that_the_configuration_does_not_have(tmp_path: Path) -> None:
    create_frontend("umt:tiny", **UMT).save_pretrained(tmp_path)
    state = load_file(tmp_path / "model.safetensors")
    state["norm.weight"] = torch.zeros(3)
    del state["norm.bias"]
    save_file(state, tmp_path / "model.safetensors")
    write_manifest(tmp_path)
    with pytest.raises(ValueError, match=r"1 of other shapes: norm.weight \(3,\) instead of .*; 1 missing: norm.bias"):
        create_frontend("umt:tiny", str(tmp_path), **UMT)


@pytest.mark.parametrize("content", ["{", "[]", '"text"'])
def test_a_damaged_config_is_named(content: str, tmp_path: Path) -> None:
    create_frontend("umt:tiny", **UMT).save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(ValueError, match=r"config.json"):
        create_frontend("umt:tiny", str(tmp_path), **UMT)


def test_umts_retrieval_model_goes_on(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    first = create_umt_retrieval_model("umt:tiny", WORDS, **UMT)
    drawn(2, first)
    first.save_pretrained(tmp_path)
    assert_same(create_umt_retrieval_model("umt:tiny", WORDS, str(tmp_path), **UMT), first)
    with pytest.raises(ValueError, match=r"the model has \d+ words, and .* was trained with \d+ others"):
        create_umt_retrieval_model("umt:tiny", OTHERS, str(tmp_path), **UMT)
    first.frontend.save_pretrained(tmp_path / "tower")
    with caplog.at_level(logging.INFO, "tempme_vl"):
        second = create_umt_retrieval_model("umt:tiny", OTHERS, str(tmp_path / "tower"), **UMT)
    assert_same(second.frontend, first.frontend)
    assert "a frontend model has no text side for retrieval, which starts at random" in caplog.text


def head_of(model: nn.Module, without: str = "-") -> dict[str, Tensor]:
    return {key: value for key, value in model.head.state_dict().items() if not key.startswith(without)}


@pytest.mark.parametrize("head", ["classifier", "decoder"])
def test_a_question_answering_model_goes_on(head: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """With the same answers all of it; with others the classes start anew, and a decoder has none."""
    first = create_qa_model("umt:tiny", WORDS, head, ("red", "green"), **UMT)
    drawn(3, first)
    first.save_pretrained(tmp_path)
    assert_same(create_qa_model("umt:tiny", WORDS, head, ("red", "green"), str(tmp_path), **UMT), first)
    with caplog.at_level(logging.INFO, "tempme_vl"):
        second = create_qa_model("umt:tiny", WORDS, head, ("green", "red"), str(tmp_path), **UMT)
    assert_same(second.frontend, first.frontend)
    new = "classifier.2." if head == "classifier" else "-"
    assert all(torch.equal(value, head_of(first)[key]) for key, value in head_of(second, new).items())
    if head == "classifier":
        assert not torch.equal(second.head.classifier[2].weight, first.head.classifier[2].weight)
    assert f"new: {'head.classifier.2.' if head == 'classifier' else 'nothing'}" in caplog.text
    with pytest.raises(ValueError, match=r"was trained with \d+ others"):
        create_qa_model("umt:tiny", OTHERS, head, ("red",), str(tmp_path), **UMT)
    other: Any = {"classifier": "decoder", "decoder": "classifier"}[head]
    third = create_qa_model("umt:tiny", OTHERS, other, ("red",), str(tmp_path), **UMT)
    assert_same(third.frontend, first.frontend)
    assert f"its head is {head}, so the {other} starts anew" in caplog.text
