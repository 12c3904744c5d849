"""STA (ICCV 2023): drops, slot by slot in time, the patches that the slot before already says.

A slot is a part of the video's patches: a frame, or several of a joint tower. In three blocks, every slot loses the
same number of patches. In the first slot, those that are most similar to a neighbour. In a later one each patch has a
score, which the scores of the slot before give it by similarity: what is predicted, and has small features, is
redundant. The middle block goes backwards in time. The method is VideoMAE's, without CLS tokens; that every frame of a
tower with frames apart is a slot is this package's reading of it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from typing import Annotated, Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from tempme_vl.matching import descending
from tempme_vl.merging.base import LayerMerge, TokenMerger, no_clip_step
from tempme_vl.merging.budget import Knob, LimitKind
from tempme_vl.merging.method import Behind, Method
from tempme_vl.merging.schedule import Encoder, LayerCount, LayerPlan, MergeSchedule
from tempme_vl.precision import at_least_float32
from tempme_vl.schema import Layers, Range
from tempme_vl.state import AttentionContext, TokenState


@dataclass(frozen=True)
class Options:
    """keep_rate: share of each slot's patches that stays, 0.5 to 1: in each of the blocks 0, d/3 and 2d/3, or one share
    for each of them.
    behind: what of these blocks: the whole block, as in STA's code, or its attention.
    """

    keep_rate: float | Sequence[float]
    behind: Literal["block", "attention"] = "block"


def published(encoder: Encoder) -> dict[str, Any]:
    """A fit to the 35.7 GFLOPs of B/32 in TempMe's Table 1 (37.1 behind whole blocks): no text has the setting."""
    return {"keep_rate": 0.8, "behind": "attention"} if encoder.layers == 12 and encoder.tokens == 50 else {}


def knobs(encoder: Encoder, kind: LimitKind) -> list[list[Knob]]:
    return [[Knob("keep_rate", 0, 100, lambda step: (200 - step) / 200)]]


