"""Differential token drop of "TimeChat-Online: 80% Visual Tokens are Naturally Redundant in Streaming Videos" (arXiv
2504.17343, ACM MM 2025).

What repeats the frame before is dropped. A token is compared with the one at its place in the frame before, whether
that one stayed or not, by features or by pixels. It is dropped where they differ less than a threshold, or where it is
among a share of its frame that differs least. The first frame stays whole, and places stay as they were.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Annotated, Any, Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from tempme_vl.compressors.base import Compressor, FrameFeatures, Grid, KeptFeatures, Reading, kept, require
from tempme_vl.compressors.shares import retention_of, tokens_within
from tempme_vl.merging.method import checked
from tempme_vl.precision import at_least_float32
from tempme_vl.schema import Range, Share


@dataclass(frozen=True)
class Options:
    """by: what is compared, with what is dropped: "feature", a token whose cosine is above the threshold; "pixel", one
        whose pixels, between 0 and 1, differ by less than the threshold on average.
    threshold: see `by`.
    retention: share of the tokens of each frame but the first that stay, whatever the threshold; None for the threshold
        to decide.
    """

    by: Literal["feature", "pixel"] = "feature"
    threshold: Annotated[float, Range(-1, 1)] = 0.5
    retention: Share | None = None


def feature_likeness(x: Tensor) -> Tensor:
    """(T, S, D) -> (T - 1, S), the cosine of each token with the one at its place a frame before."""
    return F.cosine_similarity(x[1:], x[:-1], dim=-1)


def pixel_likeness(pixels: Tensor) -> Tensor:
    """(T, S, 2, P) -> (T - 1, S), the negative mean difference of the last frame that a temporal patch joins from the
    first of the patch before."""
    return -(pixels[:-1, :, 0] - pixels[1:, :, 1]).abs().mean(dim=-1)


def pixels_of_patches(patches: Tensor, grid: Grid, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """`FrameFeatures.pixels` of what the processor of Qwen2-VL and its successors gives.

    Args:
        patches: (T * S * 4, C * 2 * pixels of a patch), normalised; the four patches of a token one after the other.
        grid: of the S tokens.
        mean, std: that the processor normalised with, one a channel.

    Returns:
        (T, S, 2, P).
    """
    channels = len(mean)
    of_token = patches.view(-1, prod(grid), 4, channels, 2, patches.shape[1] // (2 * channels))
    shape = 1, 1, 1, channels, 1, 1
    of_token = of_token * of_token.new_tensor(std).view(shape) + of_token.new_tensor(mean).view(shape)
    return of_token.permute(0, 1, 4, 2, 3, 5).flatten(3)


def compress(features: FrameFeatures, options: Options) -> KeptFeatures:
    """Raises:
    ValueError: options out of bounds, or no pixels where they are compared.
    """
    options = checked("dtd", options)
    alike = _likeness(features, options)
    if options.retention is None:
        limit = options.threshold if options.by == "feature" else -options.threshold
        stays = alike <= limit
    else:
        rank = alike.argsort(dim=1, descending=True, stable=True).argsort(dim=1)
        stays = rank >= _dropped(features.x.shape[1], options.retention)
    stays = torch.cat([stays.new_ones(1, features.x.shape[1]), stays])
    return kept(features, stays.flatten().nonzero()[:, 0])


def _likeness(features: FrameFeatures, options: Options) -> Tensor:
    if options.by == "feature":
        return feature_likeness(at_least_float32(features.x))
    require(features, "pixels")
    assert features.pixels is not None
    return pixel_likeness(at_least_float32(features.pixels))


def _dropped(tokens: int, retention: float) -> int:
    """Of a frame, rounded down. The share is meant as a decimal fraction: 1 - 0.8 is a little less than 0.2."""
    return int(tokens * round(1 - retention, 12))


def count(frames: int, grid: Grid, options: Options) -> int | None:
    """None where a threshold decides."""
    options = checked("dtd", options)
    if options.retention is None:
        return None
    return prod(grid) + (frames - 1) * (prod(grid) - _dropped(prod(grid), options.retention))


def keep(share: float, frames: int, grid: Grid) -> Mapping[str, Any]:
    """Raises:
    ValueError: a share that is less than a frame.
    """
    tokens = prod(grid)
    left = tokens_within(share, frames, grid, tokens, "the first frame stays whole") - tokens
    number = left // max(frames - 1, 1)  # of each later frame
    return {"retention": 1 - retention_of(tokens - number, tokens)}


def reads(options: Options) -> tuple[Reading, ...]:
    return ("pixels",) if options.by == "pixel" else ()


COMPRESSOR = Compressor(Options, compress, count, keep, reads)
