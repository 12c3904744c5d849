"""Clusters around density peaks, as several compressors make them (`tempme_vl.compressors.peaks`)."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from tempme_vl.compressors.peaks import density_peaks


class Clusters(NamedTuple):
    """centres: (M,) int64, which points. assigned: (N,) int64, the cluster of each point."""

    centres: Tensor
    assigned: Tensor


def cluster(x: Tensor, count: int, neighbours: int, ascending: bool = False) -> Clusters:
    """The points of the best scores, and for each point the nearest of them; a centre is in its own cluster.

    Args:
        x: (N, D).
        count: M, from 1 to N.
        neighbours: k of the density.
        ascending: whether the centres stand in the order of the points, and not the best first.
    """
    peaks = density_peaks(x, neighbours)
    centres = peaks.score.topk(count).indices
    if ascending:
        centres = centres.sort().values
    assigned = peaks.distance[:, centres].argmin(-1)
    assigned[centres] = torch.arange(count, device=x.device)
    return Clusters(centres, assigned)


def sums(x: Tensor, assigned: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """(N, D) and the group of each -> (M, D), the sum of each group, and (M, 1), how many are in it."""
    total = x.new_zeros(count, x.shape[1]).index_add(0, assigned, x)
    return total, assigned.bincount(minlength=count).to(x.dtype).unsqueeze(1)


def means(x: Tensor, assigned: Tensor, count: int) -> Tensor:
    """(N, D) and the group of each -> (M, D), where no group is empty."""
    total, number = sums(x, assigned, count)
    return total / number
