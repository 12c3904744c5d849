"""DiffRate (ICCV 2023): drops the patches that the CLS token attends to least, and merges the next ones into the rest.

Between attention and MLP, each frame by itself: patches are sorted by the attention of the CLS token, the last ones are
dropped, and each of the next goes into the most similar of the patches that stay. How many stay is fixed for every
block; `tempme_vl.merging.diffrate_search` learns the numbers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch

from tempme_vl.matching import descending, match_last
from tempme_vl.merging.base import LayerMerge, TokenMerger, attention_of_cls, cls_row_cost, no_clip_step
from tempme_vl.merging.budget import Knob, LimitKind
from tempme_vl.merging.diffrate_search import SearchStep
from tempme_vl.merging.method import Method
from tempme_vl.merging.schedule import Encoder, LayerCount, LayerPlan, MergeSchedule
from tempme_vl.precision import at_least_float32
from tempme_vl.state import AttentionContext, TokenState


@dataclass(frozen=True)
class Options:
    """merge_kept: tokens of a frame, CLS included, that leave each block; or "search" for a front end that keeps them
    all and learns the numbers.
    prune_kept: tokens that each block has left when some were dropped and none merged yet. Default: three tenths of
    what a block loses are dropped, which is the share in the published schedule of ViT-B.
    granularity: of a search, the step from one number to the next.
    """

    merge_kept: Sequence[int] | Literal["search"]
    prune_kept: Sequence[int] | None = None
    granularity: int = 4


# The authors' schedule for ViT-B (MAE) at 11.5 GFLOPs an image; it gives the tokens (588) and GFLOPs (138.5) of
# TempMe's Table 1. For B/32 (36.8 GFLOPs, 40% of the tokens) no text gives the numbers: these are a fit.
_PUBLISHED: dict[int, dict[str, Any]] = {
    197: {
        "merge_kept": (197, 192, 178, 164, 150, 133, 115, 101, 96, 82, 49, 49),
        "prune_kept": (197, 196, 182, 172, 162, 147, 131, 109, 101, 94, 70, 49),
    },
    50: {"merge_kept": (50, 46, 42, 40, 37, 34, 32, 29, 27, 24, 22, 20)},
}


def published(encoder: Encoder) -> dict[str, Any]:
    return _PUBLISHED.get(encoder.tokens, {}) if encoder.layers == 12 else {}


def knobs(encoder: Encoder, kind: LimitKind) -> list[list[Knob]]:
    """What all blocks but the first lose, spread evenly over them; the first of them lose one more where it does not
    divide."""
    later, least = encoder.layers - 1, encoder.prefix + 1

    def spread(lost: int) -> list[int]:
        kept = [encoder.tokens]
        for block in range(later):
            kept.append(max(least, kept[-1] - lost // later - (block < lost % later)))
        return kept

    return [[Knob("merge_kept", 0, later * (encoder.tokens - least), spread)]]


def schedule(encoder: Encoder, options: Options) -> MergeSchedule:
    """As many tokens as are kept, or as there are, if those are fewer.

    Raises:
        ValueError: numbers that are none, leave no patch, or are not one a block.
    """
    layers, n, wanted = encoder.layers, encoder.tokens, options.merge_kept
    shape = encoder.frames, encoder.tokens
    if isinstance(wanted, str):
        if wanted != "search" or options.prune_kept is not None or options.granularity < 1:
            raise ValueError(
                f"a search has merge_kept='search', no prune_kept and a granularity of at least 1; got {options}"
            )
        settings = (("granularity", options.granularity),)
        return MergeSchedule("diffrate", *shape, (LayerPlan(),) * layers, encoder.prefix, settings=settings)
    for name, kept in (("merge_kept", wanted), ("prune_kept", options.prune_kept)):
        if kept is not None and (
            len(kept) != layers or not all(isinstance(k, int) and k > encoder.prefix for k in kept)
        ):
            raise ValueError(
                f"{name} counts the tokens of a frame that each of {layers} blocks keeps, the {encoder.prefix} CLS and "
                f"at least one patch among them; got {kept!r}"
            )
    plan = []
    for layer in range(layers):
        left = min(n, wanted[layer])
        pruned = 3 * (n - left) // 10
        if options.prune_kept is not None:
            pruned = n - min(n, options.prune_kept[layer])
            left = min(left, n - pruned)
        plan.append(LayerPlan(fewer_after=n - left, gathered=n - left - pruned))
        n = left
    return MergeSchedule("diffrate", *shape, tuple(plan), encoder.prefix, encoder.joint)


class PruneMerge(TokenMerger):
    """Sorts the patches of a frame by the CLS token's attention, drops the last and merges the last of the others.

    Tokens become the plain mean of those that go together. How many tokens one counts for in attention grows by the
    cosine of each that it takes in, which is `TokenState.weight`; its size, by what that one holds.
    """

    def __init__(self, dropped: int, merged: int):
        super().__init__()
        self.dropped, self.merged = dropped, merged

    def forward(self, state: TokenState, context: AttentionContext) -> TokenState:
        ranked = descending(attention_of_cls(state, context))
        state = state.keep(ranked[:, : ranked.shape[1] - self.dropped] + state.num_prefix)
        return merge_last(state, self.merged) if self.merged else state


def merge_last(state: TokenState, r: int) -> TokenState:
    """Merges the last r tokens of a frame into the most similar ones before them."""
    match, cosine = match_last(state.x, r, state.num_prefix)
    weight = state.size if state.weight is None else state.weight
    kept = weight.shape[1] - r
    weight = match.sum(torch.cat([weight[:, :kept], weight[:, kept:] * cosine.unsqueeze(-1)], dim=1))
    return state.regroup(
        match.mean(at_least_float32(state.x)).to(state.x.dtype),
        match.sum(state.size),
        assignment=lambda: match.assignment,
        base=lambda: match.base,
        weight=weight,
    )


def layer_merge(schedule: MergeSchedule, layer: int, width: int) -> LayerMerge:
    """The last block sorts in any case, so that tokens leave in the order of their importance."""
    plan, settings = schedule.plan[layer], dict(schedule.settings)
    no_clip_step(plan, "diffrate")
    if granularity := settings.get("granularity"):
        patches = schedule.tokens - schedule.prefix
        return LayerMerge(after_attention=SearchStep(patches, int(granularity)) if layer else TokenMerger())
    if not plan.fewer_after and not (schedule.changes and layer == len(schedule.plan) - 1):
        return LayerMerge()
    return LayerMerge(after_attention=PruneMerge(plan.fewer_after - plan.gathered, plan.gathered))


def matching(plan: LayerPlan, count: LayerCount, width: int, head_width: int) -> int:
    """The CLS token's row of attention, and each merged token with all that stay. The row that a last block which loses
    nothing sorts by is left out."""
    if not plan.fewer_after:
        return 0
    compared = plan.gathered * (count.mlp - count.prefix) * width
    return count.clips * (cls_row_cost(count.attention, width, head_width) + compared)


METHOD = Method(
    Options,
    schedule,
    layer_merge,
    published,
    knobs=knobs,
    matching=matching,
    reads=("tokens", "cls_rows"),
    apart=True,
)
