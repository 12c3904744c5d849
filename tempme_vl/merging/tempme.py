"""TempMe (ICLR 2025): ImgMe merges inside a frame, ClipMe joins neighbouring clips and merges across them.

The schedule of section 3: blocks before the first merge layer remove r tokens a frame (ImgMe); each merge
layer joins clips, merges across them before attention and inside the joined clip after it (ClipMe); later
blocks go on merging inside the clip.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor, nn

from tempme_vl.matching import bipartite_match
from tempme_vl.merging.base import LayerMerge, TokenMerger, apply_merge
from tempme_vl.merging.schedule import LayerPlan, MergeSchedule
from tempme_vl.state import TokenState


def schedule(
    layers: int,
    frames: int,
    tokens: int,
    r: int,
    merge_layers: tuple[int, ...],
    merge_frames: tuple[int, ...],
    cross_percent: int,
    intra_percent: int,
    prefix: int = 1,
) -> MergeSchedule:
    """TempMe's token counts. Percentages are *merged* proportions (the paper's 1 - R_C and 1 - R_I), whole numbers
    because int(N * 0.1) and int(N * (1 - 0.9)) differ; they count CLS tokens, and every number is clamped to the
    pairs that can be formed.

    Args:
        r: pairs merged a frame in each block before the first merge layer (ImgMe).
        merge_layers: ascending block numbers that join clips.
        merge_frames: clips joined in each of them; 1 keeps the clips apart but still places and merges.

    Raises:
        ValueError: unknown or unordered layers, lists of different length, percentages outside 0..100, or frames
            that the joins do not divide.
    """
    if len(merge_layers) != len(merge_frames):
        raise ValueError(
            f"one number of joined clips a merge layer: merge_layers={tuple(merge_layers)} has "
            f"{len(merge_layers)}, merge_frames={tuple(merge_frames)} has {len(merge_frames)}"
        )
    if list(merge_layers) != sorted(set(merge_layers)) or not all(0 <= n < layers for n in merge_layers):
        raise ValueError(
            f"merge_layers must ascend within 0..{layers - 1} for a tower of {layers} layers; got {tuple(merge_layers)}"
        )
    for name, percent in (("cross_percent", cross_percent), ("intra_percent", intra_percent)):
        if not isinstance(percent, int) or not 0 <= percent <= 100:
            raise ValueError(f"{name} is a whole number of percent merged, 0..100; got {percent!r}")
    if not isinstance(r, int) or r < 0:
        raise ValueError(f"r counts the pairs merged a frame in each early block, a whole number >= 0; got {r!r}")

    joins = dict(zip(merge_layers, merge_frames, strict=True))
    first_merge = merge_layers[0] if merge_layers else layers
    plan, n, num_prefix = [], tokens, prefix
    for layer in range(layers):
        join = joins.get(layer)
        n, num_prefix = n * (join or 1), num_prefix * (join or 1)
        cross = 0 if join is None else min((n - num_prefix) // 2, n * cross_percent // 100)
        wanted = r if layer < first_merge else (n - cross) * intra_percent // 100
        intra = min((n - cross - num_prefix) // 2, wanted)
        n -= cross + intra
        plan.append(LayerPlan(join, cross, intra))
    return MergeSchedule("tempme", frames, tokens, tuple(plan), prefix)


class IntraClipMerge(TokenMerger):
    """Merges the most similar pairs inside each clip, compared by head-mean keys: ImgMe, and ClipMe's second step."""

    def __init__(self, pairs: int):
        super().__init__()
        self.pairs = pairs

    def forward(self, state: TokenState, metric: Tensor) -> TokenState:
        return apply_merge(state, bipartite_match(metric.mean(1), self.pairs, state.num_prefix))


class ClipPosition(nn.Module):
    """A learnt vector for each clip, added to all its tokens: (B*C, N, D) -> (B*C, N, D).

    Zero at first, which starts at the pretrained function; training from scratch needs it random (docs/LOG.md).
    """

    def __init__(self, clips: int, width: int):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(clips, width))

    def forward(self, x: Tensor) -> Tensor:
        clips = len(self.weight)
        return (x.unflatten(0, (-1, clips)) + self.weight.unsqueeze(1).to(x.dtype)).flatten(0, 1)


class CrossClipMerge(TokenMerger):
    """ClipMe's first step: joins clips, tells them apart by a learnt position, merges across them.

    The match compares the tokens as they are before the clip position is added (section 3.3).

    Args:
        clips: clips of the video before the join.
        join: neighbouring clips joined.
        pairs: pairs merged in each joined clip.
        width: D.
    """

    def __init__(self, clips: int, join: int, pairs: int, width: int):
        super().__init__()
        self.join, self.pairs = join, pairs
        self.clip_position = ClipPosition(clips, width)

    def forward(self, state: TokenState, metric: Tensor) -> TokenState:
        placed = replace(state, x=self.clip_position(state.x)).join_clips(self.join)
        compared = replace(state, x=metric).join_clips(self.join).x
        return apply_merge(placed, bipartite_match(compared, self.pairs, placed.num_prefix))


def layer_merge(plan: LayerPlan, clips: int, width: int) -> LayerMerge:
    """The modules of one block; `clips` counts those before its join."""
    before = TokenMerger() if plan.join is None else CrossClipMerge(clips, plan.join, plan.before, width)
    after = IntraClipMerge(plan.after) if plan.after else TokenMerger()
    return LayerMerge(before, after)
