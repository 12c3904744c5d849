"""PruneVid, the stage in front of the language model (arXiv 2412.16117, "PruneVid: Visual Token Pruning for Efficient
Video Large Language Models"): the video is cut into windows by clustering its frames; in each, places that stay the
same become one token, and these as well as each frame's others are clustered.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import groupby
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import normalize

from tempme_vl.compressors.base import Clip, Compressor, FrameFeatures, KeptFeatures, kept
from tempme_vl.compressors.clusters import cluster, means
from tempme_vl.merging.method import checked
from tempme_vl.precision import at_least_float32
from tempme_vl.schema import Cosine, Share

_NEIGHBOURS = 7  # of the density, of frames and of tokens
_WHOLE = 14  # tokens that are not clustered, being so few


@dataclass(frozen=True)
class Options:
    """tau: a place stays the same in a window where the mean cosine of two of its frames is above it.
    segment_ratio: clusters of frames, as a share of them.
    cluster_ratio: clusters of tokens, as a share of them.
    """

    tau: Cosine = 0.8
    segment_ratio: Share = 0.25
    cluster_ratio: Share = 0.5


class Part(NamedTuple):
    """x: (M, D), of the frames from first to last. source: (M,) int64."""

    x: Tensor
    source: Tensor
    first: int
    last: int


def frame_clusters(x: Tensor, ratio: float) -> list[int]:
    """The cluster of each frame, by its mean; at least one.

    Args:
        x: (T, S, D).
    """
    count = max(1, int(len(x) * ratio))
    return cluster(x.mean(1), count, min(_NEIGHBOURS, len(x))).assigned.tolist()


def runs(labels: list[int]) -> list[range]:
    """Frames that follow each other with the same label."""
    groups = [list(group) for _, group in groupby(range(len(labels)), labels.__getitem__)]
    return [range(group[0], group[-1] + 1) for group in groups]


def refined(labels: list[int]) -> list[int]:
    """Labels with which each cluster is its longest run.

    Other runs, and all of one frame, take the label of the longer of the runs beside them that stay, of equal ones the
    left. Where no run stays, the labels do.
    """
    found = runs(labels)
    longest = {label: max(len(run) for run in found if labels[run[0]] == label) for label in labels}
    stay = [run for run in found if len(run) == longest[labels[run[0]]] > 1]
    result = list(labels)
    for left, right in zip([None, *stay], [*stay, None], strict=True):
        hole = range(left.stop if left else 0, right.start if right else len(labels))
        beside = max((run for run in (left, right) if run), key=len, default=None)  # the first of equal ones
        if beside is not None:
            result[hole.start : hole.stop] = [labels[beside[0]]] * len(hole)
    return result


def constant_places(x: Tensor, tau: float) -> Tensor:
    """(L, S, D) -> (S,) bool, places whose frames are alike; of one frame none."""
    frames = len(x)
    if frames == 1:
        return torch.zeros(x.shape[1], dtype=torch.bool, device=x.device)
    pairs = normalize(x, dim=-1).sum(0).square().sum(-1) - frames
    return pairs / (frames * (frames - 1)) > tau


def clustered(x: Tensor, ratio: float) -> tuple[Tensor, Tensor]:
    """(N, D) -> (M, D), the means of clusters, and (M,) int64, their centres; the best centre first. Few tokens stay as
    they are."""
    if len(x) <= _WHOLE:
        return x, torch.arange(len(x), device=x.device)
    count = max(1, int(len(x) * ratio))
    centres, assigned = cluster(x, count, _NEIGHBOURS)
    return means(x, assigned, count), centres


def window_parts(x: Tensor, window: range, options: Options) -> Iterator[Part]:
    """What is left of a window: the places that stay the same, then each frame's others.

    Args:
        x: (T, S, D).
    """
    tokens, inside = x.shape[1], x[window.start : window.stop]
    constant = constant_places(inside, options.tau)
    same, other = constant.nonzero()[:, 0], (~constant).nonzero()[:, 0]
    merged, centres = clustered(inside[:, same].mean(0), options.cluster_ratio)
    yield Part(merged, same[centres] + window.start * tokens, window.start, window.stop - 1)
    for t in window:
        merged, centres = clustered(x[t, other], options.cluster_ratio)
        yield Part(merged, other[centres] + t * tokens, t, t)


def compress(features: FrameFeatures, options: Options) -> KeptFeatures:
    """Window by window; clusters in the order of their centres' scores.

    Raises:
        ValueError: options out of bounds.
    """
    options = checked("prunevid", options)
    x = at_least_float32(features.x)
    labels = refined(frame_clusters(x, options.segment_ratio))
    parts = [part for window in runs(labels) for part in window_parts(x, window, options)]
    source, left = torch.cat([part.source for part in parts]), torch.cat([part.x for part in parts])
    clips = tuple(Clip(len(part.x), part.first, part.last) for part in parts if len(part.x))
    return replace(kept(features, source, left.to(features.x.dtype)), clips=clips)


COMPRESSOR = Compressor(Options, compress)
