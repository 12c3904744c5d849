"""What makes a video's features fewer behind a tower: a merging method of `METHODS`, by the same modules as inside a
tower, or a compressor of `COMPRESSORS`."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, fields, replace
from functools import partial
from math import prod
from typing import Annotated, Any, Literal

import torch
from torch import Tensor, nn

from tempme_vl.compressors import COMPRESSORS, Clip, FrameFeatures, KeptFeatures, by_frame
from tempme_vl.compressors.base import Grid, Reading
from tempme_vl.compressors.inner import Inner
from tempme_vl.integrations.base import Keep, Request
from tempme_vl.matching import bipartite_match
from tempme_vl.merging import (
    METHODS,
    LayerMerge,
    Limit,
    MergeSchedule,
    fit_knobs,
    learnt_modules,
    merge_layers,
    share_learnt,
)
from tempme_vl.merging.base import apply_merge
from tempme_vl.merging.method import Behind
from tempme_vl.precision import at_least_float32
from tempme_vl.registry import UnknownName
from tempme_vl.schema import Range, Size, read
from tempme_vl.state import AttentionContext, TokenState


class Reduction(ABC):
    """A method with its options, behind the tower of a host.

    Attributes:
        method: its name.
        given: the options, but for those that follow from `keep` for each video.
        keep: the limit.
        fixed: tokens of every video that count in the limit and are none of the features (CLS, newline).
        reads: what it needs of the tower beside the features.
        merging: modules with what it has learnt.
        inner: (layers of the language model) -> what it does in there; None for nothing.
    """

    reads: tuple[Reading, ...] = ()
    inner: Callable[[int], Inner | None] | None = None

    def __init__(self, method: str, given: Mapping[str, Any], keep: Keep, fixed: int):
        self.method, self.given, self.keep, self.fixed = method, given, keep, fixed
        self.merging = nn.ModuleDict()

    @abstractmethod
    def count(self, slots: int, grid: Grid) -> int | None:
        """Tokens that are left of a video of so many frames; None where the data decide."""

    @abstractmethod
    def reduce(self, frames: FrameFeatures, slots: int | None = None) -> KeptFeatures:
        """What is left, its `clips` filled in.

        Args:
            slots: of all of the video, where the frames are a part of it that `cut` allows.
        """

    def cut(self, slots: int, grid: Grid) -> int | None:
        """How many frames of a video become fewer together, parts of which begin at multiples of it; None for all."""
        return None

    def most(self, slots: int, grid: Grid) -> int | None:
        """The limit for a video."""
        return self.keep.most(slots * prod(grid) + self.fixed, self.fixed)


@dataclass(frozen=True)
class Place:
    """A host, behind whose tower a method works.

    Attributes:
        name: in errors.
        slots: T, frames or temporal patches of a video.
        width: D of the features.
        readings: what its tower gives beside the features.
        fixed: see `Reduction`.
    """

    name: str
    slots: int
    width: int
    readings: tuple[Reading, ...] = ()
    fixed: int = 0


def reduction(request: Request, place: Place) -> Reduction:
    """A method behind a tower.

    Raises:
        ValueError: an unknown method, one that does not work there or reads what the tower does not give, or options
            that do not fit.
    """
    kind: type[Compression | Merging] = Compression if request.method in COMPRESSORS else Merging
    made = kind(request.method, request.options, request.keep, place)
    if missing := [name for name in made.reads if name not in place.readings]:
        raise ValueError(
            f"method {request.method!r} reads {', '.join(missing)} of a tower, which that of {place.name} does not "
            "give here: choose a method that reads the features alone"
        )
    return made


@dataclass(frozen=True)
class _Saved:
    """tempme.json of a host whose counts follow from each video's size."""

    model: str
    method: str
    num_frames: Annotated[int, Range(1, 100_000)]
    options: Mapping[str, Any]
    budget: float | None = None
    tokens: int | None = None
    where: Literal["tower", "behind"] = "behind"
    frames_at_once: Size | None = None


def saved_behind(made: Reduction, num_frames: int) -> dict[str, Any]:
    """JSON data for `saved_request`."""
    limits = {name: value for name, value in asdict(made.keep).items() if value is not None}
    return {"method": made.method, "num_frames": num_frames, "options": dict(made.given), **limits}


