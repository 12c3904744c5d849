"""HoliTom's step inside the language model (arXiv 2505.21334, "HoliTom: Holistic Token Merging for Fast Video Large
Language Models"): in front of one layer the video tokens that the last token attends to least go into the others.

It is what `inner_layer` of `tempme_vl.compressors.holitom` asks for.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor
from torch.nn.functional import normalize

from tempme_vl.compressors.inner import Inner, Left, attended, in_front_of, stay
from tempme_vl.merging.method import checked
from tempme_vl.precision import at_least_float32
from tempme_vl.schema import Share, Size


@dataclass(frozen=True)
class Options:
    """layer: the layer in front of which it happens, behind the one whose attention it reads.
    ratio: share of the video tokens that go.
    """

    layer: Size = 18
    ratio: Share = 0.5


def merge_rest(hidden: Tensor, video: Tensor, staying: Tensor) -> Tensor:
    """The states once each other video token went into the most similar that stays.

    One after the other, in the order of positions, each time the mean of the two: those that come later count more. All
    similarities are of the states before.

    Args:
        hidden: (N, D).
        video: (V,) int64, ascending.
        staying: (M,) int64, those of them that stay, M > 0.
    """
    others = video[~torch.isin(video, staying)]
    unit = normalize(hidden, dim=-1)
    to = staying[(unit[others] @ unit[staying].mT).argmax(-1)]
    number = hidden.new_zeros(len(hidden)).index_add(0, to, hidden.new_ones(len(to)))
    behind = (to.unsqueeze(1) == to).triu().sum(1)  # those that go the same way from each on: it is halved as often
    merged = hidden * torch.exp2(-number).unsqueeze(1)
    return merged.index_add(0, to, hidden[others] * torch.exp2(-behind.to(hidden.dtype)).unsqueeze(1))


def step(left: Left, hidden: Tensor, attention: Tensor, options: Options) -> tuple[Left, Tensor]:
    """What goes into the layer.

    Args:
        hidden: (N, D), states of one sequence, as `left` says.
        attention: (heads, Q, N), softmax of the layer before; the last query is read.

    Returns:
        What stays, and its states (M, D).

    Raises:
        ValueError: options out of bounds, or no video token left.
    """
    options = checked("holitom_inner", options)
    video = left.video
    if not len(video):
        return left, hidden
    received = attended(at_least_float32(attention), video)
    staying = video[received.topk(round(len(video) * (1 - options.ratio))).indices.sort().values]
    if not len(staying):
        raise ValueError(
            f"expected at least one of {len(video)} video tokens to stay; got ratio={options.ratio}: choose a smaller "
            "one"
        )
    merged = merge_rest(at_least_float32(hidden), video, staying)
    keep = (left.place < 0).index_fill(0, staying, True)
    return stay(left, keep), merged[keep].to(hidden.dtype)


def inner(options: Options) -> Inner:
    """The step with its options, for `tempme_vl.integrations`."""
    return in_front_of(options.layer, partial(step, options=options))
