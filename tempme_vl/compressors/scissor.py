"""LLaVA-Scissor (arXiv 2506.21862, "LLaVA-Scissor: Token Compression with Semantic Connected Components for Video
LLMs"): tokens that are alike, directly or through others, become one, in each frame and then in the whole video; at
last every token of the video is averaged into the most similar of these.

The published code joins tokens through a sample of them where there are thousands; here all count.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import normalize

from tempme_vl.compressors.base import Compressor, FrameFeatures, KeptFeatures, kept
from tempme_vl.compressors.clusters import means, sums
from tempme_vl.merging.method import checked
from tempme_vl.precision import at_least_float32
from tempme_vl.schema import Cosine


@dataclass(frozen=True)
class Options:
    """tau: two tokens are joined where their cosine is above it."""

    tau: Cosine = 0.9


class Components(NamedTuple):
    """anchors: (M,) int64, of each component the token with the most that are joined to it, ascending. x: (M, D), its
    mean."""

    anchors: Tensor
    x: Tensor


def components(x: Tensor, tau: float) -> Components:
    """The connected components of tokens.

    Args:
        x: (N, D).
    """
    unit = normalize(x, dim=-1)
    joined = (unit @ unit.T > tau).fill_diagonal_(True)
    label = torch.full((len(x),), -1, device=x.device)
    anchors: list[int] = []
    most_joined = joined.sum(1).argsort(descending=True, stable=True)
    for token in most_joined.tolist():  # so that a component's first is its anchor
        if label[token] < 0:
            label[_reached(joined, token)] = len(anchors)
            anchors.append(token)
    found, order = torch.tensor(anchors, device=x.device).sort()
    return Components(found, means(x, label, len(anchors))[order])


def _reached(joined: Tensor, token: int) -> Tensor:
    """(N,) bool, what is connected with a token."""
    reached = joined[token]
    new = reached.clone()
    new[token] = False
    while new.any():
        new = joined[new].any(0) & ~reached
        reached = reached | new
    return reached


def most_similar(x: Tensor, targets: Tensor) -> Tensor:
    """(N, D), (M, D) -> (N,) int64, the target of each."""
    return (normalize(x, dim=-1) @ normalize(targets, dim=-1).T).argmax(-1)


def compress(features: FrameFeatures, options: Options) -> KeptFeatures:
    """In the order of the anchors' numbers.

    Raises:
        ValueError: options out of bounds.
    """
    options = checked("scissor", options)
    x = at_least_float32(features.x)
    by_frame = [components(frame, options.tau) for frame in x]
    numbers = torch.cat([part.anchors + t * x.shape[1] for t, part in enumerate(by_frame)])
    video = components(torch.cat([part.x for part in by_frame]), options.tau)
    total, count = sums(x.flatten(0, 1), most_similar(x.flatten(0, 1), video.x), len(video.x))
    left = (video.x + total) / (1 + count)
    return kept(features, numbers[video.anchors], left.to(features.x.dtype))


COMPRESSOR = Compressor(Options, compress)
