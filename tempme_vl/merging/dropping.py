"""Dropping as many patches of every frame in front of a block: what `random` and `uniform` share."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from typing import Annotated

import torch
from torch import Tensor

from tempme_vl.merging.base import TokenMerger
from tempme_vl.merging.budget import Knob, LimitKind
from tempme_vl.merging.method import checked
from tempme_vl.merging.schedule import Encoder, LayerPlan, MergeSchedule
from tempme_vl.schema import Count, Range
from tempme_vl.state import AttentionContext, TokenState


@dataclass(frozen=True)
class Options:
    """drop: patches of each frame that are dropped. layer: the block in front of which they are."""

    drop: Count
    layer: Count = 0


@dataclass(frozen=True)
class BehindOptions:
    """percent: of the tokens of each frame, dropped."""

    percent: Annotated[int, Range(0, 99)] = 50

    def inside(self, grid: tuple[int, int]) -> int:
        """The tokens of each frame that are dropped."""
        return prod(grid) * self.percent // 100


def behind_knobs(frames: int, grid: tuple[int, int]) -> list[list[Knob]]:
    return [[Knob("percent", 0, 99)]]


def knobs(encoder: Encoder, kind: LimitKind) -> list[list[Knob]]:
    return [[Knob("drop", 0, encoder.tokens - encoder.prefix - 1)]]


def one_block(encoder: Encoder, layer: int, fewer: int) -> tuple[LayerPlan, ...]:
    """A plan with so many patches of each frame fewer in front of one block.

    Raises:
        ValueError: a block that is not there, or a frame without a patch.
    """
    patches = encoder.tokens - encoder.prefix
    if layer >= encoder.layers:
        raise ValueError(f"layer is one of the blocks 0..{encoder.layers - 1}; got {layer}")
    if not 0 <= fewer < patches:
        raise ValueError(f"each frame has {patches} patches, of which at least 1 has to stay; got {fewer} fewer")
    plan = [LayerPlan()] * encoder.layers
    plan[layer] = LayerPlan(fewer_before=fewer * (encoder.frames if encoder.joint else 1))
    return tuple(plan)


def schedule(method: str, encoder: Encoder, options: Options) -> MergeSchedule:
    """The same number of patches in each frame, also of a joint encoder.

    Raises:
        ValueError: options out of bounds, or see `one_block`.
    """
    options = checked(method, options)
    plan = one_block(encoder, options.layer, options.drop)
    shape = encoder.frames, encoder.tokens, plan, encoder.prefix, encoder.joint
    seed = getattr(options, "seed", None)
    return MergeSchedule(method, *shape, settings=() if seed is None else (("seed", seed),))


class Drop(TokenMerger):
    """Keeps the patches of each frame that `places` names, in their order.

    Args:
        frames: F.
        fewer: patches dropped in each clip.
    """

    def __init__(self, frames: int, fewer: int):
        super().__init__()
        self.frames, self.fewer = frames, fewer

    def places(self, patches: int, kept: int, device: torch.device) -> Tensor:
        """(F, kept) int64: which of a frame's patches stay, ascending."""
        raise NotImplementedError

    def forward(self, state: TokenState, context: AttentionContext) -> TokenState:
        clips, prefix = state.num_clips, state.num_prefix
        frames = self.frames // clips  # of a clip: 1, or all
        patches = (state.x.shape[1] - prefix) // frames
        kept = self.places(patches, patches - self.fewer // frames, state.x.device)
        first = prefix + patches * (torch.arange(self.frames, device=kept.device) % frames)
        in_clip = (kept + first.unsqueeze(1)).reshape(clips, -1)
        return state.keep(in_clip.repeat(state.x.shape[0] // clips, 1))
