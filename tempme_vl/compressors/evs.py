"""Efficient Video Sampling: Pruning Temporally Redundant Tokens for Faster VLM Inference (arXiv 2510.14624).

Tokens stay where a frame differs from the one before. Each token is compared with the one at the same place of the
frame before; over the whole video those that changed most stay, the first frame always whole. The paper compares
pixels; this compares features, as the implementation in vLLM does, and gives the same tokens.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from tempme_vl.compressors.base import Compressor, FrameFeatures, Grid, KeptFeatures, kept
from tempme_vl.compressors.shares import retention_of, tokens_within
from tempme_vl.merging.method import checked
from tempme_vl.precision import at_least_float32
from tempme_vl.schema import Share

_FIRST = 255.0  # of tokens of the first frame: more than any difference of two


@dataclass(frozen=True)
class Options:
    """retention: share of the video's tokens that stay, at least a frame's; 1 - q of the paper, which leaves q to its
    user: a quarter is the default here.
    """

    retention: Share = 0.25


def similarity(x: Tensor) -> Tensor:
    """(T, S, D) -> (T - 1, S), the cosine of each token with the one at its place a frame before."""
    return F.cosine_similarity(x[1:], x[:-1], dim=-1)


def chosen(alike: Tensor, number: int) -> Tensor:
    """Which tokens stay, ascending: those that differ most, of equal ones the first.

    Args:
        alike: (T - 1, S), see `similarity`.
        number: at least S.
    """
    first = alike.new_full((1, alike.shape[1]), _FIRST)
    order = torch.cat([first, 1 - alike]).flatten().argsort(descending=True, stable=True)
    return order[:number].sort().values


def compress(features: FrameFeatures, options: Options) -> KeptFeatures:
    """Raises:
    ValueError: options out of bounds.
    """
    number = count(len(features.x), features.grid, options)
    return kept(features, chosen(similarity(at_least_float32(features.x)), number))


def count(frames: int, grid: Grid, options: Options) -> int:
    options = checked("evs", options)
    return max(prod(grid), int(frames * prod(grid) * options.retention))


def keep(share: float, frames: int, grid: Grid) -> Mapping[str, Any]:
    """Raises:
    ValueError: a share that is less than a frame.
    """
    number = tokens_within(share, frames, grid, prod(grid), "the first frame stays whole")
    return {"retention": retention_of(number, frames * prod(grid))}


COMPRESSOR = Compressor(Options, compress, count, keep)
