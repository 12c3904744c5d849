"""How many pairs merge along time inside a tower that keeps its grid, and where: fixed before the tower runs.

A tube is one place of the grid over time, and a run is consecutive slots of a tube that have one set of states. In the
beginning each slot of a tube is a run; merging joins neighbouring runs of one tube, never of two.

Letters: T slots (temporal patches of a video), S places of a slot (blocks of 2x2 patches, each a token to the language
model), c slots of a clip, n pairs that merge in each clip.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Annotated, NamedTuple

from tempme_vl.schema import COUNT, Count, Range

_CLIP = Range(2, COUNT.high)
# pairs of the first, second, ... step as tenths of the places. For 16 slots and steps before the blocks 8, 16 and 24
# of 32, 44 % of the tokens are left; steps behind the third are as the third
_TENTHS = (6, 8, 5)


@dataclass(frozen=True)
class TubeStep:
    """One merging.

    Attributes:
        layer: it happens in front of this block, counted from 0; behind the last one where it is the tower's depth.
        clip: c, slots that are joined then, counted from the first of the video.
        pairs: n, pairs of runs that merge in each clip.
    """

    layer: Count
    clip: Annotated[int, _CLIP]
    pairs: Count


class ClipCount(NamedTuple):
    """A clip behind a step.

    Attributes:
        slots: that it joins.
        pairs: that have merged in this step.
        runs: that are left.
        fewest: runs that each of its tubes has at least.
    """

    slots: int
    pairs: int
    runs: int
    fewest: int


@dataclass(frozen=True)
class TubePlan:
    """What happens to a video.

    Attributes:
        steps: by ascending layers, several in front of one block in their order. The clips of each are made of whole
            clips of the one before.

    Raises:
        ValueError: steps in another order, clips that are no multiple of those before, or negative numbers.
    """

    steps: tuple[TubeStep, ...] = ()

    def __post_init__(self) -> None:
        size, layer = 1, 0
        for step in self.steps:
            if step.layer < layer or step.clip not in _multiples(size) or step.pairs < 0:
                raise ValueError(
                    f"expected a layer from {layer} on, a clip of at least 2 slots that is a multiple of the {size} "
                    f"joined before, and pairs from 0 on; got {step}"
                )
            size, layer = step.clip, step.layer

    def clips(self, slots: int, places: int) -> list[tuple[ClipCount, ...]]:
        """The clips of a video in the beginning, and behind each step.

        A last clip that is short merges n scaled by its slots, rounded down, or as many pairs as it is sure to have.

        Args:
            slots: T.
            places: S.

        Raises:
            ValueError: no slot or place, or a step that wants more pairs than a clip is sure to have.
        """
        if slots < 1 or places < 1:
            raise ValueError(f"expected at least 1 slot and 1 place; got {slots} and {places}")
        after, size = [(ClipCount(1, 0, places, 1),) * slots], 1
        for step in self.steps:
            joined, ratio = after[-1], step.clip // size
            parts = [joined[start : start + ratio] for start in range(0, len(joined), ratio)]
            after.append(tuple(_merged(_joined(part), step, places) for part in parts))
            size = step.clip
        return after

    def counts(self, slots: int, places: int) -> list[int]:
        """Runs in the beginning and behind each step; the last are the tokens that the language model reads.

        Args, Raises: see `clips`.
        """
        return [sum(clip.runs for clip in clips) for clips in self.clips(slots, places)]


def sure_pairs(slots: int, runs: int, fewest: int, places: int) -> int:
    """Pairs that a clip can merge at least, however its runs lie among its tubes.

    A tube with k runs gives floor(k / 2) pairs, as none is in two. That is least where most tubes have an odd number
    of runs: at most all of them, and of those with `fewest` or with `slots` runs, if these are even, only as many as
    have one more or one less.
    """
    pairs = max(places * (fewest // 2), -(-(runs - places) // 2))
    return pairs if slots % 2 else max(pairs, runs - places * (slots // 2))


def _multiples(size: int) -> range:
    """Clips that may follow clips of a size."""
    return range(max(size, 2), int(COUNT.high) + 1, size)


def _joined(parts: Sequence[ClipCount]) -> ClipCount:
    """Neighbouring clips as one."""
    slots, _, runs, fewest = (sum(values) for values in zip(*parts, strict=True))
    return ClipCount(slots, 0, runs, fewest)


def _merged(clip: ClipCount, step: TubeStep, places: int) -> ClipCount:
    sure = sure_pairs(clip.slots, clip.runs, clip.fewest, places)
    pairs = step.pairs
    if clip.slots < step.clip:
        pairs = min(pairs * clip.slots // step.clip, sure)
    elif pairs > sure:
        raise ValueError(
            f"the step before block {step.layer} wants to merge {pairs} pairs in each clip of {step.clip} slots, which "
            f"with {places} places and {clip.runs} runs is sure to have {sure}; lower pairs, or join more slots"
        )
    # of k runs of a tube at most floor(k / 2) are gone
    fewest = clip.fewest if pairs == 0 else -(-clip.fewest // 2)
    return ClipCount(clip.slots, pairs, clip.runs - pairs, fewest)


def tube_plan(
    depth: int, slots: int, places: int, *, share: float | None = None, tokens: int | None = None
) -> TubePlan:
    """A plan whose clips double, in front of blocks that are spread evenly over the tower.

    Without a budget up to three steps join 2, 4 and 8 slots, as many as the video has, and merge .6, .8 and .5 of the
    places in each clip. With one, the same steps, or more where these do not suffice, merge in these proportions just
    as much as needed. An image has no step.

    Args:
        depth: blocks of the tower.
        slots: T.
        places: S.
        share: of the T * S tokens that may be left.
        tokens: that may be left.

    Raises:
        ValueError: both given, or fewer tokens than the steps can leave.
    """
    if share is not None and tokens is not None:
        raise ValueError(f"expected a share or a number of tokens; got both, {share} and {tokens}")
    most = slots.bit_length() - 1  # times that clips can double
    if share is None and tokens is None:
        return _doubling(depth, [places * tenths // 10 for tenths in _TENTHS[:most]])
    limit = tokens if share is None else int(share * slots * places + 1e-6)
    assert limit is not None

    def left(pairs: Sequence[int]) -> int:
        return _doubling(depth, pairs).counts(slots, places)[-1]

    steps = min(len(_TENTHS), most)
    while steps < most and left([places] * steps) > limit:
        steps += 1
    least = left([places] * steps)
    if least > limit:
        raise ValueError(
            f"expected a budget of at least {least} of the {slots * places} tokens of {slots} slots with {places} "
            f"places; got {limit}"
        )
    tenths = [*_TENTHS, *[_TENTHS[-1]] * steps][:steps]

    def pairs_at(level: int) -> list[int]:
        return [min(places, -(-level * each // max(_TENTHS))) for each in tenths]

    levels = range(2 * places + 1)  # at the last one every step merges all places
    pairs = pairs_at(bisect_left(levels, -limit, key=lambda level: -left(pairs_at(level))))
    for step in range(steps):  # the first has the most clips, and so gives back the most at once
        while pairs[step] and left([*pairs[:step], pairs[step] - 1, *pairs[step + 1 :]]) <= limit:
            pairs[step] -= 1
    return _doubling(depth, _nearest(pairs, places, limit, left))


def _nearest(pairs: Sequence[int], places: int, limit: int, left: Callable[[Sequence[int]], int]) -> Sequence[int]:
    """Pairs near these of which as many tokens are left as may be. For slots that all clips divide these are they; a
    short clip has another number of pairs, which may need one more here for one less there."""
    rest = [range(max(0, n - 4), min(places, n + 4) + 1) for n in pairs[-3:]]
    near = [pairs, *([*pairs[:-3], *last] for last in product(*rest))] if left(pairs) < limit else [pairs]
    return max((each for each in near if left(each) <= limit), key=left)


def _doubling(depth: int, pairs: Sequence[int]) -> TubePlan:
    """Steps that join 2, 4, 8, ... slots; one without pairs is left out."""
    parts = len(pairs) + 1
    layers = [max(1, (2 * depth * number + parts) // (2 * parts)) for number in range(1, parts)]
    steps = (TubeStep(layer, 2**number, n) for number, (layer, n) in enumerate(zip(layers, pairs, strict=True), 1))
    return TubePlan(tuple(step for step in steps if step.pairs))
