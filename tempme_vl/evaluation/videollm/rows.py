"""Rows of a comparison on one video-language model: how they are written, which there are, and what each one runs.

A row at a budget is a `Case`. Baselines are always in: the host itself ("none"), fewer frames ("frames"), smaller
frames ("resolution"), tokens dropped at random and evenly, and pooled.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, get_args

from tempme_vl.command_line import named_value
from tempme_vl.evaluation.rows import RowText, file_name, read_row, row_name
from tempme_vl.integrations import Compressed, as_requested
from tempme_vl.integrations.base import Keep, Request, Where
from tempme_vl.integrations.post_encoder import PostEncoderHost
from tempme_vl.messages import few
from tempme_vl.registries import COMPRESSORS, METHODS

FEWER_INPUTS = ("frames", "resolution")  # what the host is given is fewer, and nothing merges
DROPPING = ("random", "uniform", "pool")  # behind the tower, unless a row says where
HOST = "none"
ALWAYS = (HOST, *FEWER_INPUTS, *DROPPING)
LIMITS = ("budget", "tokens")  # options of any row that stand in the place of --retention


@dataclass(frozen=True)
class Row:
    """METHOD, METHOD@tower, METHOD@behind, or one of them with :NAME=VALUE,NAME=VALUE of the method.

    Raises:
        ValueError: from `parse`, for an unknown method or place, or options that are not of this form.
    """

    method: str
    place: str | None = None
    options: tuple[str, ...] = ()

    @classmethod
    def parse(cls, text: str) -> Row:
        row, known = read_row(text, "@"), list(dict.fromkeys((*ALWAYS, *METHODS, *COMPRESSORS)))
        if row is None or row.method not in known or row.second not in (None, "tower", "behind"):
            raise ValueError(
                f"row {text!r}: expected METHOD, METHOD@tower, METHOD@behind or METHOD:NAME=VALUE,NAME=VALUE with a "
                f"method of {', '.join(known)}"
            )
        if row.method in (HOST, *FEWER_INPUTS) and (row.second or row.options):
            raise ValueError(f"row {text!r}: {row.method!r} has neither a place nor options")
        return cls(*row)

    @property
    def name(self) -> str:
        """As `parse` reads it."""
        return row_name(RowText(self.method, self.place, self.options), "@")

    @property
    def where(self) -> Where:
        """As `compress` has it."""
        usual = "behind" if self.method in DROPPING else "auto"
        return next(place for place in get_args(Where) if place == (self.place or usual))

    @property
    def given(self) -> dict[str, Any]:
        """The options as `compress` takes them; 16/18/20 stands for a list of whole numbers."""
        return {name: _as_list(value) for name, value in map(named_value, self.options)}

    @property
    def sets_own_limit(self) -> bool:
        """Whether no budget is asked of it: its options say one, or nothing of it can be solved for."""
        if set(self.given) & set(LIMITS):
            return True
        if self.method in COMPRESSORS:
            return not COMPRESSORS[self.method].takes_budget
        if self.where != "behind":
            return False
        try:
            return METHODS[self.method].behind_tower().knobs is None
        except ValueError:  # it does not work there, which `build` tells
            return True


def _as_list(value: Any) -> Any:
    parts = value.split("/") if isinstance(value, str) else []
    return tuple(map(int, parts)) if len(parts) > 1 and all(part.isdigit() for part in parts) else value


def all_rows(given: Sequence[str]) -> list[Row]:
    """Those that are always in, and those given; without any, each method in both places, and each compressor.

    Raises:
        ValueError: see `Row.parse`; a row twice.
    """
    rows = [Row(method) for method in ALWAYS]
    if given:
        if len(set(given)) < len(given):
            raise ValueError(f"--methods: expected each row once; got {few(given)}")
        return list(dict.fromkeys((*rows, *map(Row.parse, given))))
    merging = [method for method in METHODS if method not in ALWAYS]
    rows += [Row(method, "tower") for method in ("tempme", *DROPPING)] + [Row("tempme", "behind")]
    rows += [Row(method, place) for method in merging for place in ("tower", "behind")]
    return list(dict.fromkeys((*rows, *map(Row, COMPRESSORS))))


@dataclass(frozen=True)
class Case:
    """A row at a budget, the share of the host's visual tokens to keep; None where none is asked of it."""

    row: Row
    budget: float | None = None

    @property
    def name(self) -> str:
        return self.row.name if self.budget is None else f"{self.row.name} {self.budget:g}"

    @property
    def file(self) -> str:
        """The name, for a file."""
        return file_name(self.name)


