"""Merging methods. A new one is a file with `schedule` and `layer_merge`, and a line in `METHODS`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from tempme_vl.merging import tempme, tome
from tempme_vl.merging.base import LayerMerge, TokenMerger, no_clip_step
from tempme_vl.merging.schedule import LayerPlan, MergeSchedule

__all__ = [
    "METHODS",
    "LayerMerge",
    "LayerPlan",
    "MergeSchedule",
    "Method",
    "TokenMerger",
    "find_method",
    "merge_layers",
]


@dataclass(frozen=True)
class Method:
    """How a method makes its schedule (keywords layers, frames, tokens, prefix and its own) and a block's modules."""

    schedule: Callable[..., MergeSchedule]
    layer_merge: Callable[[LayerPlan, int, int], LayerMerge]


def _no_merging(plan: LayerPlan, clips: int, width: int) -> LayerMerge:
    no_clip_step(plan, "none")
    if plan.after:
        raise ValueError(f"method 'none' merges nothing; its schedule has {plan}")
    return LayerMerge(TokenMerger(), TokenMerger())


METHODS = {
    "none": Method(MergeSchedule.identity, _no_merging),
    "tome": Method(MergeSchedule.tome, tome.layer_merge),
    "tempme": Method(MergeSchedule.tempme, tempme.layer_merge),
}


def find_method(name: str) -> Method:
    """The method of a name.

    Raises:
        ValueError: an unknown one.
    """
    if name not in METHODS:
        raise ValueError(f"unknown method {name!r}; expected one of {', '.join(METHODS)}")
    return METHODS[name]


def merge_layers(schedule: MergeSchedule, width: int) -> list[LayerMerge]:
    """The merging modules of every block of a tower of the given width."""
    method, clips, layers = find_method(schedule.method), schedule.clips, []
    for plan in schedule.plan:
        layers.append(method.layer_merge(plan, clips, width))
        clips //= plan.join or 1
    return layers
