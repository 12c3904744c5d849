"""ToMe (ICLR 2023): r pairs merged between attention and MLP of every block, each frame by itself."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from typing import Annotated, Any, Literal

from tempme_vl.matching import bipartite_match
from tempme_vl.merging.base import LayerMerge, TokenMerger, apply_merge, no_clip_step
from tempme_vl.merging.budget import Knob, LimitKind
from tempme_vl.merging.method import Behind, Method
from tempme_vl.merging.schedule import Encoder, LayerPlan, MergeSchedule
from tempme_vl.schema import Count, Layers, Range
from tempme_vl.state import AttentionContext, TokenState


@dataclass(frozen=True)
class Options:
    """r: pairs merged a frame: in every block; one number a block; or (r, inflection), r on average, evenly from
    (1 - inflection) r in the first block to (1 + inflection) r in the last, -1 to 1. A pair is a tuple, or a list of
    two whose second is no number of pairs, such as [8, -1.0].
    proportional: whether a token counts in attention as many times as its size.
    """

    r: int | Sequence[float]
    proportional: bool = True


_PUBLISHED = {50: 2, 197: 10}  # r of CLIP B/32 and B/16 in TempMe's Table 1


def published(encoder: Encoder) -> dict[str, Any]:
    return {"r": _PUBLISHED[encoder.tokens]} if encoder.tokens in _PUBLISHED else {}


def knobs(encoder: Encoder, kind: LimitKind) -> list[list[Knob]]:
    """All pairs, spread evenly over the blocks; the first blocks get one more where they do not divide."""
    layers = encoder.layers

    def spread(pairs: int) -> int | list[int]:
        each, more = divmod(pairs, layers)
        return [each + 1] * more + [each] * (layers - more) if more else each

    return [[Knob("r", 0, layers * ((encoder.clip_tokens - encoder.prefix) // 2), spread)]]


def schedule(encoder: Encoder, options: Options) -> MergeSchedule:
    """r pairs a block, clamped to what the remaining tokens can form.

    Raises:
        ValueError: a negative or broken r, or not one number a block.
    """
    plan, n = [], encoder.clip_tokens
    for pairs in pairs_by_block(options.r, encoder.layers):
        pairs = min(pairs, (n - encoder.prefix) // 2)
        n -= pairs
        plan.append(LayerPlan(after=pairs))
    shape = encoder.frames, encoder.tokens, tuple(plan), encoder.prefix, encoder.joint
    return MergeSchedule("tome", *shape, proportional=options.proportional)


def pairs_by_block(r: int | Sequence[float], layers: int) -> list[int]:
    """The pairs that each block wants to merge; see `Options`. Fractions are cut off, as ToMe's code does.

    Raises:
        ValueError: see `schedule`.
    """
    wanted = inflected(r, layers) or (list(r) if isinstance(r, Sequence) else [r] * layers)
    if len(wanted) != layers or not all(map(_is_count, wanted)):
        raise ValueError(
            f"r counts the pairs merged in each of {layers} blocks, whole and not negative, or is (r, inflection) with "
            f"an inflection from -1 to 1; got {r!r}"
        )
    return [int(pairs) for pairs in wanted]


def inflected(r: int | Sequence[float], layers: int) -> list[float]:
    """The pairs of each block where r is (r, inflection), else nothing; see `Options`."""
    if not isinstance(r, Sequence) or len(r) != 2 or not (isinstance(r, tuple) or not _is_count(r[1])):
        return []
    mean, inflection = r
    if not _is_count(mean) or not -1 <= inflection <= 1:
        return []
    first = int(mean * (1.0 - inflection))
    step = (2 * mean - 2 * first) / max(1, layers - 1)
    return [int(first + step * block) for block in range(layers)] if layers > 1 else [mean]


def _is_count(value: object) -> bool:
    return isinstance(value, int) and value >= 0


class ToMeMerge(TokenMerger):
    """Merges r pairs compared by head-mean keys; without CLS tokens it keeps ToMe's order by similarity."""

    def __init__(self, pairs: int):
        super().__init__()
        self.pairs = pairs

    def forward(self, state: TokenState, context: AttentionContext) -> TokenState:
        order: Literal["position", "similarity"] = "position" if state.num_prefix else "similarity"
        return apply_merge(state, bipartite_match(context.features(), self.pairs, state.num_prefix, order))


def layer_merge(schedule: MergeSchedule, layer: int, width: int) -> LayerMerge:
    plan = schedule.plan[layer]
    no_clip_step(plan, "tome")
    return LayerMerge(after_attention=ToMeMerge(plan.after) if plan.after else TokenMerger())


@dataclass(frozen=True)
class BehindOptions:
    """r: as in `Options`, of steps in place of blocks. steps: how often."""

    r: Count | list[Count] | tuple[Count, Annotated[float, Range(-1, 1)]] = 16
    steps: Layers = 2


def behind_schedule(frames: int, grid: tuple[int, int], options: BehindOptions) -> MergeSchedule:
    return schedule(Encoder(options.steps, frames, prod(grid), 0), Options(options.r))


def behind_knobs(frames: int, grid: tuple[int, int]) -> list[list[Knob]]:
    return [[Knob("steps", steps, steps), Knob("r", 0, prod(grid) // 2)] for steps in (2, 4, 8)]


METHOD = Method(
    Options,
    schedule,
    layer_merge,
    published,
    knobs=knobs,
    divided=True,
    behind=Behind(BehindOptions, behind_schedule, behind_knobs),
    apart=True,
)