def all_cases(rows: Sequence[Row], retention: Sequence[float]) -> list[Case]:
    """The host, and every other row at every budget, largest budgets first."""
    budgets = sorted(set(retention), reverse=True)
    cases = []
    for row in rows:
        alone = row.method == HOST or (row.method not in FEWER_INPUTS and row.sets_own_limit)
        cases += [Case(row)] if alone else [Case(row, budget) for budget in budgets]
    return cases


@dataclass(frozen=True)
class Inputs:
    """What a host is given of a video: F frames of S x S pixels."""

    num_frames: int
    image_size: int


@dataclass(frozen=True)
class Built:
    """A case on a host.

    Attributes:
        inputs: fewer frames or smaller ones for rows of `FEWER_INPUTS`.
        arguments: of `compress` beside model and processor.
    """

    compressed: Compressed
    inputs: Inputs
    arguments: Mapping[str, Any]


def build(model: Any, processor: Any, case: Case, whole: Inputs) -> Built:
    """What a case runs.

    Args:
        whole: what the host itself is given.

    Raises:
        ValueError: a method that does not work on this host, or cannot reach the budget.
    """
    row, inputs = case.row, whole
    if row.method in FEWER_INPUTS:
        assert case.budget is not None
        inputs = fewer_inputs(model, processor, row.method, case.budget, whole)
        request, said = Request(HOST, inputs.num_frames), {}
    else:
        limit = {} if case.budget is None else {"budget": case.budget}
        given = {**limit, **row.given}
        keep = Keep(*(given.pop(name, None) for name in LIMITS))
        request = Request(row.method, whole.num_frames, row.where, keep, given)
        said = {"where": row.where, **limit, **row.given}
    compressed = as_requested(model, processor, request)
    compressed.counts((inputs.image_size,) * 2)  # what frames of this size cannot reach is refused
    return Built(compressed, inputs, {"method": request.method, "num_frames": request.num_frames, **said})


def fewer_inputs(model: Any, processor: Any, what: str, budget: float, whole: Inputs) -> Inputs:
    """The most frames, or the largest ones, of which the host itself makes no more tokens than the budget.

    Args:
        what: of `FEWER_INPUTS`.

    Raises:
        ValueError: a host that brings all frames to one size, or a budget below that of the fewest inputs.
    """

    def made(inputs: Inputs) -> Compressed:
        return as_requested(model, processor, Request(HOST, inputs.num_frames))

    def tokens(inputs: Inputs) -> int:
        return made(inputs).counts((inputs.image_size,) * 2).native

    frames, side, host = whole.num_frames, whole.image_size, made(whole).host
    most = Keep(budget).most(tokens(whole))
    assert most is not None
    if what == "frames":
        joined = host.slot_frames if isinstance(host, PostEncoderHost) else 1  # some towers take no fewer
        fewest, largest, make = joined, frames, lambda count: Inputs(count, side)
    else:
        fewest, largest, make = max(1, side // 8), side, lambda pixels: Inputs(frames, pixels)
        half = max(1, side // 2)
        if tokens(Inputs(frames, half)) >= tokens(whole):
            raise ValueError(
                f"{type(host.model).__name__} makes as many tokens of frames of {side} x {side} pixels as of those of "
                f"{half} x {half}: it brings all frames to one size"
            )
    found = _largest(lambda number: tokens(make(number)) <= most, fewest, largest)
    if found is None:
        lowest = tokens(make(fewest))
        raise ValueError(f"{most} tokens cannot be reached by fewer or smaller frames: the lowest is {lowest}")
    return make(found)


def _largest(holds: Callable[[int], bool], low: int, high: int) -> int | None:
    """The largest number that holds, where all below it do; None if none does."""
    if not holds(low):
        return None
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if holds(middle) else (low, middle - 1)
    return low


def in_words(arguments: Mapping[str, Any]) -> str:
    """Arguments of `compress`, for people and for lmms-eval's --model_args."""

    def word(value: Any) -> str:
        if isinstance(value, (list, tuple)):
            return "/".join(map(str, value))
        return value if isinstance(value, str) else json.dumps(value)

    return ",".join(f"{name}={word(value)}" for name, value in arguments.items())
