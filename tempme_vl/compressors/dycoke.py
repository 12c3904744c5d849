"""DyCoke: Dynamic Compression of Tokens for Fast Video Large Language Models (arXiv 2411.15024, CVPR 2025).

Frames go by fours. The second is compared with the first, the fourth with the third, and the third with the first, each
token with the one at its place; of the compared frames the tokens that are least alike stay. That is stage 1. In stage
2, here with `inner_layer`, the words that are written read few of the video's keys and values in the language model's
later layers.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from math import prod
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from tempme_vl.compressors.base import Compressor, FrameFeatures, Grid, KeptFeatures, kept
from tempme_vl.compressors.inner import Inner, Writing
from tempme_vl.compressors.shares import retention_of, tokens_within
from tempme_vl.merging.method import checked
from tempme_vl.precision import at_least_float32
from tempme_vl.schema import Cosine, Share, Size

_FEWEST = 5  # frames that the public code can take


@dataclass(frozen=True)
class Options:
    """retention: share of a compared frame's tokens that stay, rounded down; 1 - K of the paper.
    public_code: whether it is done as in the public code, which loses an odd last frame, leaves the third of the last
        four whole where frames divide by four, gives a compared frame's tokens in ascending order of likeness, and
        fails for fewer than 5 frames. Without it no frame is left out, and tokens stand in the order of their places.
    inner_layer: of the language model, from which on written words read fewer of the video's tokens (the paper's: 3);
        None for none.
    inner_ratio: share of them that they do not read (P of the paper).
    similarity: which those are is decided anew where the cosine between what two words after each other attend to is
        below it.
    """

    retention: Share = 0.3
    public_code: bool = False
    inner_layer: Size | None = None
    inner_ratio: Share = 0.8
    similarity: Cosine = 0.9


def references(frames: int, public_code: bool = False) -> list[int | None]:
    """For each frame that is left the one that it is compared with; None for those that stay whole.

    Raises:
        ValueError: too few frames for the public code.
    """
    if not public_code:
        return [_earlier(frame) for frame in range(frames)]
    if frames < _FEWEST:
        raise ValueError(
            f"the public code of DyCoke takes at least {_FEWEST} frames; got {frames}: set public_code to false"
        )
    paired = frames - frames % 2
    return [None if frame % 4 == 2 and frame >= frames - 2 else _earlier(frame) for frame in range(paired)]


def _earlier(frame: int) -> int | None:
    return None if frame % 4 == 0 else frame - (1 if frame % 2 else 2)


def least_alike(x: Tensor, earlier: Tensor, number: int) -> Tensor:
    """(S, D) twice -> (number,) int64, the places where a frame is least like an earlier one, the least alike first."""
    return F.cosine_similarity(x, earlier, dim=-1).argsort(stable=True)[:number]


def compress(features: FrameFeatures, options: Options) -> KeptFeatures:
    """Raises:
    ValueError: options out of bounds, or see `references`.
    """
    options = checked("dycoke", options)
    x = at_least_float32(features.x)
    tokens = x.shape[1]
    number, whole = int(options.retention * tokens), torch.arange(tokens, device=x.device)
    source = []
    for frame, earlier in enumerate(references(len(x), options.public_code)):
        places = whole if earlier is None else least_alike(x[frame], x[earlier], number)
        source.append(frame * tokens + (places if options.public_code else places.sort().values))
    return kept(features, torch.cat(source))


def count(frames: int, grid: Grid, options: Options) -> int:
    """Raises:
    ValueError: see `compress`.
    """
    options = checked("dycoke", options)
    compared = [earlier is not None for earlier in references(frames, options.public_code)]
    return sum(int(options.retention * prod(grid)) if fewer else prod(grid) for fewer in compared)


def keep(share: float, frames: int, grid: Grid) -> Mapping[str, Any]:
    """Raises:
    ValueError: a share that is less than the frames that stay whole.
    """
    compared = sum(earlier is not None for earlier in references(frames))
    whole = (frames - compared) * prod(grid)
    left = tokens_within(share, frames, grid, whole, "every fourth frame stays whole") - whole
    return {"retention": retention_of(left // max(compared, 1), prod(grid))}


def choose(options: Options, attention: Tensor, before: Tensor | None, chosen: Tensor | None) -> Tensor:
    """The video tokens that a written word reads (`tempme_vl.compressors.inner.Writing`).

    Args:
        attention: (V,), of the word to each, mean over heads.
        before: (V,), of the word before it.
        chosen: (M,) int64, what that one read.
    """
    if chosen is not None and before is not None:
        alike = F.cosine_similarity(at_least_float32(attention), at_least_float32(before), dim=0)
        if alike >= options.similarity:
            return chosen
    count = int(len(attention) * (1 - options.inner_ratio) + 1e-9)  # floor, but for what 1 - P itself rounds off
    return attention.topk(count).indices.sort().values


def inner(options: Options, layers: int) -> Inner | None:
    """Inside the language model."""
    if options.inner_layer is None:
        return None
    writing = Writing(options.inner_layer, partial(choose, options))
    return Inner(options.inner_layer + 1, writing=writing)


COMPRESSOR = Compressor(Options, compress, count, keep, inner=inner)