def saved_request(config: Mapping[str, Any]) -> Request:
    """What `saved_behind` or `InTower.config` gave.

    Raises:
        ConfigError: something else.
    """
    saved = read(_Saved, config, "the compression")
    keep = Keep(saved.budget, saved.tokens)
    return Request(saved.method, saved.num_frames, saved.where, keep, saved.options, saved.frames_at_once)


_GRID = (16, 16)  # tokens of a frame, where a plan is made that no video has asked for


def _check_names(kind: type, given: Mapping[str, Any], method: str, place: str) -> None:
    names = [field.name for field in fields(kind)]
    if unknown := set(given) - set(names):
        raise ValueError(
            f"{place} merges behind its tower, where {method!r} takes {', '.join(names) or 'no options'}; "
            f"got {', '.join(sorted(unknown))}"
        )


# ---- compressors


class Compression(Reduction):
    """A compressor.

    Raises:
        ValueError: unknown options or such of other types, or a limit where no option sets how many tokens stay.
    """

    def __init__(self, method: str, given: Mapping[str, Any], keep: Keep, place: Place):
        self.compressor = COMPRESSORS[method]
        _check_names(self.compressor.options, given, method, place.name)
        options: Any = read(self.compressor.options, given, f"{place.name}, method {method!r}")
        self.reads, usual = self.compressor.reads_with(options), asdict(options)
        if keep != Keep() and self.compressor.keep_inside is not None:
            wanted = {**self._kept_inside(method, keep), **given}
            options = read(self.compressor.options, wanted, f"{place.name}, method {method!r}")
            usual = asdict(options)
        elif keep != Keep():
            if self.compressor.keep is None:
                raise ValueError(
                    f"how many tokens {method!r} leaves follows from the video and its own options "
                    f"({', '.join(usual)}): set these in place of budget or tokens"
                )
            solved = set(self.compressor.keep(1.0, place.slots, _GRID)) - set(given)
            usual = {name: value for name, value in usual.items() if name not in solved}
        super().__init__(method, usual, keep, place.fixed)
        if self.compressor.inner is not None:
            self.inner = partial(self.compressor.inner, options)

    def _kept_inside(self, method: str, keep: Keep) -> Mapping[str, Any]:
        """Options by which the layers read a share of the tokens."""
        assert self.compressor.keep_inside is not None
        if keep.budget is None:
            raise ValueError(
                f"{method!r} makes tokens fewer from layer to layer: expected a budget, the share of the visual tokens "
                f"that the layers read on average; got tokens={keep.tokens}"
            )
        return self.compressor.keep_inside(keep.budget)

    def options(self, slots: int, grid: Grid) -> Any:
        """For one video."""
        most = self.most(slots, grid)
        if most is None or self.compressor.keep is None:
            return self.compressor.options(**self.given)
        solved = self.compressor.keep(most / (slots * prod(grid)), slots, grid)
        return self.compressor.options(**{**solved, **self.given})

    def count(self, slots: int, grid: Grid) -> int | None:
        return None if self.compressor.count is None else self.compressor.count(slots, grid, self.options(slots, grid))

    def reduce(self, frames: FrameFeatures, slots: int | None = None) -> KeptFeatures:
        slots, tokens, _ = frames.x.shape
        return by_frame(self.compressor.compress(frames, self.options(slots, frames.grid)), tokens)


# ---- merging methods


