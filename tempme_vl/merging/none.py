"""No merging: every frame goes through alone with all its tokens, or all frames together in a joint encoder."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod

from tempme_vl.merging.base import LayerMerge
from tempme_vl.merging.method import Behind, Method
from tempme_vl.merging.schedule import Encoder, LayerPlan, MergeSchedule


@dataclass(frozen=True)
class Options:
    """None."""


def schedule(encoder: Encoder, options: Options) -> MergeSchedule:
    return MergeSchedule.identity(encoder.layers, encoder.frames, encoder.tokens, encoder.prefix, encoder.joint)


def layer_merge(schedule: MergeSchedule, layer: int, width: int) -> LayerMerge:
    if schedule.plan[layer] != LayerPlan():
        raise ValueError(f"method 'none' merges nothing; its schedule has {schedule.plan[layer]}")
    return LayerMerge()


METHOD = Method(
    Options,
    schedule,
    layer_merge,
    divided=True,
    reads=(),
    behind=Behind(Options, lambda frames, grid, options: schedule(Encoder(1, frames, prod(grid), 0), options)),
    apart=True,
)
