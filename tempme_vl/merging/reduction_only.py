"""TempMe's token reduction alone (ICLR 2025, the ablation of functions): as many tokens go, in every frame by itself.

What TempMe merges across clips merges here before attention of the same blocks, inside each frame; no clip is joined,
and no position learnt. The paper gives 34.7 GFLOPs for 12 frames of B/32 and not the procedure: this is one reading.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import prod
from typing import Annotated, Any

from tempme_vl.merging import tempme
from tempme_vl.merging.base import LayerMerge, TokenMerger
from tempme_vl.merging.budget import Knob, LimitKind
from tempme_vl.merging.method import Behind, Method
from tempme_vl.merging.schedule import Encoder, MergeSchedule
from tempme_vl.merging.tempme import IntraClipMerge
from tempme_vl.schema import Layers, Range


@dataclass(frozen=True)
class Options:
    """TempMe's; cross_percent: merged before attention of the merge layers, inside each frame."""

    r: int
    merge_layers: tuple[int, ...]
    cross_percent: int
    intra_percent: int


def published(encoder: Encoder) -> dict[str, Any]:
    """TempMe's setting. On B/32 it costs 34.98 GFLOPs, and 33 percent in place of 30 is a fit: 34.70, as published."""
    options = tempme.published(encoder)
    return {**options, "cross_percent": 33} if options and encoder.tokens == 50 else options


def shaped(encoder: Encoder) -> dict[str, Any]:
    return {"merge_layers": tempme.shaped(encoder)["merge_layers"]}


def knobs(encoder: Encoder, kind: LimitKind) -> list[list[Knob]]:
    """TempMe's for GFLOPs, and higher percentages where these are not enough, since no clip is joined."""
    r = Knob("r", 0, (encoder.tokens - encoder.prefix) // 2)
    highest = (40, 20), (50, 50)
    return [[r, Knob("cross_percent", 0, cross), Knob("intra_percent", 0, intra)] for cross, intra in highest]


def schedule(encoder: Encoder, options: Options) -> MergeSchedule:
    """The counts of TempMe on clips that hold one frame each.

    Raises:
        ValueError: see TempMe's `schedule`.
    """
    layers = options.merge_layers
    apart = tempme.Options(options.r, layers, (1,) * len(layers), options.cross_percent, options.intra_percent)
    made = tempme.schedule(encoder, apart)
    return replace(made, method="reduction_only", plan=tuple(replace(plan, join=None) for plan in made.plan))


def layer_merge(schedule: MergeSchedule, layer: int, width: int) -> LayerMerge:
    plan = schedule.plan[layer]
    before, after = (IntraClipMerge(pairs) if pairs else TokenMerger() for pairs in (plan.before, plan.after))
    return LayerMerge(before, after)


@dataclass(frozen=True)
class BehindOptions:
    """As in `Options`; steps: how often."""

    steps: Layers = 2
    cross_percent: Annotated[int, Range(0, 100)] = 40
    intra_percent: Annotated[int, Range(0, 100)] = 10


def behind_schedule(frames: int, grid: tuple[int, int], options: BehindOptions) -> MergeSchedule:
    inside = Options(0, tuple(range(options.steps)), options.cross_percent, options.intra_percent)
    return schedule(Encoder(options.steps, frames, prod(grid), 0), inside)


def behind_knobs(frames: int, grid: tuple[int, int]) -> list[list[Knob]]:
    percents = [Knob("intra_percent", 0, 50), Knob("cross_percent", 0, 50)]
    return [[Knob("steps", steps, steps), *percents] for steps in (2, 4, 8)]


METHOD = Method(
    Options,
    schedule,
    layer_merge,
    published,
    shaped,
    knobs,
    joint=False,
    reads=("tokens", "keys"),
    behind=Behind(BehindOptions, behind_schedule, behind_knobs),
    apart=True,
)
