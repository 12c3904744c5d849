"""ToMe (ICLR 2023): r pairs merged between attention and MLP of every block, each frame by itself."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from torch import Tensor

from tempme_vl.matching import bipartite_match
from tempme_vl.merging.base import LayerMerge, TokenMerger, apply_merge, no_clip_step
from tempme_vl.merging.schedule import LayerPlan, MergeSchedule
from tempme_vl.state import TokenState


def schedule(
    layers: int, frames: int, tokens: int, r: int | Sequence[int], prefix: int = 1, joint: bool = False
) -> MergeSchedule:
    """r pairs a block, clamped to what the remaining tokens can form.

    Args:
        r: for all blocks, or one number a block.

    Raises:
        ValueError: a negative or broken r, or not one number a block.
    """
    wanted = list(r) if isinstance(r, Sequence) else [r] * layers
    if len(wanted) != layers or not all(isinstance(pairs, int) and pairs >= 0 for pairs in wanted):
        raise ValueError(f"r counts the pairs merged in each of {layers} blocks, whole and not negative; got {r!r}")
    plan, n = [], tokens * (frames if joint else 1)
    for pairs in wanted:
        pairs = min(pairs, (n - prefix) // 2)
        n -= pairs
        plan.append(LayerPlan(after=pairs))
    return MergeSchedule("tome", frames, tokens, tuple(plan), prefix, joint)


class ToMeMerge(TokenMerger):
    """Merges r pairs compared by head-mean keys; without CLS tokens it keeps ToMe's order by similarity."""

    def __init__(self, pairs: int):
        super().__init__()
        self.pairs = pairs

    def forward(self, state: TokenState, metric: Tensor) -> TokenState:
        order: Literal["position", "similarity"] = "position" if state.num_prefix else "similarity"
        return apply_merge(state, bipartite_match(metric.mean(1), self.pairs, state.num_prefix, order))


def layer_merge(plan: LayerPlan, clips: int, width: int) -> LayerMerge:
    no_clip_step(plan, "tome")
    return LayerMerge(TokenMerger(), ToMeMerge(plan.after) if plan.after else TokenMerger())
