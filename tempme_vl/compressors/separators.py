"""What a host puts between the rows or groups of a video's tokens, where a compressor sets it anew."""

from __future__ import annotations

import torch
from torch import Tensor

from tempme_vl.compressors.base import Clip, FrameFeatures, KeptFeatures


def insert(x: Tensor, source: Tensor, ends: Tensor, separator: Tensor) -> tuple[Tensor, Tensor]:
    """A separator behind each token that `ends` says.

    Args:
        x: (M, D).
        source: (M,) int64.
        ends: (M,) bool.
        separator: (D,).

    Returns:
        (M + separators, D); (M + separators,) int64 with -1 for separators.
    """
    place = torch.arange(len(x), device=x.device) + ends.cumsum(0) - ends.long()
    total = len(x) + int(ends.sum())
    tokens = separator.to(x).expand(total, -1).clone()
    tokens[place] = x
    return tokens, source.new_full((total,), -1).index_copy(0, place, source)


def kept_between(features: FrameFeatures, source: Tensor, x: Tensor, clips: tuple[Clip, ...] = ()) -> KeptFeatures:
    """`base.kept` where some of the tokens are separators: of deeper layers they get zeros, as other text does.

    Args:
        source: (M,) int64, -1 for separators.
        x: (M, D).
    """
    token = (source >= 0).unsqueeze(1)
    deeper = tuple(level.flatten(0, 1)[source.clamp(min=0)] * token for level in features.deeper)
    return KeptFeatures(x.to(features.x.dtype), source, deeper, clips)
