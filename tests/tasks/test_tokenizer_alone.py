"""Loader workers get what turns questions into tensors, and not the model."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from tasks.llm_models import tiny_llm_qa, write_llm
from torch import nn
from training.models import ANSWERS, small_model

from tempme_vl.integrations import compress
from tempme_vl.integrations.tiny import tiny_host
from tempme_vl.tasks.videollm import create_video_llm


def model_of(kind: str, folder: Path) -> Any:
    if kind == "llm":
        return tiny_llm_qa(write_llm(folder))
    if kind == "videollm":
        options = {"merge_frames": (2, 2), "merge_layers": (1, 2), "r": 1, "cross_percent": 30, "intra_percent": 10}
        model, processor = tiny_host("VideoLlava", ["which way does it move", *ANSWERS], 0)
        return create_video_llm(compress(model, processor, num_frames=4, **options))
    return small_model(kind)


@pytest.mark.parametrize("kind", ["classifier", "decoder", "llm", "videollm"])
def test_it_says_the_same_and_holds_no_weights(kind: str, tmp_path: Path) -> None:
    model = model_of(kind, tmp_path)
    weights = sum(weight.numel() for weight in model.parameters())
    data = pickle.dumps(model.tokenizer())
    assert len(data) < weights  # at four bytes a weight, less than a quarter of them
    assert not list(_tensors(model.tokenizer()))
    alone = pickle.loads(data)
    for arguments in (("word4 word5",), ("word6", ANSWERS[0])):
        expected, found = model.tokenize(*arguments), alone(*arguments)
        assert expected.keys() == found.keys()
        for name, value in expected.items():
            assert torch.equal(value, found[name]) if isinstance(value, torch.Tensor) else value == found[name]


def _tensors(tokenizer: Any) -> list[torch.Tensor]:
    owner = getattr(tokenizer, "__self__", None)
    return [w for w in owner.parameters() if w.numel()] if isinstance(owner, nn.Module) else []
