"""PLEVU (Prompting Visual-Language Models for Efficient Video Understanding, ECCV 2022): learnt words around the
caption, and a small transformer over the frames."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

from tempme_vl.costs import BlockCost
from tempme_vl.pooling import FramePlace, mean_by_clip
from tempme_vl.precision import at_least_float32
from tempme_vl.text.clip import WordPlace
from tempme_vl.tuning.base import AddedModules
from tempme_vl.tuning.block import Block
from tempme_vl.tuning.prompt import Rows

if TYPE_CHECKING:
    from tempme_vl.backbones.base import TowerShape
    from tempme_vl.merging.schedule import MergeSchedule
    from tempme_vl.tuning.model import TunableModel

TEMPERATURE = 0.07
_STD = 0.01  # of what is learnt, at the start


@dataclass(frozen=True)
class Plevu(AddedModules):
    """All of CLIP is frozen. A caption becomes [start, prefix, words, postfix, end], with learnt words from a table of
    one for every place. Frames' embeddings, not normalised, get temporal positions, pass a transformer and are
    averaged, real or not. Similarities are cosines / 0.07, and the loss is that of videos that choose among texts.

    The public code is that for actions; for retrieval the authors have published none.

    Attributes:
        prefix, postfix: learnt words before and after the caption's; 0, as the public code has by default, leaves a
            caption as it is.
        layers, heads: of the transformer over frames.

    Raises:
        ValueError: counts below 0, or a transformer without layers or heads.
    """

    name: ClassVar[str] = "plevu"
    loss_weights: ClassVar[tuple[float, float]] = (1.0, 0.0)

    prefix: int = 0
    postfix: int = 0
    layers: int = 2
    heads: int = 8

    def __post_init__(self) -> None:
        if min(self.prefix, self.postfix) < 0 or min(self.layers, self.heads) < 1:
            raise ValueError(f"expected prefix and postfix from 0, layers and heads from 1; got {self}")

    def extend(self, model: TunableModel) -> None:
        """Raises:
        ValueError: a model without a text tower of open_clip, whose frames have no embeddings of their own, are fewer
            at the end, or whose embeddings the heads do not divide, or more learnt words than there are places.
        """
        text, shape = model.clip_text(), model.frontend.shape
        if shape.pooling != "cls":
            raise ValueError(
                "plevu reads an embedding of every frame, its CLS token's; this tower pools by "
                f"{shape.pooling}, where merged frames share one: choose prompt or adapter"
            )
        if shape.embed_dim % self.heads:
            raise ValueError(f"plevu: expected heads that divide the embedding's {shape.embed_dim}; got {self.heads}")
        text.embed.tuned = LearntWords(text.context_length, text.width, self.prefix, self.postfix)
        text.shorten(self.prefix + self.postfix)
        frames = model.frontend.schedule.frames
        model.frontend.tuned = FrameTransformer(frames, shape.embed_dim, self.layers, self.heads)
        with torch.no_grad():
            model.get_parameter("logit_scale.log_scale").fill_(math.log(1 / TEMPERATURE))

    def cost(self, schedule: MergeSchedule, shape: TowerShape, published: bool = False) -> int:
        return self.layers * BlockCost(shape.embed_dim, self.heads).whole(schedule.pooled_prefixes)

    def published(self) -> dict[str, Any]:
        return {"lr_new": 1e-3, "optimizer": "adamw", "weight_decay": 0.01}


class LearntWords(WordPlace):
    """Words of a caption moved behind a prefix, its end behind a postfix; at all other places learnt words.

    Args:
        places: of the tower.
    """

    def __init__(self, places: int, width: int, prefix: int, postfix: int):
        super().__init__()
        self.prefix, self.postfix = prefix, postfix
        self.words = Rows(places, width, _STD)

    def forward(self, words: Tensor, end: Tensor) -> tuple[Tensor, Tensor]:
        rows, length, _ = words.shape
        learnt = self.words()[: length + self.prefix + self.postfix].to(words.dtype).expand(rows, -1, -1)
        place = torch.arange(learnt.shape[1], device=words.device)
        at = end.unsqueeze(1)
        last = at + self.prefix + self.postfix
        given = (place == 0) | ((place > self.prefix) & (place < at + self.prefix)) | (place == last)
        source = torch.where(place == 0, 0, torch.where(place == last, at, place - self.prefix))
        source = source.where(given, 0).unsqueeze(-1)
        moved = words.gather(1, source.expand(-1, -1, words.shape[2]))
        return torch.where(given.unsqueeze(-1), moved, learnt), last.squeeze(1)


class FrameTransformer(FramePlace):
    """The mean of frames that have attended to each other: (B, F, E) -> (B, E). Where merging has left an embedding of
    several frames, its position is the mean of theirs."""

    def __init__(self, frames: int, width: int, layers: int, heads: int):
        super().__init__()
        self.positions = Rows(frames, width, _STD)
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(layers))

    def forward(
        self, frames: Tensor, frame_mask: Tensor | None, video: Tensor | None, clip_of: Tensor | None = None
    ) -> Tensor:
        x = frames + mean_by_clip(self.positions(), frames.shape[1], clip_of).to(frames.dtype)
        for block in self.blocks:
            x = block(x)
        return at_least_float32(x).mean(dim=1)