class Merging(Reduction):
    """A merging method, a step here for a block of a tower there.

    Raises:
        ValueError: a method that does not work behind a tower, options that do not fit, or a limit where nothing is to
            be chosen.
    """

    def __init__(self, method: str, given: Mapping[str, Any], keep: Keep, place: Place):
        usual = asdict(options_of(method, given, place.name))
        knobs = behind_tower(method).knobs
        if keep != Keep():
            if knobs is None:
                raise ValueError(f"{method!r} behind a tower has no options that a budget or tokens could choose")
            solved = {knob.name for ways in knobs(place.slots, _GRID) for knob in ways} - set(given)
            usual = {name: value for name, value in usual.items() if name not in solved}
        super().__init__(method, usual, keep, place.fixed)
        if keep.tokens is None:
            plan = self.plan(place.slots, _GRID)
        else:  # what can be reached follows from a video's grid, and what is learnt does not
            plan = solved_plan(method, place.slots, _GRID, usual, place.slots * prod(_GRID))
        steps = merge_steps(plan, place.width)
        self.merging = nn.ModuleDict(learnt_modules(steps))

    def plan(self, slots: int, grid: Grid) -> MergeSchedule:
        """The merging of one video."""
        most = self.most(slots, grid)
        if most is None:
            return make_plan(self.method, slots, grid, self.given)
        return solved_plan(self.method, slots, grid, self.given, most, self.fixed)

    def count(self, slots: int, grid: Grid) -> int | None:
        return self.plan(slots, grid).output_tokens

    def cut(self, slots: int, grid: Grid) -> int | None:
        return self.plan(slots, grid).frame_multiple if METHODS[self.method].apart else None

    def reduce(self, frames: FrameFeatures, slots: int | None = None) -> KeptFeatures:
        schedule = replace(self.plan(slots or len(frames.x), frames.grid), frames=len(frames.x))
        steps = merge_steps(schedule, frames.x.shape[-1])
        share_learnt(steps, self.merging)
        return merge(frames, schedule, steps.to(frames.x.device))  # the model may have moved since


def behind_tower(method: str) -> Behind:
    """Raises:
    ValueError: an unknown method, or one that does not work behind a tower.
    """
    if method not in METHODS:
        raise UnknownName(f"unknown method {method!r}; expected one of {', '.join([*METHODS, *COMPRESSORS])}")
    try:
        return METHODS[method].behind_tower()
    except ValueError as error:
        raise ValueError(f"method {method!r} does not work behind a tower: {error}") from error


def options_of(method: str, given: Mapping[str, Any], place: str) -> Any:
    """The options of a method behind a tower (`tempme_vl.merging.Behind`), the defaults filled in.

    Args:
        place: to name in errors.

    Raises:
        ValueError: a method that does not work there; options that are unknown, missing or no such values.
    """
    kind = behind_tower(method).options
    _check_names(kind, given, method, place)
    return read(kind, given, f"{place}, method {method!r}")


def make_plan(method: str, frames: int, grid: Grid, options: Any) -> MergeSchedule:
    """The merging of one video.

    Args:
        frames: T, frames or temporal patches.
        grid: rows and columns of the S tokens of each.
        options: what `options_of` gave, or a mapping of some of them.

    Raises:
        ValueError: options that do not fit.
    """
    if isinstance(options, Mapping):
        options = options_of(method, options, "a host")
    schedule = behind_tower(method).schedule(frames, grid, options)
    if any(plan.insert for plan in schedule.plan):
        raise ValueError(f"method {method!r} inserts tokens, which have no place among those of a host")
    return schedule


def solved_plan(
    method: str, frames: int, grid: Grid, given: Mapping[str, Any], most: int, fixed: int = 0
) -> MergeSchedule:
    """The merging that leaves the most tokens up to a limit, by the options that are not given.

    Args:
        fixed: tokens that always stay, beside these, and that a user counts among them.

    Raises:
        ValueError: a limit that cannot be reached.
    """
    behind = behind_tower(method)
    assert behind.knobs is not None
    limit = Limit("tokens", most, lambda schedule: schedule.output_tokens)
    lowest = []
    for knobs in behind.knobs(frames, grid):
        open_knobs = [knob for knob in knobs if knob.name not in given]

        def make(**values: Any) -> MergeSchedule:
            return make_plan(method, frames, grid, {**values, **given})

        schedule = make(**fit_knobs(make, open_knobs, limit))
        if limit.holds(schedule):
            return schedule
        lowest.append(schedule.output_tokens)
    always = f" and {fixed} that always stay" if fixed else ""
    as_given = f" with {', '.join(sorted(given))} as given" if given else ""
    raise ValueError(
        f"{most + fixed} tokens cannot be reached by {method} behind a tower on {frames} frames "
        f"of {grid[0]} x {grid[1]} tokens{always}{as_given}: the lowest is {min(lowest) + fixed}"
    )


