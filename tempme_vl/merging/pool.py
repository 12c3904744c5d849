"""Average pooling, a baseline: neighbouring patches become their mean, on a coarser grid and of neighbouring frames."""

from __future__ import annotations

from dataclasses import dataclass
from math import isqrt, prod

import torch
from torch import Tensor

from tempme_vl.merging.base import LayerMerge, TokenMerger
from tempme_vl.merging.budget import Knob, LimitKind
from tempme_vl.merging.dropping import one_block
from tempme_vl.merging.method import Behind, Method, checked
from tempme_vl.merging.schedule import Encoder, LayerPlan, MergeSchedule
from tempme_vl.schema import Count, Size
from tempme_vl.state import AttentionContext, TokenState

Grid = tuple[int, int]  # rows and columns


@dataclass(frozen=True)
class Options:
    """side: rows and columns of a frame's patches afterwards.
    layer: the block in front of which they are pooled.
    join: neighbouring frames that become one, CLS tokens and all.
    """

    side: Size
    layer: Count = 0
    join: Size = 1


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
    return grid_schedule(encoder, (side, side), (options.side, options.side), options.join, options.layer)


def grid_schedule(encoder: Encoder, grid: Grid, coarse: Grid, join: int = 1, layer: int = 0) -> MergeSchedule:
    """The same for any grid of a frame's patches.

    Raises:
        ValueError: frames that `join` does not divide, or see `one_block`.
    """
    plan = list(one_block(encoder, layer, prod(grid) - prod(coarse)))
    if join > 1:
        if encoder.frames % join:
            raise ValueError(f"{encoder.frames} frames do not divide by the {join} that become one")
        fewer = join * prod(grid) - prod(coarse)
        plan[layer] = (
            LayerPlan(fewer_before=fewer * encoder.frames // join)
            if encoder.joint
            else LayerPlan(join, pool_prefix=encoder.prefix > 0, fewer_before=fewer)
        )
    settings = {"columns": grid[1], "join": join, "rows": grid[0], "to_columns": coarse[1], "to_rows": coarse[0]}
    shape = encoder.frames, encoder.tokens, tuple(plan), encoder.prefix, encoder.joint
    return MergeSchedule("pool", *shape, proportional=False, settings=tuple(settings.items()))


class Pool(TokenMerger):
    """The mean of each window of the grid, weighted with sizes; windows differ by at most one row and one column.

    A pooled token stands where the middle of its window was, in the first of its frames.

    Args:
        frames: F.
        join: neighbouring frames that become one.
        apart: whether they are clips of their own, and not frames of one clip.
    """

    def __init__(self, frames: int, join: int, apart: bool, grid: Grid, coarse: Grid):
        super().__init__()
        self.frames, self.join, self.apart, self.grid, self.coarse = frames, join, apart, grid, coarse

    def forward(self, state: TokenState, context: AttentionContext) -> TokenState:
        if self.apart and self.join > 1:
            state = state.join_clips(self.join)
            state = state.pool_prefix(self.join) if state.num_prefix else state
        rows, prefix, device = state.x.shape[0], state.num_prefix, state.x.device
        patches, pooled = prod(self.grid), prod(self.coarse)
        (down, top), (across, left) = (_windows(*ends, device) for ends in zip(self.grid, self.coarse, strict=True))
        window = (self.coarse[1] * down.unsqueeze(1) + across).flatten()
        middle = (self.grid[1] * top.unsqueeze(1) + left).flatten()
        frame = torch.arange(self.frames // state.num_clips, device=device)  # of a clip

        def sums(values: Tensor) -> Tensor:
            belongs = (torch.arange(pooled, device=device).unsqueeze(1) == window).to(values.dtype)
            with torch.autocast(device.type, enabled=False):
                frames = belongs @ values[:, prefix:].unflatten(1, (-1, self.join, patches)).sum(2)
            return torch.cat([values[:, :prefix], frames.flatten(1, 2)], dim=1)

        def numbers(first: Tensor, in_frame: Tensor) -> Tensor:
            own = torch.arange(prefix, device=device)
            return torch.cat([own, (prefix + first.unsqueeze(1) + in_frame).flatten()]).expand(rows, -1)

        def assignment() -> Tensor:
            return numbers(pooled * (frame // self.join), window)

        def base() -> Tensor:
            return numbers(patches * frame[:: self.join], middle)

        size = sums(state.size)
        x = (sums(state.x * state.size) / size).to(state.x.dtype)
        return state.regroup(x, size, assignment, base)


def _windows(length: int, parts: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """(length,) int64, the part that each place is in, and (parts,), the place in the middle of each part."""
    part = torch.arange(length, device=device) * parts // length
    first = -(-torch.arange(parts + 1, device=device) * length // parts)
    return part, (first[:-1] + first[1:] - 1) // 2


def layer_merge(schedule: MergeSchedule, layer: int, width: int) -> LayerMerge:
    plan = schedule.plan[layer]
    if plan == LayerPlan():
        return LayerMerge()
    given = {name: int(value) for name, value in schedule.settings}
    grid, coarse = (given["rows"], given["columns"]), (given["to_rows"], given["to_columns"])
    return LayerMerge(Pool(schedule.frames, given["join"], not schedule.joint, grid, coarse))


@dataclass(frozen=True)
class BehindOptions:
    """kernel: rows and columns that become one, fewer where the grid does not divide. join: frames that do."""

    kernel: Size = 2
    join: Size = 1


def behind_schedule(frames: int, grid: Grid, options: BehindOptions) -> MergeSchedule:
    coarse = -(-grid[0] // options.kernel), -(-grid[1] // options.kernel)
    return grid_schedule(Encoder(1, frames, prod(grid), 0), grid, coarse, options.join, 0)


def behind_knobs(frames: int, grid: Grid) -> list[list[Knob]]:
    return [[Knob("kernel", 1, max(grid))]]


METHOD = Method(
    Options,
    schedule,
    layer_merge,
    knobs=knobs,
    matching=lambda plan, count, width, head_width: 0,
    reads=("tokens",),
    behind=Behind(BehindOptions, behind_schedule, behind_knobs),
    apart=True,
)
