"""The record of a merging method."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from typing import Any

from tempme_vl.merging.base import LayerMerge
from tempme_vl.merging.budget import Knob, LimitKind
from tempme_vl.merging.schedule import LayerPlan, MergeSchedule


@dataclass(frozen=True)
class Encoder:
    """What a schedule needs to know of an encoder; see `MergeSchedule`."""

    layers: int
    frames: int
    tokens: int
    prefix: int = 1
    joint: bool = False


@dataclass(frozen=True)
class Method:
    """A merging method.

    Attributes:
        options: a frozen dataclass.
        schedule: (encoder, options) -> its schedule.
        layer_merge: (plan, clips before its join, width) -> the modules of one block.
        published: options, by name, that its paper gives for an encoder; {} where it gives none.
        shaped: options that follow from the numbers of layers and frames, whatever a video may cost.
        knobs: what is solved for to stay below a limit: ways to do so, the preferred ones first, each a sequence of
            knobs in the order in which they are set.
        joint: whether it works on frames that attend jointly.
    """

    options: type
    schedule: Callable[[Encoder, Any], MergeSchedule]
    layer_merge: Callable[[LayerPlan, int, int], LayerMerge]
    published: Callable[[Encoder], dict[str, Any]] = lambda encoder: {}
    shaped: Callable[[Encoder], dict[str, Any]] = lambda encoder: {}
    knobs: Callable[[Encoder, LimitKind], Sequence[Sequence[Knob]]] = lambda encoder, kind: ()
    joint: bool = True

    @property
    def option_names(self) -> tuple[str, ...]:
        return tuple(field.name for field in fields(self.options))
