"""EViT (ICLR 2022): keeps the patches that the CLS token attends to most, and one token for all others.

Between attention and MLP of some blocks, each frame by itself; section 3 of the paper.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from tempme_vl.matching import descending
from tempme_vl.merging.base import LayerMerge, TokenMerger, attention_of_cls, cls_row_cost, no_clip_step
from tempme_vl.merging.budget import Knob, LimitKind
from tempme_vl.merging.method import Method
from tempme_vl.merging.schedule import Encoder, LayerCount, LayerPlan, MergeSchedule
from tempme_vl.state import AttentionContext, TokenState


@dataclass(frozen=True)
class Options:
    """keep_rate: share of the patches that stay, above 0 to 1: in a quarter, half and three quarters of the blocks
    (3, 6, 9 of 12), or one share a block. An earlier fused token counts as a patch.
    fuse: whether the others become one token, or are dropped.
    """

    keep_rate: float | Sequence[float]
    fuse: bool = True


def published(encoder: Encoder) -> dict[str, Any]:
    """The paper's main setting; TempMe's table has the same for CLIP (37.2 GFLOPs for B/32)."""
    return {"keep_rate": 0.7} if encoder.layers == 12 and encoder.tokens in (50, 197) else {}


def knobs(encoder: Encoder, kind: LimitKind) -> list[list[Knob]]:
    return [[Knob("keep_rate", 0, 199, lambda step: (200 - step) / 200)]]


def schedule(encoder: Encoder, options: Options) -> MergeSchedule:
    """ceil(keep_rate * patches) stay, and at least one.

    Raises:
        ValueError: shares that are none, or not one a block.
    """
    layers, plan, patches = encoder.layers, [], encoder.tokens - encoder.prefix
    for rate in _rates(options.keep_rate, layers):
        dropped = patches - math.ceil(rate * patches)
        fused = int(options.fuse and dropped > 0)
        plan.append(LayerPlan(fewer_after=dropped - fused, gathered=dropped * fused))
        patches -= dropped - fused
    shape = encoder.frames, encoder.tokens, tuple(plan), encoder.prefix, encoder.joint
    return MergeSchedule("evit", *shape, proportional=False)


def _rates(given: float | Sequence[float], layers: int) -> list[float]:
    if isinstance(given, Sequence):
        rates = list(given)
    else:
        acting = {layers // 4, layers // 2, 3 * layers // 4}
        rates = [given if layer in acting else 1 for layer in range(layers)]
    if len(rates) != layers or not all(isinstance(rate, (int, float)) and 0 < rate <= 1 for rate in (*rates, 1)):
        raise ValueError(
            f"keep_rate is the share of the patches that stay, above 0 to 1, one for all or one for each of {layers} "
            f"blocks; got {given!r}"
        )
    return rates


class AttentiveKeep(TokenMerger):
    """Keeps the patches with the most attention of the CLS token, in descending order of it.

    Args:
        fewer: patches that a frame has fewer afterwards.
        fuse: whether the others become one token behind those that stay: their sum weighted by that attention, which
            is not normalised again.
    """

    def __init__(self, fewer: int, fuse: bool):
        super().__init__()
        self.fewer, self.fuse = fewer, fuse

    def forward(self, state: TokenState, context: AttentionContext) -> TokenState:
        p, attention = state.num_prefix, attention_of_cls(state, context)
        kept = descending(attention)[:, : attention.shape[1] - self.fewer - int(self.fuse)]
        fused = None
        if self.fuse:
            of_others = attention.scatter(1, kept, 0.0).to(state.x.dtype)
            fused = of_others.unsqueeze(1) @ state.x[:, p:]
        return state.keep(kept + p, fused)


def layer_merge(schedule: MergeSchedule, layer: int, width: int) -> LayerMerge:
    plan = schedule.plan[layer]
    no_clip_step(plan, "evit")
    acts = plan.fewer_after or plan.gathered
    return LayerMerge(after_attention=AttentiveKeep(plan.fewer_after, plan.gathered > 0) if acts else TokenMerger())


def matching(plan: LayerPlan, count: LayerCount, width: int, head_width: int) -> int:
    """The CLS token's row of attention, and the weighted sum, which runs over all patches."""
    if not (plan.fewer_after or plan.gathered):
        return 0
    summed = (count.attention - count.prefix) * width if plan.gathered else 0
    return count.clips * (cls_row_cost(count.attention, width, head_width) + summed)


METHOD = Method(
    Options,
    schedule,
    layer_merge,
    published,
    knobs=knobs,
    matching=matching,
    reads=("cls_rows",),
    apart=True,
)
