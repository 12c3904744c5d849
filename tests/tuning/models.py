"""Small models to tune, and a batch of two videos and texts for each kind."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset
from towers import TINY, random_video

from tempme_vl.tasks.qa.create import create_qa_model
from tempme_vl.tasks.retrieval import RetrievalModel, create_retrieval_model
from tempme_vl.tuning import TunableModel, Tuning, find_tuning

MERGING = {"r": 1, "merge_layers": (2, 3), "merge_frames": (2, 2), "cross_percent": 30, "intra_percent": 10}
WORDS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", *(f"word{i}" for i in range(20)))
KINDS = ("CLIP", "UMT", "QA")


def make(kind: str, tuning: str | Tuning = "full", method: str = "tempme", **options: Any) -> TunableModel:
    """Four frames; options are those of the method, for TempMe some that merge in every way."""
    torch.manual_seed(0)
    if kind == "QA":
        model = create_qa_model(TINY, WORDS, "classifier", ("word1", "word2"), num_frames=4, **MERGING)
        model.tune(find_tuning(tuning))
        return model
    name, vocabulary = (TINY, None) if kind == "CLIP" else ("umt:tiny", WORDS)
    options = MERGING if method == "tempme" else options
    return create_retrieval_model(
        name, None, method, 4, tuning, clip_position_std=0.5, vocabulary=vocabulary, **options
    )


def made(tuning: str | Tuning, method: str = "tempme") -> RetrievalModel:
    """A tuned model of CLIP whose added modules no longer are as at the start, where some of them do nothing."""
    model = make("CLIP", tuning, method)
    assert isinstance(model, RetrievalModel)
    with torch.no_grad():
        for key, weight in model.named_parameters():
            if weight.requires_grad and model.tuning.is_new(key) and not weight.any():
                weight.normal_(std=0.1)
    return model


def batch(kind: str) -> dict[str, Tensor]:
    ids = torch.tensor([[2, 5, 7, 3], [2, 9, 3, 0]])
    of_text = {"question_ids": ids, "question_mask": (ids > 0).long(), "answer_class": torch.tensor([0, 1])}
    if kind != "QA":
        ids = torch.tensor([[49406, 320, 525, 49407], [49406, 786, 49407, 0]]) if kind == "CLIP" else ids
        of_text = {"text_ids": ids, "text_mask": (ids > 0).long()}
        of_text |= {"video_id": torch.arange(2), "text_id": torch.arange(2)}
    return {"video": random_video(4, 32), "frame_mask": torch.ones(2, 4), "valid": torch.ones(2), **of_text}


def fitting(model: nn.Module, kind: str) -> dict[str, Tensor]:
    """A batch whose texts are as long as the model wants them."""
    given, text = batch(kind), getattr(model, "text", None)
    if kind == "CLIP" and text.fixed_length:
        padding = 0, text.context_length - given["text_ids"].shape[1]
        given |= {name: nn.functional.pad(given[name], padding) for name in ("text_ids", "text_mask")}
    return given


def outputs(model: nn.Module, kind: str) -> Tensor:
    """What a model in evaluation says of two videos and texts."""
    torch.manual_seed(0)
    with torch.no_grad():
        given = {key: value for key, value in fitting(model, kind).items() if key != "answer_class"}
        features = model.eval()(given)
    return torch.cat([value.flatten() for _, value in sorted(features.items()) if value.is_floating_point()])


def train(model: Any, kind: str, steps: int = 3) -> None:
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    model.train()
    for _ in range(steps):
        optimizer.zero_grad()
        given = fitting(model, kind)
        model.loss(model(given), given).backward()
        optimizer.step()


def trained(model: nn.Module) -> set[str]:
    return {name for name, p in model.named_parameters() if p.requires_grad}


class Pairs(Dataset):
    """Eight videos with texts that fit a model of CLIP."""

    def __init__(self, model: nn.Module):
        self.given = fitting(model, "CLIP")

    def __len__(self) -> int:
        return 8

    def __getitem__(self, key: tuple[int, int]) -> dict[str, Any]:
        index = key[1]
        texts = {name: self.given[name][index % 2].clone() for name in ("text_ids", "text_mask")}
        texts["text_ids"][1] = 300 + index
        video = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(index))
        shared = {"frame_mask": torch.ones(4), "valid": 1, "video_id": index, "text_id": index, "name": f"pair-{index}"}
        return {"video": video, **shared, **texts}
