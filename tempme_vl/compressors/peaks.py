"""Density peaks among points (DPC-kNN), and segments of frames: pieces that several compressors share."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class Peaks(NamedTuple):
    """score: (N,), density times distance to a denser point. distance: (N, N). density: (N,)."""

    score: Tensor
    distance: Tensor
    density: Tensor


def density_peaks(x: Tensor, neighbours: int) -> Peaks:
    """How well each point would be the centre of a cluster (Du et al. 2016; FastVID, FlashVID, HoliTom, PruneVid).

    The density of a point is exp(-mean of its squared distances to its nearest points), itself included; its distance
    is that to the nearest denser point, for the densest the largest of all. No noise is added against ties.

    Args:
        x: (N, D).
        neighbours: k, at most N.
    """
    distance = torch.cdist(x.unsqueeze(0), x.unsqueeze(0))[0] / x.shape[-1] ** 0.5
    nearest = distance.topk(neighbours, dim=-1, largest=False).values
    density = (-nearest.square().mean(dim=-1)).exp()
    denser = density.unsqueeze(0) > density.unsqueeze(1)
    apart = torch.where(denser, distance, distance.max()).min(dim=-1).values
    return Peaks(apart * density, distance, density)


def neighbour_similarity(x: Tensor) -> Tensor:
    """(T, D) -> (T - 1,), the cosine of each with the next."""
    unit = x / x.norm(dim=-1, keepdim=True)
    return (unit[:-1] * unit[1:]).sum(-1)


def segments(cuts: Sequence[int], frames: int) -> list[range]:
    """Frames by segment; a cut i ends one behind frame i."""
    ends = [*sorted(set(cuts)), frames - 1]
    starts = [0, *(end + 1 for end in ends[:-1])]
    return [range(start, end + 1) for start, end in zip(starts, ends, strict=True)]