class MergedStep(nn.Module):
    """The steps of one block of a tower, where there is no block."""

    def __init__(self, merge: LayerMerge):
        super().__init__()
        self.before_attention, self.after_attention = merge.before_attention, merge.after_attention
        self.after_mlp = merge.after_mlp

    def forward(self, state: TokenState) -> TokenState:
        """After each step that merges, the tokens of a clip stand in the order of their places."""
        for step in (self.before_attention, self.after_attention, self.after_mlp):
            clips, (_, tokens, _) = state.num_clips, state.x.shape
            state = step(state, AttentionContext.of_tokens(state.x))
            if clips * tokens != state.num_clips * state.x.shape[1]:
                state = in_order(state)
        return state


def in_order(state: TokenState) -> TokenState:
    """The tokens of each clip by the places of those that they continue."""
    assert state.origin is not None
    return state.keep(state.origin.argsort(dim=1))


def merge_steps(schedule: MergeSchedule, width: int) -> nn.ModuleList:
    """The modules of a schedule, for features of a width."""
    return nn.ModuleList(MergedStep(merge) for merge in merge_layers(schedule, width))


def merge(frames: FrameFeatures, schedule: MergeSchedule, steps: Iterable[nn.Module] | None = None) -> KeptFeatures:
    """Merges features by a schedule without CLS tokens, compared by themselves: C clips of K tokens, one behind the
    other, their sources ascending in each.

    Features for deeper layers follow the same matches: the mean of those of the input tokens that a token holds.

    Args:
        steps: what `merge_steps` gave; default: new ones.

    Raises:
        ValueError: tokens that continue none, and so have no place.
    """
    state = TokenState.start(frames.x, len(frames.x), 0, trace_source=True)
    for step in merge_steps(schedule, frames.x.shape[-1]) if steps is None else steps:
        state = step(state)
    state = in_order(state)
    assert state.source is not None and state.origin is not None
    if (state.origin < 0).any():
        raise ValueError(f"method {schedule.method!r} makes tokens that have no place among those of a host")
    clips, tokens, _ = state.x.shape
    inputs, joined = state.source.shape[1], len(frames.x) // clips
    first = inputs * state.origin.new_tensor(range(clips)).unsqueeze(1)
    deeper = tuple(_mean_by_source(x.reshape(-1, inputs, x.shape[-1]), state).flatten(0, 1) for x in frames.deeper)
    spans = tuple(Clip(tokens, clip * joined, (clip + 1) * joined - 1) for clip in range(clips))
    return KeptFeatures(state.x.flatten(0, 1), (state.origin + first).flatten(), deeper, spans)


def merge_pairs(left: KeptFeatures, most: int) -> KeptFeatures:
    """What is left of a video, with at most so many tokens: of all of them, in their order, the most similar pairs of
    every other with one of the others merge (ToMe), as often as it takes, weighted by `left.size`.

    Args:
        left: its clips are lost.
    """
    if len(left.x) <= most:
        return left
    state = TokenState.start(left.x.unsqueeze(0), 1, 0, trace_source=True)
    size = state.size if left.size is None else left.size.view(1, -1, 1).to(state.size)
    state = replace(state, size=size, merged=True)
    while (tokens := state.x.shape[1]) > most:
        pairs = min(tokens - most, tokens // 2)
        state = in_order(apply_merge(state, bipartite_match(state.x.detach(), pairs, 0)))
    assert state.origin is not None
    deeper = tuple(_mean_by_source(x.unsqueeze(0), state, size)[0] for x in left.deeper)
    return KeptFeatures(state.x[0], left.source[state.origin[0]], deeper, size=state.size[0, :, 0])


def _mean_by_source(x: Tensor, state: TokenState, size: Tensor | None = None) -> Tensor:
    """(C, S, D) of input tokens -> (C, K, D), the mean over those that each token holds.

    Args:
        size: (C, S, 1), how much each input token counts.
    """
    source = state.source
    assert source is not None
    held = (source >= 0).unsqueeze(-1)
    weight = held.to(torch.promote_types(x.dtype, torch.float32)) * (1 if size is None else size)
    wide = at_least_float32(x).where(held, 0) * weight
    index = source.clamp(min=0).unsqueeze(-1)
    counts, sums = (t.new_zeros(*state.x.shape[:2], t.shape[-1]) for t in (wide[..., :1], wide))
    counts = counts.scatter_add(1, index, weight.to(wide.dtype))
    sums = sums.scatter_add(1, index.expand_as(wide), wide)
    return (sums / counts).to(x.dtype)
