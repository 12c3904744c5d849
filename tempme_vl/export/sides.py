"""What of a model becomes a file: its videos' or its texts' side, from plain tensors to plain tensors.

Letters: B videos or texts, F frames, H W pixels, L words.
"""

from __future__ import annotations

import hashlib
import json
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor, nn

from tempme_vl.configs import tower_name
from tempme_vl.frontend import VisualFrontend
from tempme_vl.reports import provenance
from tempme_vl.tasks.retrieval import AnyRetrievalModel, RetrievalModel

Exportable = VisualFrontend | AnyRetrievalModel

_WORDS = ("a", "red", "ball", "moves", "to", "the", "left", "and", "two", "dogs", "run", "behind", "it", "in", "rain")


class Side(nn.Module, ABC):
    """A side of a model. `forward` takes the tensors of `inputs` and gives those that `named` has, in this order.

    Attributes:
        name: "video" or "text".
        inputs: their names.
        embedding: the name of the output that stands for a video, or a text, when both are compared.
    """

    name: str
    inputs: tuple[str, ...]
    embedding: str

    def __init__(self, model: Exportable):
        super().__init__()
        self.model = model

    def __str__(self) -> str:
        tower, method = tower_name(self.frontend.config), self.frontend.schedule.method
        return f"the {self.name} side of {tower} with the method {method!r}"

    @property
    def frontend(self) -> VisualFrontend:
        return self.model if isinstance(self.model, VisualFrontend) else self.model.frontend

    @abstractmethod
    def example(self, batch: int, seed: int) -> tuple[Tensor, ...]:
        """Random inputs, the same ones for a seed."""

    @abstractmethod
    def named(self, *inputs: Tensor) -> dict[str, Tensor]:
        """The outputs."""

    @abstractmethod
    def facts(self) -> dict[str, Any]:
        """JSON data that a caller needs to make the inputs."""


class VideoSide(Side):
    """(B, F, 3, H, W) normalised frames, all of them real, to tokens and embeddings.

    Outputs: tokens (B, M, D), size (B, M, 1) and pooled (B, E), see `FrontendOutput`; then what the head of a
    retrieval model compares, "video" first.
    """

    name = "video"
    inputs = ("pixels",)

    def __init__(self, model: Exportable):
        super().__init__(model)
        self.embedding = "video" if isinstance(model, RetrievalModel) else "pooled"

    def forward(self, pixels: Tensor) -> tuple[Tensor, ...]:
        return tuple(self.named(pixels).values())

    def named(self, *inputs: Tensor) -> dict[str, Tensor]:
        output = self.frontend(*inputs)
        found = {"tokens": output.tokens, "size": output.size, "pooled": output.pooled}
        if isinstance(self.model, RetrievalModel):
            head = self.model.head
            made = head.encode_video(self.frontend, output)
            found |= {name: made[name] for name in (*head.video_parts, *head.fine_video_parts) if name in made}
        return found

    def example(self, batch: int, seed: int) -> tuple[Tensor, ...]:
        side = self.frontend.shape.image_size
        shape = batch, self.frontend.schedule.frames, 3, side, side
        return (torch.randn(shape, generator=torch.Generator().manual_seed(seed)),)

    def facts(self) -> dict[str, Any]:
        config, input = self.frontend.config, getattr(self.model, "input", None)
        return {
            "tower": tower_name(config),
            "schedule": self.frontend.schedule.to_dict(),
            "preprocess": None if config is None else asdict(config.preprocess),
            "sampling": None if input is None else input.sampling,
        }


class TextSide(Side):
    """Ids and mask (B, L) of the model's own words, filled up to the length of training, to embeddings.

    Outputs: what the head compares, "text" (B, E) among it.
    """

    name = "text"
    inputs = ("text_ids", "text_mask")
    embedding = "text"

    model: AnyRetrievalModel

    def forward(self, text_ids: Tensor, text_mask: Tensor) -> tuple[Tensor, ...]:
        return tuple(self.named(text_ids, text_mask).values())

    def named(self, *inputs: Tensor) -> dict[str, Tensor]:
        model = self.model
        if isinstance(model, RetrievalModel):
            made = model.head.encode_text(model.text, *inputs)
            return {name: made[name] for name in (*model.head.text_parts, *model.head.fine_text_parts) if name in made}
        said = model.encode_text(*inputs)
        return {"text": said[0] if isinstance(said, tuple) else said}

    def example(self, batch: int, seed: int) -> tuple[Tensor, ...]:
        draw, words = torch.Generator().manual_seed(seed), self.model.input.max_words
        tokenize = self.model.words.tokenizer(words)

        def text() -> str:
            length = int(torch.randint(1, words, (), generator=draw))
            return " ".join(_WORDS[n] for n in torch.randint(len(_WORDS), (length,), generator=draw).tolist())

        ids, masks = zip(*(tokenize(text()) for _ in range(batch)), strict=True)
        return torch.stack(ids), torch.stack(masks)

    def facts(self) -> dict[str, Any]:
        return {"max_words": self.model.input.max_words, "words": type(self.model.words).__name__}


def about(side: Side, shapes: Mapping[str, Sequence[int | str]], batch: int | None) -> str:
    """What a file says of itself, as JSON: where it came from, and what it takes.

    Args:
        shapes: of inputs and outputs.
        batch: videos or texts at a time; None for any number.
    """
    said = {
        "side": side.name,
        "embedding": side.embedding,
        "batch_size": batch,
        "shapes": {name: list(shape) for name, shape in shapes.items()},
        **side.facts(),
        "weights_sha256": fingerprint(side),
        "versions": provenance()["versions"],
    }
    return json.dumps(said)


def fingerprint(module: nn.Module) -> str:
    """SHA-256 of all weights in the order of their names, and of these and the shapes."""
    digest = hashlib.sha256()
    for name, value in sorted(module.state_dict().items()):
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}\n".encode())
        digest.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
