"""Uniform dropping, a baseline: patches stay at even distances, counted along the rows of each frame."""

from __future__ import annotations

from math import prod

import torch
from torch import Tensor

from tempme_vl.merging import dropping
from tempme_vl.merging.base import LayerMerge, TokenMerger
from tempme_vl.merging.dropping import BehindOptions, Drop, Options
from tempme_vl.merging.method import Behind, Method
from tempme_vl.merging.schedule import Encoder, MergeSchedule


def schedule(encoder: Encoder, options: Options) -> MergeSchedule:
    return dropping.schedule("uniform", encoder, options)


class DropEvenly(Drop):
    """Keeps the middle one of equal parts of a frame's patches, the same ones in all frames."""

    def places(self, patches: int, kept: int, device: torch.device) -> Tensor:
        middle = (2 * torch.arange(kept, device=device) + 1) * patches // (2 * kept)
        return middle.expand(self.frames, -1)


def layer_merge(schedule: MergeSchedule, layer: int, width: int) -> LayerMerge:
    fewer = schedule.plan[layer].fewer_before
    return LayerMerge(DropEvenly(schedule.frames, fewer) if fewer else TokenMerger())


def behind_schedule(frames: int, grid: tuple[int, int], options: BehindOptions) -> MergeSchedule:
    return schedule(Encoder(1, frames, prod(grid), 0), Options(options.inside(grid)))


METHOD = Method(
    Options,
    schedule,
    layer_merge,
    knobs=dropping.knobs,
    matching=lambda plan, count, width, head_width: 0,
    reads=(),
    behind=Behind(BehindOptions, behind_schedule, dropping.behind_knobs),
    apart=True,
)
