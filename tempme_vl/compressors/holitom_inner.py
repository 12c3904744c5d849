"""HoliTom's step inside the language model (arXiv 2505.21334, "HoliTom: Holistic Token Merging for Fast Video Large
Language Models"): in front of one layer the video tokens that the last token attends to least go into the others.

It works on states and attention of a language model's layers, so it is no entry of `tempme_vl.registries.COMPRESSORS`,
whose compressors work in front of the language model.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import normalize

from tempme_vl.merging.method import checked
from tempme_vl.schema import Count, Share
from tempme_vl.state import at_least_float32


@dataclass(frozen=True)
class Options:
    """layer: the layer in front of which it happens, behind the one whose attention it reads.
    ratio: share of the video tokens that go.
    """

    layer: Count = 18
    ratio: Share = 0.5


def chosen(attention: Tensor, video: range, ratio: float) -> Tensor:
    """(M,) int64, the positions of the video tokens that stay; the most attended first.

    Args:
        attention: (heads, N, N), of the layer before.
        video: positions of the video tokens.
    """
    received = attention[:, -1, video.start : video.stop].mean(0)
    return received.topk(round(len(video) * (1 - ratio))).indices + video.start


def merge_rest(hidden: Tensor, video: range, staying: Tensor) -> Tensor:
    """The states once each other video token went into the most similar that stays.

    One after the other, in the order of positions, each time the mean of the two: those that come later count more. All
    similarities are of the states before.

    Args:
        hidden: (N, D).
        staying: (M,) int64, M > 0.
    """
    others = torch.ones(len(hidden), dtype=torch.bool, device=hidden.device).index_fill(0, staying, False)
    others[: video.start], others[video.stop :] = False, False
    unit, merged = normalize(hidden, dim=-1), hidden.clone()
    to = staying[(unit[others] @ unit[staying].mT).argmax(-1)]
    for token, target in zip(others.nonzero()[:, 0].tolist(), to.tolist(), strict=True):
        merged[target] = (merged[target] + hidden[token]) / 2
    return merged


def step(hidden: Tensor, attention: Tensor, video: range, options: Options) -> tuple[Tensor, Tensor]:
    """What goes into the layer.

    Args:
        hidden: (N, D), states of one sequence.
        attention: (heads, N, N), softmax of the layer before.
        video: positions of its video tokens.

    Returns:
        (M, D); (M,) int64, the positions of what stays, ascending, text included.

    Raises:
        ValueError: options out of bounds, or no video token left.
    """
    options = checked("holitom_inner", options)
    staying = chosen(at_least_float32(attention), video, options.ratio)
    if len(video) and not len(staying):
        raise ValueError(
            f"expected at least one of {len(video)} video tokens to stay; got ratio={options.ratio}: choose a smaller "
            "one"
        )
    merged = merge_rest(at_least_float32(hidden), video, staying) if len(video) else hidden
    text = torch.ones(len(hidden), dtype=torch.bool, device=hidden.device)
    text[video.start : video.stop] = False
    keep = torch.cat([text.nonzero()[:, 0], staying]).sort().values
    return merged[keep].to(hidden.dtype), keep
