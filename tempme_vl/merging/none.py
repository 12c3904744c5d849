"""No merging: every frame goes through alone with all its tokens, or all frames together in a joint encoder."""

from __future__ import annotations

from dataclasses import dataclass

from tempme_vl.merging.base import LayerMerge, TokenMerger, no_clip_step
from tempme_vl.merging.method import Encoder, Method
from tempme_vl.merging.schedule import LayerPlan, MergeSchedule


@dataclass(frozen=True)
class Options:
    """None."""


def schedule(encoder: Encoder, options: Options) -> MergeSchedule:
    return MergeSchedule.identity(encoder.layers, encoder.frames, encoder.tokens, encoder.prefix, encoder.joint)


def layer_merge(plan: LayerPlan, clips: int, width: int) -> LayerMerge:
    no_clip_step(plan, "none")
    if plan.after:
        raise ValueError(f"method 'none' merges nothing; its schedule has {plan}")
    return LayerMerge(TokenMerger(), TokenMerger())


METHOD = Method(Options, schedule, layer_merge)
