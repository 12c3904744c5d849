"""Random dropping, a baseline: every frame loses patches of its own, chosen by a seed and nothing else.

The choice follows from the seed and the number of the frame by integer arithmetic: it is the same in every batch, in
training and afterwards, on every device and in every version of torch.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor

from tempme_vl.merging import dropping
from tempme_vl.merging.base import LayerMerge, TokenMerger
from tempme_vl.merging.dropping import Drop
from tempme_vl.merging.method import Behind, Method
from tempme_vl.merging.schedule import Encoder, MergeSchedule
from tempme_vl.schema import Count


@dataclass(frozen=True)
class Options(dropping.Options):
    """As of dropping; seed: of the choice."""

    seed: Count = 0


@dataclass(frozen=True)
class BehindOptions(dropping.BehindOptions):
    """As of dropping; seed: of the choice."""

    seed: Count = 0


def schedule(encoder: Encoder, options: Options) -> MergeSchedule:
    return dropping.schedule("random", encoder, options)


class DropAtRandom(Drop):
    """Keeps patches that were drawn for each frame."""

    def __init__(self, frames: int, fewer: int, seed: int):
        super().__init__(frames, fewer)
        self.seed = seed

    def places(self, patches: int, kept: int, device: torch.device) -> Tensor:
        frame, patch = torch.arange(self.frames, device=device), torch.arange(patches, device=device)
        drawn = _scrambled(_scrambled(frame + self.seed * 0x10001).unsqueeze(1) + patch)
        return drawn.topk(kept, dim=1).indices.sort(dim=1).values


def _scrambled(x: Tensor) -> Tensor:
    """Whole numbers as others below 2^32, each bit of which depends on each bit; no product exceeds int64."""
    x = x & 0xFFFFFFFF
    for shift, factor in ((16, 0x7FEB352D), (15, 0x31848BAB), (17, 0x2C1B3C6D)):
        x = ((x ^ (x >> shift)) * factor) & 0xFFFFFFFF
    return x ^ (x >> 16)


def layer_merge(schedule: MergeSchedule, layer: int, width: int) -> LayerMerge:
    fewer, seed = schedule.plan[layer].fewer_before, int(dict(schedule.settings)["seed"])
    return LayerMerge(DropAtRandom(schedule.frames, fewer, seed) if fewer else TokenMerger())


def behind_schedule(frames: int, grid: tuple[int, int], options: BehindOptions) -> MergeSchedule:
    inside = Options(options.inside(grid), seed=options.seed)
    return schedule(Encoder(1, frames, prod(grid), 0), inside)


METHOD = Method(
    Options,
    schedule,
    layer_merge,
    knobs=dropping.knobs,
    matching=lambda plan, count, width, head_width: 0,
    reads=(),
    behind=Behind(BehindOptions, behind_schedule, dropping.behind_knobs),
)
