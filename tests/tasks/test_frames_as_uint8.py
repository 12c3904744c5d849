"""Frames travel as uint8: a model in training sees what it sees in evaluation, in whose batches all are readable."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tempme_vl.tasks.qa.create import create_qa_model
from tempme_vl.tasks.retrieval import create_retrieval_model
from tempme_vl.tasks.testa import TestaCaptioner, create_testa_pretraining_model
from tempme_vl.text import BlipShape, blip_vocabulary
from tempme_vl.text.tokenizers import word_vocabulary

WORDS = word_vocabulary(["a dog runs"])
TINY: dict[str, Any] = {"method": "none", "num_frames": 2}


def asking(name: str) -> nn.Module:
    return create_qa_model(name, WORDS, "classifier", ("red", "blue"), **TINY)


def retrieving(name: str) -> nn.Module:
    return create_retrieval_model(name, vocabulary=None if name.startswith("open_clip") else WORDS, **TINY)


def captioning(name: str) -> nn.Module:
    words = blip_vocabulary(WORDS)
    model = create_testa_pretraining_model(name, words, **TINY)
    return TestaCaptioner(model.frontend, BlipShape.named("tiny", vocab_size=len(words)), words)


NAMES = ("open_clip:tiny", "umt:tiny", "testa:tiny")
CASES = [(make, name) for make in (asking, retrieving) for name in NAMES] + [(captioning, "testa:tiny")]


@pytest.mark.parametrize(("make", "name"), CASES)
def test_frames_are_normalised_in_training_too(make: Callable[[str], nn.Module], name: str) -> None:
    torch.manual_seed(0)
    model = make(name).eval()
    video = torch.randint(0, 256, (3, 2, 3, 32, 32), dtype=torch.uint8)
    batch = {"video": video, "frame_mask": torch.ones(3, 2)}
    with torch.no_grad():
        plain, marked = seen(model, batch), seen(model, {**batch, "valid": torch.tensor([1, 0, 1])})
    assert torch.equal(plain[[0, 2]], marked[[0, 2]])


def seen(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """What the front end made of the videos."""
    outputs: list[Tensor] = []
    hook = model.frontend.register_forward_hook(lambda module, given, output: outputs.append(output.tokens))
    model(batch)
    hook.remove()
    return outputs[0]
