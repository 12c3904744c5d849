"""TempMe inside a tower of the Qwen family, along tubes of one place over time: options, plan and counts of a video.

Tubes leave a token for each place at least. Where fewer are wanted, tubes keep twice as many as they could, so that
what moves is still seen to move, and pairs of any places merge behind the tower: one limit, one count.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from functools import cache
from itertools import pairwise
from math import prod
from typing import Any, Literal

from tempme_vl.compressors.base import Grid
from tempme_vl.integrations.base import Keep, Request
from tempme_vl.merging.tube_plan import TubePlan, TubeStep, tube_plan
from tempme_vl.schema import read

METHOD = "tempme"  # the one that merges there; "none" runs the tower the same way


@dataclass(frozen=True)
class Options:
    """steps: in front of which blocks, over how many slots, how many pairs merge in each clip; a layer of the tower's
        depth is behind its last block. Default: clips that double, as `tube_plan` says, for the limit if there is one.
    attend: "slot", each slot to all tokens that cover it, as the tower was trained; "clip", all of a joined clip, each
        as often as it is long, as TempMe trains.
    compare: tokens by their "keys" in the block before, or by their "states".
    """

    steps: list[TubeStep] | None = None
    attend: Literal["slot", "clip"] = "slot"
    compare: Literal["keys", "states"] = "keys"


def check_request(request: Request, place: str) -> None:
    """Whether what was asked for is a matter of a tower.

    Args:
        place: the host, to name in errors.

    Raises:
        ValueError: another method, or options of none that merges there.
    """
    if request.method not in (METHOD, "none"):
        raise ValueError(
            f"inside the tower of {place}, which needs its grid, {METHOD!r} merges along time; got "
            f"{request.method!r}: expected where='behind' or 'auto'"
        )
    if request.method == "none" and (request.options or request.keep != Keep()):
        raise ValueError(f"{request.method!r} merges nothing: expected no options, no budget and no tokens with it")
    if unknown := set(request.options) - {field.name for field in fields(Options)}:
        raise ValueError(
            f"inside the tower of {place} {METHOD!r} takes {', '.join(field.name for field in fields(Options))}; got "
            f"{', '.join(sorted(unknown))}. Options of merging behind it want where='behind' or 'auto'"
        )


class InTower:
    """What was asked for, and what follows for videos of a size.

    Args:
        request: that `check_request` takes.
        depth: blocks of the tower.

    Raises:
        ValueError: options of other values, or steps together with a limit.
    """

    def __init__(self, request: Request, depth: int):
        self.request, self.depth = request, depth
        self.options: Options = read(Options, _plain(request.options), f"method {METHOD!r} inside a tower")
        if self.options.steps is not None and request.keep != Keep():
            raise ValueError("expected steps, or a budget or tokens that they follow from; got both")

    def plan(self, slots: int, grid: Grid) -> TubePlan:
        """The merging of one video.

        Raises:
            ValueError: steps that do not fit it, or a limit that cannot be reached.
        """
        if self.request.method == "none":
            return TubePlan()
        if self.options.steps is not None:
            return TubePlan(tuple(self.options.steps))
        most = self.most(slots, grid)
        return _solved(self.depth, slots, prod(grid), None if most is None else max(most, _enough(slots, prod(grid))))

    def most(self, slots: int, grid: Grid) -> int | None:
        """The limit for a video."""
        return self.request.keep.most(slots * prod(grid))

    def count(self, slots: int, grid: Grid) -> int:
        """Tokens that the language model reads."""
        left, most = self.plan(slots, grid).counts(slots, prod(grid))[-1], self.most(slots, grid)
        return left if most is None else min(left, most)

    def by_layer(self, slots: int, grid: Grid) -> list[int]:
        """Tokens in each block of the tower."""
        plan = self.plan(slots, grid)
        ends = [0, *(min(step.layer, self.depth) for step in plan.steps), self.depth]
        counts = plan.counts(slots, prod(grid))
        return [count for count, (start, end) in zip(counts, pairwise(ends), strict=True) for _ in range(start, end)]

    def config(self) -> dict[str, Any]:
        """JSON data for `tempme_vl.integrations.reduction.saved_request`."""
        limits = {name: value for name, value in asdict(self.request.keep).items() if value is not None}
        options = {} if self.request.method == "none" else asdict(self.options)
        named = {"method": self.request.method, "where": "tower", "num_frames": self.request.num_frames}
        return {**named, "options": options, **limits}


def _enough(slots: int, places: int) -> int:
    """Tokens that tubes keep, whatever the limit."""
    joined = 1 << (slots.bit_length() - 1)  # slots of the largest clips that doubling makes
    return min(2 * places * -(-slots // joined), slots * places)


@cache
def _solved(depth: int, slots: int, places: int, most: int | None) -> TubePlan:
    return tube_plan(depth, slots, places, tokens=most)


def _plain(options: Mapping[str, Any]) -> dict[str, Any]:
    """Steps as JSON has them, where they came as values or as (layer, clip, pairs)."""
    steps = options.get("steps")
    if steps is None:
        return dict(options)
    names = [field.name for field in fields(TubeStep)]

    def written(step: Any) -> Any:
        if isinstance(step, TubeStep):
            return asdict(step)
        return dict(zip(names, step, strict=True)) if isinstance(step, (list, tuple)) and len(step) == 3 else step

    return {**options, "steps": [written(step) for step in steps]}
