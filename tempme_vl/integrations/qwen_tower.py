"""The vision towers of Qwen2-VL, Qwen2.5-VL, Qwen3-VL and Qwen3-VL-MoE, with merging along time between their blocks.

These towers see each temporal patch of two frames by itself, some of them in windows, with rotary positions of row and
column. Here their own modules run one by one, and between them runs of one 2x2 block over time merge
(`tempme_vl.merging.tubes`). With nothing merged the result is the tower's own, bit for bit.

Letters: T temporal patches (slots) of a video, S blocks of each, u patches of a block; R blocks that are left of all
videos, R * u patches; D the tower's width.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from tempme_vl.compressors.base import Clip, KeptFeatures
from tempme_vl.integrations.qwen_attention import Pattern, attention
from tempme_vl.integrations.qwen_parts import Grid, Layout, check_tower, embedded, layout_of
from tempme_vl.libraries import undocumented
from tempme_vl.merging.tube_plan import ClipCount, TubePlan
from tempme_vl.merging.tubes import Tubes

Clips: TypeAlias = Sequence[ClipCount]  # of all videos, one behind the other


@dataclass(frozen=True)
class TubeOptions:
    """How runs merge and attend.

    Attributes:
        attend: "slot": a slot by itself, to all runs that cover it (`Tubes.by_slot`), as the tower was trained.
            "clip": all runs of a clip to each other, by their lengths (`Tubes.by_clip`), as in TempMe.
        compare: runs by "keys", of the block before, mean over heads; or by "states", which go into the next block.
        recompute: blocks in the backward pass.

    Raises:
        ValueError: another word.
    """

    attend: Literal["slot", "clip"] = "slot"
    compare: Literal["keys", "states"] = "keys"
    recompute: bool = False

    def __post_init__(self) -> None:
        for name, value, known in (
            ("attend", self.attend, ("slot", "clip")),
            ("compare", self.compare, ("keys", "states")),
        ):
            if value not in known:
                raise ValueError(f"{name}: expected {' or '.join(map(repr, known))}; got {value!r}")


@dataclass(frozen=True)
class _Rows:
    """What of the tower is as long as there are patches.

    Attributes:
        x: (R * u, D).
        angles: cosines and sines, (R * u, 1, 1, D_head) float.
        taps: (R * u, D) each, states for deeper layers of the language model.
        keys: (R * u, D_head), mean over heads, of the block before; None where no step compares them.
    """

    x: Tensor
    angles: tuple[Tensor, Tensor]
    taps: tuple[Tensor, ...]
    keys: Tensor | None


@undocumented("transformers")
def run_tower(
    tower: Any,
    pixels: Tensor,
    grids: Sequence[Grid],
    plans: Sequence[TubePlan],
    options: TubeOptions | None = None,
) -> list[KeptFeatures]:
    """Videos through a tower and its merger, with merging on the way.

    Args:
        tower: that of a model (`check_tower`), on any device, perhaps with adapters on its modules.
        pixels: (sum of t * h * w, P), patches of all videos, as the host's preprocessing gives them.
        grids: of each video t, h, w: temporal patches (T), rows and columns of patches.
        plans: of each video, for T slots and S blocks; steps lie in front of the tower's blocks or behind the last.

    Returns:
        for each video (M, D_llm) and what goes to deeper layers, ascending by source: T * S numbers, slot by slot,
        of which each token has that of the first slot that it covers. The clips are those of the last step.

    Raises:
        ValueError: an unknown tower; grids that are not of these pixels, or that blocks do not divide; a plan that
            does not fit its video or the tower; "clip" with flash attention, which adds nothing to single keys.
    """
    options = options or TubeOptions()
    check_tower(tower)
    unit = tower.spatial_merge_size**2
    _check_grids(pixels, grids, plans, tower.spatial_merge_size)
    video_grids = [(t, h * w // unit) for t, h, w in grids]
    steps = _steps(plans, video_grids)
    _check_layers(steps, len(tower.blocks), options)
    layout = layout_of(tower, grids, pixels.device)

    tubes = Tubes.start(video_grids, pixels.device)
    clips: Clips = [ClipCount(1, 0, S, 1) for T, S in video_grids for _ in range(T)]
    x, *angles = embedded(tower, pixels, grids, layout.order)
    rows = _Rows(x, (angles[0], angles[1]), (), None)
    patterns = _patterns(tower, tubes, clips, layout, options)
    depth, taps_at = len(tower.blocks), list(getattr(tower, "deepstack_visual_indexes", ()))
    for layer in range(depth):
        if layer in steps:
            rows, tubes, clips = _merge(rows, tubes, steps[layer], options)
            patterns = _patterns(tower, tubes, clips, layout, options)
        pattern = patterns["full" if layer in layout.full_at else "windows"]
        x, keys = _run_block(tower, layer, rows, pattern, options)
        compared = keys.detach().mean(1) if layer + 1 in steps and options.compare == "keys" else None
        rows = _Rows(x, rows.angles, (*rows.taps, x) if layer in taps_at else rows.taps, compared)
    if depth in steps:
        rows, tubes, clips = _merge(rows, tubes, steps[depth], options)

    levels = [tower.merger(rows.x)]
    for layer, x in zip(sorted(taps_at), rows.taps, strict=True):  # in the order of the blocks, as the host has them
        levels.append(tower.deepstack_merger_list[taps_at.index(layer)](x))
    return _by_video(levels, tubes, layout.order, clips, video_grids)


def _check_grids(pixels: Tensor, grids: Sequence[Grid], plans: Sequence[TubePlan], side: int) -> None:
    patches = sum(t * h * w for t, h, w in grids)
    if len(plans) != len(grids) or len(pixels) != patches:
        raise ValueError(
            f"expected a plan for each of {len(grids)} grids and pixels of their {patches} patches; got {len(plans)} "
            f"plans and {len(pixels)} patches"
        )
    for grid in grids:
        if min(grid) < 1 or grid[1] % side or grid[2] % side:
            raise ValueError(f"expected a grid of t, h and w, where {side} divides h and w; got {tuple(grid)}")


def _steps(plans: Sequence[TubePlan], grids: Sequence[tuple[int, int]]) -> dict[int, list[Clips]]:
    """The clips of all videos behind each step, by the layer that it stands in front of. A video without a step where
    another has one stays as it is."""
    now = [plan.clips(*grid)[0] for plan, grid in zip(plans, grids, strict=True)]
    left = [list(zip(plan.steps, plan.clips(*grid)[1:], strict=True)) for plan, grid in zip(plans, grids, strict=True)]
    found: dict[int, list[Clips]] = {}
    while layers := [each[0][0].layer for each in left if each]:
        for video, each in enumerate(left):
            if each and each[0][0].layer == min(layers):
                now[video] = each.pop(0)[1]
            else:
                now[video] = tuple(clip._replace(pairs=0) for clip in now[video])
        found.setdefault(min(layers), []).append([clip for clips in now for clip in clips])
    return found


def _check_layers(steps: Mapping[int, object], depth: int, options: TubeOptions) -> None:
    first = 1 if options.compare == "keys" else 0
    if wrong := [layer for layer in steps if not first <= layer <= depth]:
        raise ValueError(
            f"expected steps before the blocks {first} to {depth} of a tower with {depth} blocks, of which {depth} is "
            f"behind the last, where runs are compared by {options.compare}; got {wrong}"
        )


def _patterns(tower: Any, tubes: Tubes, clips: Clips, layout: Layout, options: TubeOptions) -> dict[str, Pattern]:
    """Who attends to whom until the next step, in windows and in whole slots."""
    unit, flash = tower.spatial_merge_size**2, "flash" in tower.config._attn_implementation
    patterns = {}
    for name, lengths in layout.lengths.items():
        segments = tubes.by_slot(lengths) if options.attend == "slot" else tubes.by_clip(lengths, clips)
        patterns[name] = (
            Pattern.packed(segments, unit, layout.longest[name]) if flash else Pattern.batched(segments, unit)
        )
    return patterns


def _merge(rows: _Rows, tubes: Tubes, steps: Sequence[Clips], options: TubeOptions) -> tuple[_Rows, Tubes, Clips]:
    """The steps in front of a block, and the clips behind them."""
    for clips in steps:
        if not any(clip.pairs for clip in clips):
            continue
        count = len(tubes.begin)
        compared = rows.x.detach() if options.compare == "states" else rows.keys
        assert compared is not None
        match = tubes.match(compared.reshape(count, -1), clips)
        x, *taps = (match.mean(t.reshape(count, -1)).reshape(-1, t.shape[-1]) for t in (rows.x, *rows.taps))
        # runs of one place have the same angles
        cosines, sines = (match.take(t.unflatten(0, (count, -1))).flatten(0, 1) for t in rows.angles)
        keys = None if rows.keys is None else match.mean(rows.keys.reshape(count, -1)).reshape(-1, rows.keys.shape[-1])
        rows, tubes = _Rows(x, (cosines, sines), tuple(taps), keys), tubes.merge(match)
    return rows, tubes, steps[-1]


def _run_block(tower: Any, layer: int, rows: _Rows, pattern: Pattern, options: TubeOptions) -> tuple[Tensor, Tensor]:
    """States behind a block, and its keys."""
    block, implementation = tower.blocks[layer], tower.config._attn_implementation

    def run(x: Tensor) -> tuple[Tensor, Tensor]:
        y, keys = attention(block.attn, implementation, block.norm1(x), rows.angles, pattern)
        x = x + y
        return x + block.mlp(block.norm2(x)), keys

    if options.recompute and torch.is_grad_enabled():
        return checkpoint(run, rows.x, use_reentrant=False)
    return run(rows.x)


def _by_video(
    levels: Sequence[Tensor], tubes: Tubes, order: Tensor | None, clips: Clips, grids: Sequence[tuple[int, int]]
) -> list[KeptFeatures]:
    """The host's order again, video by video.

    Args:
        levels: (R, D_llm) each.
        order: (N,), the number of each cell in the host's order.
    """
    numbers, sizes = tubes.begin, tubes.length
    if order is not None:
        numbers, back = order[tubes.begin].sort()
        levels, sizes = [level[back] for level in levels], sizes[back]
    found, row, cell, left = [], 0, 0, iter(clips)
    for T, S in grids:
        own, first = [], 0
        while first < T:
            clip = next(left)
            own.append(Clip(clip.runs, first, first + clip.slots - 1))
            first += clip.slots
        end = row + sum(clip.tokens for clip in own)
        x, *deeper = (level[row:end] for level in levels)
        found.append(KeptFeatures(x, numbers[row:end] - cell, tuple(deeper), tuple(own), sizes[row:end].float()))
        row, cell = end, cell + T * S
    return found
