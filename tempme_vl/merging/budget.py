"""The schedule nearest below a limit on cost or tokens: a method's whole-number options are lowered one by one."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from tempme_vl.merging.schedule import MergeSchedule

LimitKind = Literal["budget", "tokens"]


@dataclass(frozen=True)
class Limit:
    """What a schedule may cost at most.

    Attributes:
        kind: "budget" for a share of the GFLOPs without merging, "tokens" for the tokens that leave the encoder.
        most: that share or number.
        measure: the same of a schedule.
    """

    kind: LimitKind
    most: float
    measure: Callable[[MergeSchedule], float]

    def holds(self, schedule: MergeSchedule) -> bool:
        return self.measure(schedule) <= self.most


@dataclass(frozen=True)
class Knob:
    """An option of a method that merges more the larger it is.

    Attributes:
        name: of the option.
        low, high: the range that is tried, both included.
        option: the option's value for a number of that range.
    """

    name: str
    low: int
    high: int
    option: Callable[[int], Any] = int


def fit_knobs(make: Callable[..., MergeSchedule], knobs: Sequence[Knob], limit: Limit) -> dict[str, Any]:
    """Options whose schedule is the nearest below a limit: all knobs high, then each as low as still fits, in turn.

    Every knob but the last leaves a gap of less than one step of its own, which the next one narrows. Where not even
    the highest values fit, these come back.

    Args:
        make: a schedule of the knobs' options.
    """
    options = {knob.name: knob.option(knob.high) for knob in knobs}
    if limit.holds(make(**options)):
        for knob in knobs:
            options[knob.name] = _least(make, options, knob, limit)
    return options


def _least(make: Callable[..., MergeSchedule], options: Mapping[str, Any], knob: Knob, limit: Limit) -> Any:
    """A knob's least value that fits, by bisection."""
    low, high = knob.low, knob.high
    while low < high:
        middle = (low + high) // 2
        if limit.holds(make(**{**options, knob.name: knob.option(middle)})):
            high = middle
        else:
            low = middle + 1
    return knob.option(high)