def stages(layers: int) -> list[int]:
    """The blocks in which tokens are dropped."""
    return sorted({0, layers // 3, 2 * layers // 3})


def schedule(encoder: Encoder, options: Options) -> MergeSchedule:
    """round(keep_rate * patches) of each slot stay, and at least one. In a joint tower there are as many slots as
    frames, then half and a quarter as many, as long as that is a whole number.

    Raises:
        ValueError: shares that are none, or not one a stage.
    """
    acting, rate = stages(encoder.layers), options.keep_rate
    rates = list(rate) if isinstance(rate, Sequence) else [rate] * len(acting)
    if len(rates) != len(acting) or not all(isinstance(r, (int, float)) and 0.5 <= r <= 1 for r in rates):
        raise ValueError(
            f"keep_rate is the share of the patches that stay, 0.5 to 1 (of the first slot, every second patch can be "
            f"dropped), one for all or for each of the blocks {acting}; got {rate!r}"
        )
    if options.behind not in ("block", "attention"):
        raise ValueError(f"tokens are dropped behind a 'block' or its 'attention'; got behind={options.behind!r}")
    plan, patches, slots = [LayerPlan()] * encoder.layers, encoder.tokens - encoder.prefix, encoder.frames
    for layer, share in zip(acting, rates, strict=True):
        dropped = patches - max(1, round(share * patches))
        in_clip = slots if encoder.joint else 0
        fewer = dropped * max(1, in_clip)
        last = fewer if options.behind == "block" else 0
        plan[layer] = LayerPlan(fewer_after=fewer - last, fewer_last=last, slots=in_clip if dropped else 0)
        patches -= dropped
        if encoder.joint and slots % 2 == 0:
            patches, slots = patches * 2, slots // 2
    return MergeSchedule("sta", encoder.frames, encoder.tokens, tuple(plan), encoder.prefix, encoder.joint)


class SlotDrop(TokenMerger):
    """Drops patches in every slot.

    Args:
        slots: of the whole video, in the order of time.
        dropped: patches of each of them.
        backwards: whether the last slot is the first to be looked at.
    """

    def __init__(self, slots: int, dropped: int, backwards: bool):
        super().__init__()
        self.slots, self.dropped, self.backwards = slots, dropped, backwards

    def forward(self, state: TokenState, context: AttentionContext) -> TokenState:
        p, slots = state.num_prefix, self.slots
        features, x = context.features()[:, p:], state.x.detach()[:, p:]
        in_clip = slots // state.num_clips  # slots of one clip: 1, or all of a joint tower
        patches = x.shape[1] // in_clip
        kept = self.kept(*(t.reshape(-1, slots, patches, t.shape[-1]) for t in (features, x)))
        first = torch.arange(slots, device=kept.device) % in_clip * patches + p
        return state.keep((kept + first.unsqueeze(1)).reshape(x.shape[0], -1))

    @torch.no_grad()
    def kept(self, features: Tensor, x: Tensor) -> Tensor:
        """The patches of each slot that stay, the least redundant first: (B, T, n - r) int64.

        Args:
            features: (B, T, n, D_head) to compare.
            x: (B, T, n, D) tokens.
        """
        with torch.autocast(x.device.type, enabled=False):
            features, x = at_least_float32(features), at_least_float32(x)
            if self.backwards:
                features, x = features.flip(1), x.flip(1)
            unit, strength = F.normalize(features, dim=-1), _from_0_to_1(x.abs().sum(-1))
            left = unit.shape[2] - self.dropped
            # how much each patch of a slot (before) gives to each of the next
            given = (unit[:, 1:] @ unit[:, :-1].transpose(-1, -2)).softmax(dim=-2)
            stay = [_first_slot(unit[:, 0], left)]
            score = torch.ones_like(strength[:, 0])
            for slot in range(1, self.slots):
                score = (given[:, slot - 1] @ score.unsqueeze(-1)).squeeze(-1)
                stay.append(descending(-score * (1 - strength[:, slot]))[:, :left])
                score = torch.zeros_like(score).scatter(1, stay[-1], score.gather(1, stay[-1]))
                score = score / score.sum(1, keepdim=True)
        return torch.stack(stay[::-1] if self.backwards else stay, dim=1)


def _from_0_to_1(values: Tensor) -> Tensor:
    low, high = values.aminmax(dim=-1, keepdim=True)
    return (values - low) / (high - low).clamp(min=torch.finfo(values.dtype).tiny)


def _first_slot(unit: Tensor, left: int) -> Tensor:
    """(B, n, D) -> (B, left) int64: all odd patches, then the even ones that are least similar to any of them."""
    best = (unit[:, ::2] @ unit[:, 1::2].transpose(-1, -2)).amax(-1)
    odd = torch.arange(1, unit.shape[1], 2, device=unit.device).expand(unit.shape[0], -1)
    return torch.cat([odd, 2 * descending(-best)[:, : left - odd.shape[1]]], dim=1)


def layer_merge(schedule: MergeSchedule, layer: int, width: int) -> LayerMerge:
    plan, slots = schedule.plan[layer], schedule.plan[layer].slots or schedule.frames
    no_clip_step(plan, "sta")
    dropped = (plan.fewer_after + plan.fewer_last) // max(1, plan.slots)
    if not dropped:
        return LayerMerge()
    step = SlotDrop(slots, dropped, backwards=stages(len(schedule.plan)).index(layer) == 1)
    return LayerMerge(after_attention=step) if plan.fewer_after else LayerMerge(after_mlp=step)


def matching(plan: LayerPlan, count: LayerCount, width: int, head_width: int) -> int:
    """The first slot's even patches with its odd ones; for every later one all patches with all before, their softmax,
    and the sum of the scores."""
    if not plan.fewer_after + plan.fewer_last:
        return 0
    in_clip = max(1, plan.slots)
    slots, patches = count.clips * in_clip, (count.attention - count.prefix) // in_clip
    first = (patches // 2) * (patches - patches // 2) * head_width
    return first + (slots - 1) * patches**2 * (head_width + 2)


@dataclass(frozen=True)
class BehindOptions:
    """keep_rate: as in `Options`. steps: how often; the stages are those of a tower of so many blocks."""

    keep_rate: Annotated[float, Range(0.5, 1)] = 0.8
    steps: Layers = 3


def behind_schedule(frames: int, grid: tuple[int, int], options: BehindOptions) -> MergeSchedule:
    return schedule(Encoder(options.steps, frames, prod(grid), 0), Options(options.keep_rate))


def behind_knobs(frames: int, grid: tuple[int, int]) -> list[list[Knob]]:
    rate = Knob("keep_rate", 0, 50, lambda fewer: (100 - fewer) / 100)
    return [[Knob("steps", steps, steps), rate] for steps in (3, 6, 12)]


METHOD = Method(
    Options,
    schedule,
    layer_merge,
    published,
    knobs=knobs,
    matching=matching,
    reads=("tokens", "keys"),
    behind=Behind(BehindOptions, behind_schedule, behind_knobs),
)
