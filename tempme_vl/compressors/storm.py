"""The reductions of STORM, "Token-Efficient Long Video Understanding for Multimodal LLMs" (arXiv 2503.04130),
untrained.

Neighbouring frames become their mean at each place, or one of them stays; and each 2 x 2 tokens of a frame become one.
STORM's Mamba layers between tower and projector, which bring what other frames show into those that stay, are not here.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import ceil, prod
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from tempme_vl.compressors.base import Compressor, FrameFeatures, Grid, KeptFeatures
from tempme_vl.compressors.shares import tokens_within
from tempme_vl.merging.method import checked
from tempme_vl.precision import at_least_float32
from tempme_vl.schema import Size

Temporal = Literal["average", "sample"]
Spatial = Literal["none", "floor", "ceil", "bilinear"]


@dataclass(frozen=True)
class Options:
    """frames: neighbouring frames that become one.
    temporal: "average" for the mean of these, the last frame counted again where the last ones are fewer; "sample" for
        the first of them.
    spatial: how 2 x 2 tokens of a frame become one: "floor" and "ceil" average them, where a side is odd without its
        last row or column, or with the part of a window that is there; "bilinear" scales the frame down to the grid
        that "ceil" gives; "none" leaves them.
    """

    frames: Size = 4
    temporal: Temporal = "average"
    spatial: Spatial = "none"


def averaged(x: Tensor, frames: int) -> Tensor:
    """(T, S, D) -> (ceil(T / frames), S, D), means of neighbouring frames."""
    missing = -len(x) % frames
    return torch.cat([x, x[-1:].expand(missing, -1, -1)]).unflatten(0, (-1, frames)).mean(dim=1)


def sampled(x: Tensor, frames: int) -> Tensor:
    """The first of so many neighbouring frames."""
    return x[::frames]


def pooled(x: Tensor, grid: Grid, spatial: Spatial) -> Tensor:
    """(T, S, D) -> the same on the grid of `coarse`."""
    image = x.transpose(1, 2).unflatten(2, grid)
    if spatial == "bilinear":
        image = F.interpolate(image, coarse(grid, spatial), mode="bilinear", align_corners=False)
    elif spatial != "none":
        image = F.avg_pool2d(image, 2, ceil_mode=spatial == "ceil")
    return image.flatten(2).transpose(1, 2)


def coarse(grid: Grid, spatial: Spatial) -> Grid:
    """Rows and columns afterwards.

    Raises:
        ValueError: none are left.
    """
    if spatial == "none":
        return grid
    if spatial != "floor":
        return ceil(grid[0] / 2), ceil(grid[1] / 2)
    if min(grid) < 2:
        raise ValueError(
            f'expected at least 2 rows and 2 columns of tokens, of which spatial="floor" drops an odd last one; got '
            f'{grid[0]} x {grid[1]}: take "ceil" or "bilinear"'
        )
    return grid[0] // 2, grid[1] // 2


def compress(features: FrameFeatures, options: Options) -> KeptFeatures:
    """Features for deeper layers are reduced as the others are. A token stands in the place of the first of those that
    became it.

    Raises:
        ValueError: options out of bounds, or see `coarse`.
    """
    options = checked("storm", options)
    rows, columns = coarse(features.grid, options.spatial)

    def reduced(level: Tensor) -> Tensor:
        over_time = averaged if options.temporal == "average" else sampled
        x = pooled(over_time(at_least_float32(level), options.frames), features.grid, options.spatial)
        return x.flatten(0, 1).to(level.dtype)

    step = 1 if options.spatial == "none" else 2
    number = torch.arange(features.x.shape[:2].numel(), device=features.x.device).view(-1, *features.grid)
    source = number[:: options.frames, ::step, ::step][:, :rows, :columns].flatten()
    return KeptFeatures(reduced(features.x), source, tuple(reduced(level) for level in features.deeper))


def count(frames: int, grid: Grid, options: Options) -> int:
    """Raises:
    ValueError: see `compress`.
    """
    options = checked("storm", options)
    return ceil(frames / options.frames) * prod(coarse(grid, options.spatial))


def keep(share: float, frames: int, grid: Grid) -> Mapping[str, Any]:
    """Means over time, where it comes nearer with 2 x 2 tokens as one.

    Raises:
        ValueError: a share that is less than a frame of the coarser grid.
    """
    ways = [Options(each, spatial=spatial) for spatial in _KEPT for each in range(1, frames + 1)]
    least = min(count(frames, grid, way) for way in ways)
    limit = tokens_within(share, frames, grid, least, "a frame of half the rows and columns stays")
    best = max((way for way in ways if count(frames, grid, way) <= limit), key=lambda way: count(frames, grid, way))
    return {"frames": best.frames, "spatial": best.spatial}


_KEPT: tuple[Spatial, ...] = ("none", "ceil")  # with which `keep` reduces; of equal counts the first

COMPRESSOR = Compressor(Options, compress, count, keep)
