"""VidCom2 (Video Compression Commander: Plug-and-Play Inference Acceleration for Video Large Language Models; arXiv
2505.14454, EMNLP 2025).

Frames that are unlike the video keep more tokens, and each frame those unlike video and frame. A token is compared with
the mean of the video and with that of its frame, by a sum of Gaussians of their distance in the half of the channels
that varies least. The less a frame's tokens are like the video, the larger its part of the tokens that stay; in each
frame those go that are most like both means. (The paper says cosine; its code has Gaussians.)
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from tempme_vl.compressors.base import Compressor, FrameFeatures, Grid, KeptFeatures, kept
from tempme_vl.compressors.shares import retention_of, tokens_within
from tempme_vl.merging.method import checked
from tempme_vl.precision import at_least_float32
from tempme_vl.schema import Share

_WIDTHS = tuple(2.0**k for k in range(-3, 2))  # of the Gaussians: their variances
_TEMPERATURE = 0.01  # of the softmax over frames


@dataclass(frozen=True)
class Options:
    """retention: share of the video's tokens that stay, at least as many as frames.
    exact: whether they are exactly that share, as vLLM makes it: over the whole video the tokens most like the means
        are dropped, or the least like them added. Without it rounding frame by frame decides, as in the public code.
    """

    retention: Share = 0.25
    exact: bool = True


class Likeness(NamedTuple):
    """(T, S) each: how much each token is like the mean of the video, and like that of its frame."""

    video: Tensor
    frame: Tensor


def steady_channels(x: Tensor) -> Tensor:
    """(T, S, D) -> (D // 2,) int64, the channels whose variance over all tokens is least."""
    return x.flatten(0, 1).var(dim=0, correction=0).topk(x.shape[-1] // 2, largest=False).indices


def likeness(x: Tensor) -> Likeness:
    """Of (T, S, D)."""
    unit = F.normalize(x[..., steady_channels(x)], dim=-1)
    return Likeness(_gaussians(unit, unit.mean(dim=(0, 1))), _gaussians(unit, unit.mean(dim=1, keepdim=True)))


def _gaussians(x: Tensor, center: Tensor) -> Tensor:
    distance = (x - center).square().sum(-1, keepdim=True)
    return (-distance / (2 * distance.new_tensor(_WIDTHS))).exp().sum(-1)


def frame_scales(video: Tensor, retention: float) -> Tensor:
    """(T, S) likeness to the video -> (T,), the share of each frame's tokens that stays."""
    part = (-video.mean(dim=1) / _TEMPERATURE).softmax(dim=0)
    return (retention * (1 + part - part.mean())).clamp(max=1)


def frame_counts(scales: Tensor, tokens: int) -> Tensor:
    """(T,) int64, the tokens of each frame that stay: their share of S rounded, a half to the even number."""
    return (scales * tokens).round().long().clamp(min=1)


def least_alike(like: Tensor, counts: Tensor) -> Tensor:
    """(T, S) bool, true for as many tokens of each frame as counts say, those with the lowest likeness."""
    rank = like.argsort(dim=1, stable=True).argsort(dim=1)
    return rank < counts.unsqueeze(1)


def made_exact(stays: Tensor, like: Tensor, number: int) -> Tensor:
    """(T, S) bool, true for so many tokens: of those that stay the ones most like the means are dropped, or of the
    others the least like them added."""
    # all that stay before all others, and either by likeness
    order = like.flatten().argsort(stable=True)
    order = order[(~stays.flatten()[order]).to(torch.uint8).argsort(stable=True)]
    return torch.zeros_like(stays.flatten()).index_fill(0, order[:number], True).view_as(stays)


def compress(features: FrameFeatures, options: Options) -> KeptFeatures:
    """Raises:
    ValueError: options out of bounds.
    """
    options = checked("vidcom2", options)
    like = likeness(at_least_float32(features.x))
    both = like.video + like.frame
    stays = least_alike(both, frame_counts(frame_scales(like.video, options.retention), both.shape[1]))
    if (number := count(len(both), features.grid, options)) is not None:
        stays = made_exact(stays, both, number)
    return kept(features, stays.flatten().nonzero()[:, 0])


def count(frames: int, grid: Grid, options: Options) -> int | None:
    """None where rounding decides."""
    options = checked("vidcom2", options)
    return max(frames, int(frames * prod(grid) * options.retention)) if options.exact else None


def keep(share: float, frames: int, grid: Grid) -> Mapping[str, Any]:
    """Raises:
    ValueError: a share of fewer tokens than frames.
    """
    number = tokens_within(share, frames, grid, frames, "as many tokens stay as there are frames")
    return {"retention": retention_of(number, frames * prod(grid))}


COMPRESSOR = Compressor(Options, compress, count, keep)
