"""FlashVID (arXiv 2602.08024, "FlashVID: Efficient Video Large Language Models via Training-free Tree-based
Spatiotemporal Token Merging"): of each frame the tokens that are attended and unlike each other stay as they are; the
others become trees through the frames of a segment, each tree one token, and what is left of a frame is clustered.

The paper lets more tokens into the language model than it keeps in the end (`expansion`) and drops the rest in front of
one of its late layers: here with `inner_layer`.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from math import ceil
from typing import Annotated, Any, Literal, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import normalize

from tempme_vl.compressors.base import Compressor, FrameFeatures, Grid, KeptFeatures, kept, require
from tempme_vl.compressors.clusters import cluster, means
from tempme_vl.compressors.inner import Inner, Left, attended, in_front_of, stay
from tempme_vl.compressors.peaks import neighbour_similarity, segments
from tempme_vl.merging.method import checked
from tempme_vl.precision import at_least_float32
from tempme_vl.schema import Cosine, Portion, Range, Share, Size

Selection = Literal["attn", "attn_div", "attn_div_v2"]
_NEVER = -2.0  # below any cosine


@dataclass(frozen=True)
class Options:
    """retention: share of the tokens that is left, before `expansion`.
    expansion: how many times as many are left.
    alpha: share of them that stays unmerged.
    selection: how those are chosen, by attention, by attention and distance to each other, or also by likeness to the
        mean of their segment (the paper's for LLaVA; for Qwen it takes "attn_div").
    segment_threshold: frames are of one segment while their means' cosine is not below it.
    min_segments: there are at least so many, as far as there are frames (for Qwen 4).
    temporal_threshold: a token goes into one of the frame before where their cosine is above it.
    public_code: as the published code does it. It adds a subtree to its parent as if it were one token, so that in
        trees of three frames and more the mean comes out too large; and in segments of one frame it clusters the tokens
        that stay unmerged once more.
    inner_layer: of the language model, in front of which all video tokens go but those that the last token attends to
        most (the paper's: 20, for Qwen3-VL 28); None for nowhere.
    inner_retention: share of them that stays there, rounded up.
    """

    retention: Portion = 0.25
    expansion: Annotated[float, Range(1, 100)] = 1.25
    alpha: Share = 0.7
    selection: Selection = "attn_div_v2"
    segment_threshold: Cosine = 0.9
    min_segments: Size = 8
    temporal_threshold: Cosine = 0.8
    public_code: bool = False
    inner_layer: Size | None = None
    inner_retention: Portion = 0.3


class Budget(NamedTuple):
    """Tokens of a frame on average: that stay unmerged, and that the others become."""

    unmerged: int
    merged: int


def budget(tokens: int, options: Options) -> Budget:
    whole = min(tokens, ceil(tokens * options.retention * options.expansion))
    unmerged = min(whole, ceil(whole * options.alpha))
    return Budget(unmerged, whole - unmerged)


def segment(x: Tensor, threshold: float, least: int) -> list[range]:
    """Frames that follow each other and look alike; the least alike are cut, too, where those were too few.

    Args:
        x: (T, S, D).
    """
    similarity = neighbour_similarity(x.mean(1)).tolist()
    cuts = [i for i, value in enumerate(similarity) if value < threshold]
    others = sorted(set(range(len(similarity))) - set(cuts), key=lambda i: similarity[i])
    return segments([*cuts, *others[: max(0, least - 1 - len(cuts))]], len(x))


def select(x: Tensor, received: Tensor, count: int, selection: Selection) -> Tensor:
    """The tokens of each frame of a segment that stay unmerged.

    The one furthest from its nearest is the first; then follows, again and again, the one furthest from those taken.
    The distance to a token is 1 - cosine, times the attention that the token receives.

    Args:
        x: (L, S, D).
        received: (L, S).
        count: A, at most S.

    Returns:
        (L, A) int64, ascending.
    """
    if selection == "attn" or count == 0:
        return received.topk(count).indices.sort().values
    unit = normalize(x, dim=-1)
    weight = received if selection == "attn_div" else received * (x @ x.mean((0, 1)))
    apart = (1 - unit @ unit.mT) * weight.unsqueeze(1)  # to a token, from each: a column
    nearest = apart.topk(min(2, x.shape[1]), dim=1, largest=False).values[:, -1]  # a token's own is the nearest
    frames, taken = torch.arange(len(x), device=x.device), torch.zeros_like(received, dtype=torch.bool)
    for number in range(count):
        token = nearest.masked_fill(taken, -torch.inf).argmax(-1)
        taken[frames, token] = True
        nearest = apart[frames, token] if number == 0 else torch.minimum(nearest, apart[frames, token])
    return taken.nonzero()[:, 1].reshape(len(x), count)


def merge_trees(
    x: Tensor, free: Tensor, threshold: float, least: int, public_code: bool = False
) -> tuple[Tensor, Tensor]:
    """Tokens of a segment go into the most similar of the frame before, wherever it is, and those into theirs.

    Args:
        x: (L, S, D).
        free: (L, S) bool, tokens that may merge, with each other.
        least: tokens that are left at least, those that are not free included.

    Returns:
        x, each root the mean of its tree; (L, S) bool, the free tokens that are roots.
    """
    unit = normalize(x, dim=-1)
    similarity = unit[1:] @ unit[:-1].mT
    similarity = similarity.masked_fill(~(free[1:].unsqueeze(2) & free[:-1].unsqueeze(1)), _NEVER)
    best, parent = similarity.max(-1)
    goes = best > threshold
    if free.numel() - int(goes.sum()) < least:
        goes = best > best.flatten().topk(free.numel() - least).values[-1]
    total, size = x.clone(), x.new_ones(free.shape)
    for t in range(len(x) - 1, 0, -1):
        to, children = parent[t - 1][goes[t - 1]], goes[t - 1]
        total[t - 1].index_add_(0, to, total[t][children])
        size[t - 1].index_add_(0, to, torch.ones_like(size[t][children]) if public_code else size[t][children])
    left = free.clone()
    left[1:] &= ~goes
    return total / size.unsqueeze(-1), left


def cluster_frames(x: Tensor, left: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """What is left of each frame, clustered so that of the segment about `count` are left.

    Args:
        x: (L, S, D).
        left: (L, S) bool.

    Returns:
        (M, D); (M,) int64, the numbers of their centres in the segment.
    """
    share = count / max(1, int(left.sum()))
    tokens, numbers = [x.new_empty(0, x.shape[-1])], [left.new_empty(0, dtype=torch.int64)]
    for t, places in enumerate(left):
        number = places.nonzero()[:, 0]
        points, wanted = x[t, number], ceil(len(number) * share)
        if share < 1 and wanted:
            centres, assigned = cluster(points, wanted, min(wanted, 7))
            points, number = means(points, assigned, wanted), number[centres]
        tokens.append(points)
        numbers.append(number + t * x.shape[1])
    return torch.cat(tokens), torch.cat(numbers)


def compress_segment(x: Tensor, received: Tensor, options: Options) -> tuple[Tensor, Tensor]:
    """(L, S, D), (L, S) -> (M, D), (M,) int64, their numbers in the segment; in no order."""
    frames, tokens, _ = x.shape
    unmerged, merged = budget(tokens, options)
    chosen = select(x, received, unmerged, options.selection)
    free = torch.ones_like(received, dtype=torch.bool).scatter(1, chosen, False)
    parts = x[~free], (~free).flatten().nonzero()[:, 0]
    if not merged:
        return parts
    if frames > 1:
        roots, left = merge_trees(
            x, free, options.temporal_threshold, (unmerged + merged) * frames, options.public_code
        )
    else:
        roots, left = x, torch.ones_like(free) if options.public_code else free
    clustered = cluster_frames(roots, left, merged * frames)
    return torch.cat([parts[0], clustered[0]]), torch.cat([parts[1], clustered[1]])


def compress(features: FrameFeatures, options: Options) -> KeptFeatures:
    """In ascending order of numbers.

    Raises:
        ValueError: options out of bounds, or features without `received`.
    """
    options = checked("flashvid", options)
    require(features, "received")
    assert features.received is not None  # for type checkers
    x, received = at_least_float32(features.x), at_least_float32(features.received)
    parts, numbers = [], []
    for part in segment(x, options.segment_threshold, options.min_segments):
        left, number = compress_segment(x[part.start : part.stop], received[part.start : part.stop], options)
        parts.append(left)
        numbers.append(number + part.start * x.shape[1])
    source, order = torch.cat(numbers).sort(stable=True)
    return kept(features, source, torch.cat(parts)[order].to(features.x.dtype))


def keep(share: float, frames: int, grid: Grid) -> dict[str, Any]:
    """About this share: numbers are rounded up in each frame."""
    return {"retention": share, "expansion": 1.0}


def attend_most(left: Left, attention: Tensor, retention: float) -> Tensor:
    """(N,) bool, what stays of a prompt: its words, and the video tokens that the last token attends to most.

    Args:
        attention: (H, Q, N), the last query last.
        retention: share of the video tokens that stays.
    """
    received = attended(at_least_float32(attention), left.video)
    best = received.topk(ceil(len(received) * retention)).indices
    return (left.place < 0).index_fill(0, left.video[best], True)


def inner(options: Options, layers: int) -> Inner | None:
    """Inside the language model."""
    if options.inner_layer is None:
        return None
    return in_front_of(options.inner_layer, partial(_keep_attended, options.inner_retention))


def _keep_attended(share: float, left: Left, hidden: Tensor, attention: Tensor) -> tuple[Left, Tensor]:
    stays = attend_most(left, attention, share)
    return stay(left, stays), hidden[stays]


COMPRESSOR = Compressor(Options, compress, keep=keep, reads=("received",), inner=inner)
