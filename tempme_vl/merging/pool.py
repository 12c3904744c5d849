"""Average pooling, a baseline: neighbouring patches of each frame become their mean, on a coarser grid."""

from __future__ import annotations

from dataclasses import dataclass
from math import isqrt, prod

import torch
from torch import Tensor

from tempme_vl.merging.base import LayerMerge, TokenMerger
from tempme_vl.merging.budget import Knob, LimitKind
from tempme_vl.merging.dropping import one_block
from tempme_vl.merging.method import Behind, Method, checked
from tempme_vl.merging.schedule import Encoder, MergeSchedule
from tempme_vl.schema import Count, Size
from tempme_vl.state import AttentionContext, TokenState

Grid = tuple[int, int]  # rows and columns


@dataclass(frozen=True)
class Options:
    """side: rows and columns of a frame's patches afterwards. layer: the block in front of which they are pooled."""

    side: Size
    layer: Count = 0


def knobs(encoder: Encoder, kind: LimitKind) -> list[list[Knob]]:
    """Before the first block; where no grid comes near a budget there, before a later one."""
    side = isqrt(encoder.tokens - encoder.prefix)
    pooled = Knob("side", 0, side - 1, lambda fewer: side - fewer)
    layers = range(encoder.layers if kind == "budget" else 1)
    return [[Knob("layer", layer, layer), pooled] for layer in layers]


def schedule(encoder: Encoder, options: Options) -> MergeSchedule:
    """The counts of the coarser grid in every frame, also of a joint encoder.

    Raises:
        ValueError: options out of bounds, or patches that are no square.
    """
    options, patches = checked("pool", options), encoder.tokens - encoder.prefix
    side = isqrt(patches)
    if side**2 != patches or options.side > side:
        raise ValueError(f"pool makes a square grid coarser; got side={options.side} for {patches} patches of a frame")
    return _pooled(encoder, (side, side), (options.side, options.side), options.layer)


def _pooled(encoder: Encoder, grid: Grid, coarse: Grid, layer: int) -> MergeSchedule:
    plan = one_block(encoder, layer, prod(grid) - prod(coarse))
    settings = ("columns", grid[1]), ("rows", grid[0]), ("to_columns", coarse[1]), ("to_rows", coarse[0])
    shape = encoder.frames, encoder.tokens, plan, encoder.prefix, encoder.joint
    return MergeSchedule("pool", *shape, proportional=False, settings=settings)


class Pool(TokenMerger):
    """The mean of each window of the grid, weighted with sizes; windows differ by at most one row and one column.

    A pooled token stands where the middle of its window was.
    """

    def __init__(self, frames: int, grid: Grid, coarse: Grid):
        super().__init__()
        self.frames, self.grid, self.coarse = frames, grid, coarse

    def forward(self, state: TokenState, context: AttentionContext) -> TokenState:
        rows, prefix, device = len(state.x), state.num_prefix, state.x.device
        patches, pooled = prod(self.grid), prod(self.coarse)
        (down, top), (across, left) = (_windows(*ends, device) for ends in zip(self.grid, self.coarse, strict=True))
        window = (self.coarse[1] * down.unsqueeze(1) + across).flatten()
        middle = (self.grid[1] * top.unsqueeze(1) + left).flatten()
        frame = torch.arange(self.frames // state.num_clips, device=device).unsqueeze(1)  # of a clip

        def sums(values: Tensor) -> Tensor:
            belongs = (torch.arange(pooled, device=device).unsqueeze(1) == window).to(values.dtype)
            with torch.autocast(device.type, enabled=False):
                frames = belongs @ values[:, prefix:].unflatten(1, (-1, patches))
            return torch.cat([values[:, :prefix], frames.flatten(1, 2)], dim=1)

        def numbers(first: int, of_patches: Tensor) -> Tensor:
            own = torch.arange(prefix, device=device)
            return torch.cat([own, (prefix + first * frame + of_patches).flatten()]).expand(rows, -1)

        size = sums(state.size)
        x = (sums(state.x * state.size) / size).to(state.x.dtype)
        return state.regroup(x, size, lambda: numbers(pooled, window), lambda: numbers(patches, middle))


def _windows(length: int, parts: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """(length,) int64, the part that each place is in, and (parts,), the place in the middle of each part."""
    part = torch.arange(length, device=device) * parts // length
    first = -(-torch.arange(parts + 1, device=device) * length // parts)
    return part, (first[:-1] + first[1:] - 1) // 2


def layer_merge(schedule: MergeSchedule, layer: int, width: int) -> LayerMerge:
    if not schedule.plan[layer].fewer_before:
        return LayerMerge()
    given = {name: int(value) for name, value in schedule.settings}
    grid, coarse = (given["rows"], given["columns"]), (given["to_rows"], given["to_columns"])
    return LayerMerge(Pool(schedule.frames, grid, coarse))


@dataclass(frozen=True)
class BehindOptions:
    """kernel: rows and columns that become one, fewer where the grid does not divide."""

    kernel: Size = 2


def behind_schedule(frames: int, grid: Grid, options: BehindOptions) -> MergeSchedule:
    coarse = -(-grid[0] // options.kernel), -(-grid[1] // options.kernel)
    return _pooled(Encoder(1, frames, prod(grid), 0), grid, coarse, 0)


METHOD = Method(
    Options,
    schedule,
    layer_merge,
    knobs=knobs,
    matching=lambda plan, count, width, head_width: 0,
    reads=("tokens",),
    behind=Behind(BehindOptions, behind_schedule),
)
