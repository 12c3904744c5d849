"""What every merging method is made of: steps that map a token state to one with fewer tokens."""

from __future__ import annotations

from dataclasses import dataclass, replace

from torch import Tensor, nn

from tempme_vl.matching import MergeMap
from tempme_vl.merging.schedule import LayerPlan
from tempme_vl.state import TokenState


class TokenMerger(nn.Module):
    """One merging step. The base class leaves the state as it is.

    `forward(state, metric)` gets the features that a method may compare tokens by: before attention the residual
    stream (B*C, N, D), between attention and MLP the keys (B*C, heads, N, D_head). It returns a new state.
    """

    def forward(self, state: TokenState, metric: Tensor) -> TokenState:
        return state


@dataclass(frozen=True)
class LayerMerge:
    """The merging steps of one block: before attention, and between attention and MLP."""

    before_attention: TokenMerger
    after_attention: TokenMerger


def no_clip_step(plan: LayerPlan, method: str) -> None:
    """For methods that never join clips: a plan that wants it would make predicted counts a lie.

    Raises:
        ValueError: the plan joins clips or merges before attention.
    """
    if plan.join is not None or plan.before:
        raise ValueError(f"method {method!r} does not join clips or merge before attention; its schedule has {plan}")


def apply_merge(state: TokenState, merge: MergeMap) -> TokenState:
    """Merges a state's tokens by size-weighted mean; sizes add up, sources follow."""
    if merge.src.shape[1] == 0:
        return state
    x, size = merge.weighted_mean(state.x, state.size)
    source = None if state.source is None else merge.trace(state.source)
    return replace(state, x=x, size=size, source=source, merged=True)
