"""Deterministic clustering of rows of points, as CenterCLIP (SIGIR 2022) clusters tokens: k-medoids++ and spectral.

Everything is computed in float64, and of equal values the one with the lowest number counts: a row's clusters depend on
nothing but the row, and identical points of a still video give the same clusters everywhere. Each algorithm is one
operator to whatever traces a model, since it stops when nothing changes any more.

Shapes: R rows of N points, K clusters.
"""

from __future__ import annotations

import torch
from torch import Tensor, library

# of the lengths that cosines and unit vectors are divided by
_EPS = 1e-6
# squared distances below this share of the squared lengths are rounding noise between identical points
_NOISE = 1e-13


@library.custom_op("tempme_vl::kmedoids", mutates_args=())
def kmedoids(
    x: Tensor, clusters: int, distance: str, norm: float, unit: bool, threshold: float, iterations: int
) -> tuple[Tensor, Tensor]:
    """k-medoids from the KKZ start: the point farthest from the origin, then always the one farthest from all chosen.

    Args:
        x: (R, N, D) points, N >= K.
        clusters: K.
        distance: "euclidean", or "cosine" for 1 - cosine.
        norm: p of the Minkowski distance; 2 is Euclid's.
        unit: whether points are scaled to length 1 first.
        threshold: a row is done once its medoids have moved less than this in sum.
        iterations: at most, of each row.

    Returns:
        (R, N) int64, the cluster of each point; and (R, K) int64, the points that are the medoids, ascending.
    """
    x = x.double()
    if unit:
        x = _unit(x)
    # as float32 in float64: sums of these are exact, in any order, and equal ones are equal
    apart = _distances(x, distance, norm).float().double()
    apart = apart - torch.eye(x.shape[1], dtype=apart.dtype, device=x.device)  # nearest of all to itself
    medoids = _kkz(x, apart, clusters)
    moving = torch.ones(len(x), 1, dtype=torch.bool, device=x.device)
    for _ in range(iterations):
        moved = _medoids(apart, _assign(apart, medoids), clusters)
        shift = (_rows(x, moved) - _rows(x, medoids)).norm(dim=-1).sum(1, keepdim=True)
        medoids = torch.where(moving, moved, medoids)
        moving = moving & (shift >= threshold)
        if not moving.any():
            break
    medoids = medoids.sort(dim=1).values
    return _assign(apart, medoids), medoids


@library.custom_op("tempme_vl::spectral", mutates_args=())
def spectral(
    x: Tensor,
    clusters: int,
    neighbours: int,
    sigma: float,
    distance: str,
    norm: float,
    threshold: float,
    iterations: int,
) -> tuple[Tensor, Tensor]:
    """k-medoids of the eigenvectors of the symmetric Laplacian's K smallest eigenvalues, their rows scaled to length 1.

    Args:
        x: (R, N, D) points, N >= K.
        neighbours: an edge joins two points of which one is among the other's so many nearest, itself included; 0 for
            all edges.
        sigma: of the heat kernel exp(-d^2 / (2 sigma^2)) that edges weigh.
        distance, norm, threshold, iterations: of `kmedoids`, for the eigenvectors.

    Returns:
        as `kmedoids`.
    """
    weight = affinity(x, neighbours, sigma)
    root = weight.sum(-1, keepdim=True).rsqrt()
    laplacian = torch.eye(x.shape[1], dtype=weight.dtype, device=x.device) - root * weight * root.transpose(1, 2)
    vectors = torch.linalg.eigh(laplacian).eigenvectors[:, :, :clusters]
    return kmedoids(_unit(vectors), clusters, distance, norm, False, threshold, iterations)


def _fake(x: Tensor, clusters: int, *options: object) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape[:2], dtype=torch.int64), x.new_empty((len(x), clusters), dtype=torch.int64)


kmedoids.register_fake(_fake)
spectral.register_fake(_fake)


def affinity(x: Tensor, neighbours: int, sigma: float) -> Tensor:
    """(R, N, D) -> (R, N, N) float64: the weights of the edges; see `spectral`."""
    weight = torch.exp(-(_distances(x.double(), "euclidean", 2) ** 2) / (2 * sigma**2))
    if neighbours:
        near = weight >= weight.topk(neighbours, dim=-1).values[..., -1:]
        weight = weight * (near | near.transpose(1, 2))
    return weight


def _unit(x: Tensor) -> Tensor:
    return x / (x.norm(dim=-1, keepdim=True) + _EPS)


def _distances(x: Tensor, distance: str, norm: float) -> Tensor:
    """(R, N, D) -> (R, N, N), symmetric."""
    if distance == "cosine":
        apart = 1 - _unit(x) @ _unit(x).transpose(1, 2)
    elif norm == 2:
        length = x.square().sum(-1, keepdim=True)
        lengths = length + length.transpose(1, 2)
        squared = lengths - 2 * x @ x.transpose(1, 2)
        apart = squared.where(squared > _NOISE * lengths, 0).sqrt()
    else:
        apart = torch.cdist(x, x, p=norm)
    return (apart + apart.transpose(1, 2)) / 2


def _kkz(x: Tensor, apart: Tensor, clusters: int) -> Tensor:
    """(R, K) int64: the points that the medoids start from."""
    chosen = [x.norm(dim=-1).argmax(1, keepdim=True)]
    nearest = _rows(apart, chosen[0]).squeeze(1)
    while len(chosen) < clusters:
        chosen.append(nearest.argmax(1, keepdim=True))
        nearest = torch.minimum(nearest, _rows(apart, chosen[-1]).squeeze(1))
    return torch.cat(chosen, dim=1)


def _assign(apart: Tensor, medoids: Tensor) -> Tensor:
    """(R, N) int64: the nearest medoid of each point."""
    return _rows(apart, medoids).argmin(1)


def _medoids(apart: Tensor, assigned: Tensor, clusters: int) -> Tensor:
    """(R, K) int64: the point of each cluster with the least sum of distances to the others."""
    together = assigned.unsqueeze(2) == assigned.unsqueeze(1)
    total = (apart * together).sum(-1)
    member = assigned.unsqueeze(1) == torch.arange(clusters, device=apart.device).unsqueeze(1)
    return total.unsqueeze(1).where(member, torch.inf).argmin(-1)


def _rows(x: Tensor, numbers: Tensor) -> Tensor:
    """(R, N, D) at (R, K) -> (R, K, D)."""
    return x.gather(1, numbers.unsqueeze(-1).expand(-1, -1, x.shape[-1]))
