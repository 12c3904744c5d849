"""FastVID: Dynamic Density Pruning for Fast Video Large Language Models (arXiv 2503.11187, NeurIPS 2025).

A video is cut into segments where neighbouring frames differ. Of each frame the tokens stay that have the most of its
summary (salient); some frames of a segment, counted from its last, are anchors, of whose other tokens those stay that
are density peaks, each mixed with the mean of the tokens of the segment that are most like it (context).

The public code spreads a segment's budget in three ways, one for each of its hosts; see `Options.rule`. Its noise
against equal densities is left out.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from tempme_vl.compressors.base import Compressor, FrameFeatures, Grid, KeptFeatures, kept, require
from tempme_vl.compressors.peaks import density_peaks, neighbour_similarity, segments
from tempme_vl.compressors.shares import frame_tokens, retention_of, tokens_within
from tempme_vl.merging.method import checked
from tempme_vl.precision import at_least_float32
from tempme_vl.schema import Share, Size

_NEIGHBOURS = 4  # of a density


Rule = Literal["llava_onevision", "llava_video", "qwen2_5_vl"]


@dataclass(frozen=True)
class Options:
    """retention: share of each frame's tokens, rounded down, that a segment's budget counts for each of its frames.
    segments: c, as many at least, where there are as many frames.
    threshold: tau; a segment also ends where the cosine of two frames' summaries is below it.
    context: d, share of the budget that is for context.
    anchor_step: p; every so many frames, from the last of a segment back, are anchors.
    own: beta; a context token has at least this part of itself.
    rule: how a segment's budget is spread, as in the public code for a host. "llava_onevision": all frames have as many
        salient tokens and all anchors as many of context, which take from their own frame alone where they are no more
        than a segment of one frame has. "llava_video": both add up to the budget; the first frames and the last anchors
        have one more. "qwen2_5_vl": the same among those frames alone that the next one differs from and the segment's
        last, at least one token of context, and no anchor more than half its tokens of it, so that segments that stand
        still keep fewer.
    ignore: of the rule "qwen2_5_vl"; frames differ where the cosine of their summaries is below it.
    """

    retention: Share = 0.1
    segments: Size = 8
    threshold: Share = 0.9
    context: Share = 0.4
    anchor_step: Size = 4
    own: Share = 0.6
    rule: Rule = "llava_onevision"
    ignore: Share = 0.95


class Budget(NamedTuple):
    """Tokens of one frame that stay; alone: whether those of context take from this frame, and not from the segment."""

    salient: int
    context: int
    alone: bool = False


def cuts(alike: Tensor, count: int, threshold: float) -> list[int]:
    """The frames behind which a segment ends, but for the last.

    Args:
        alike: (T - 1,), of neighbouring frames.
        count: c; as many less one are those least alike.
        threshold: all below it are, too.
    """
    lowest = alike.topk(min(count - 1, len(alike)), largest=False).indices
    return sorted({*lowest.tolist(), *(alike < threshold).nonzero()[:, 0].tolist()})


def budgets(segment: range, alike: Tensor, tokens: int, options: Options) -> dict[int, Budget]:
    """What is kept of the frames of a segment; of those that are not in it nothing.

    Args:
        alike: (T - 1,), of neighbouring frames of the video.
        tokens: S.

    Raises:
        ValueError: a retention that leaves no token of a frame.
    """
    stay, length = frame_tokens(options.retention, tokens), len(segment)
    if options.rule == "llava_onevision":
        return _alike_for_all(segment, stay, options)
    context = int(stay * length * options.context)
    if options.rule == "llava_video":
        return _shared_out(segment, stay * length, context, options.anchor_step)
    changing = [frame for frame in segment[:-1] if alike[frame] < options.ignore]
    shared = _shared_out([*changing, segment[-1]], stay * length, max(context, 1), options.anchor_step)
    return shared if length == 1 else {frame: _capped(budget, tokens) for frame, budget in shared.items()}


def _alike_for_all(segment: range, stay: int, options: Options) -> dict[int, Budget]:
    context = int(stay * options.context)
    anchors = segment[:: -options.anchor_step]
    each = context * len(segment) // len(anchors)
    # an anchor that has no more than a single frame would have is one to the public code
    anchor, other = Budget(stay - context, each, each == context), Budget(stay - context, 0)
    return {frame: anchor if frame in anchors else other for frame in segment}


def _shared_out(frames: Sequence[int], total: int, context: int, step: int) -> dict[int, Budget]:
    anchors = frames[::-step]
    of_anchor = dict(zip(anchors, _parts(context, len(anchors)), strict=True))
    salient = _parts(total - context, len(frames))
    return {frame: Budget(some, of_anchor.get(frame, 0)) for frame, some in zip(frames, salient, strict=True)}


def _parts(number: int, parts: int) -> list[int]:
    """As equal as can be, the first ones larger."""
    return [number // parts + (part < number % parts) for part in range(parts)]


def _capped(budget: Budget, tokens: int) -> Budget:
    context = min(budget.context, tokens // 2)
    return Budget(min(budget.salient, tokens - context), context)


def salient(attention: Tensor, number: int) -> Tensor:
    """(S,) -> (number,) int64, ascending: the tokens with the most of their frame's summary."""
    return attention.topk(number).indices.sort().values


def centres(x: Tensor, number: int) -> Tensor:
    """(N, D), tokens of a frame that are not salient -> int64, ascending: the best density peaks, all where there are
    fewer (for which the public code fails)."""
    score = density_peaks(x, min(_NEIGHBOURS, len(x))).score if number else x.new_zeros(len(x))
    return score.topk(min(number, len(x))).indices.sort().values


def mixed(x: Tensor, center: Tensor, pool: Tensor, own: float) -> Tensor:
    """Centres, each mixed with the mean of the tokens that are most like it.

    Args:
        x: (N, D).
        center: (C,) int64.
        pool: (P,) int64, the tokens that go to a centre.
        own: a centre's least part of the mixture; of n tokens beside it it has 1 / (n + 1).

    Returns:
        (C, D).
    """
    unit = F.normalize(x, dim=-1)
    nearest = (unit[pool] @ unit[center].T).argmax(dim=-1)
    count = nearest.bincount(minlength=len(center)).unsqueeze(-1)
    mean = x.new_zeros(len(center), x.shape[1]).index_add(0, nearest, x[pool]) / count.clamp(min=1)
    part = (1 / (count + 1)).to(x.dtype).clamp(min=own)
    return part * x[center] + (1 - part) * mean


class Part(NamedTuple):
    """What is left of a segment: x (M, D); source (M,) int64, ascending, within the segment."""

    x: Tensor
    source: Tensor


def reduced(x: Tensor, attention: Tensor, budget: Mapping[int, Budget], options: Options) -> Part:
    """One segment.

    Args:
        x: (L, S, D).
        attention: (L, S).
        budget: of those of the L frames that keep a token.
    """
    length, tokens, _ = x.shape
    free = torch.ones(length, tokens, dtype=torch.bool, device=x.device)  # not salient
    for frame, of in budget.items():
        free[frame, salient(attention[frame], of.salient)] = False
    flat, source = x.flatten(0, 1), [(~free).flatten().nonzero()[:, 0]]
    values = [flat[source[0]]]
    for frame, of in budget.items():
        place = free[frame].nonzero()[:, 0]
        center = place[centres(x[frame, place], of.context)] + frame * tokens
        if len(center):
            pool = place + frame * tokens if of.alone else _pool(free, center, options)
            values.append(mixed(flat, center, pool, options.own))
            source.append(center)
    order = torch.cat(source).argsort()
    return Part(torch.cat(values)[order], torch.cat(source)[order])


def _pool(free: Tensor, center: Tensor, options: Options) -> Tensor:
    """The tokens that go to an anchor's centres: of the segment all that are not salient. Only by the rule for
    LLaVA-OneVision its own centres are among them."""
    if options.rule == "llava_onevision":
        return free.flatten().nonzero()[:, 0]
    return free.flatten().index_fill(0, center, False).nonzero()[:, 0]


def compress(features: FrameFeatures, options: Options) -> KeptFeatures:
    """In ascending order. For deeper layers a context token has its own features alone.

    Raises:
        ValueError: options out of bounds, a retention that leaves no token of a frame, or features without summary.
    """
    options = checked("fastvid", options)
    require(features, "summary")
    assert features.summary is not None
    summary, attention = (at_least_float32(part) for part in features.summary)
    x, alike, tokens = at_least_float32(features.x), neighbour_similarity(summary), features.x.shape[1]
    values, source = [], []
    for segment in segments(cuts(alike, options.segments, options.threshold), len(x)):
        first, inside = segment[0], slice(segment[0], segment[-1] + 1)
        budget = {frame - first: of for frame, of in budgets(segment, alike, tokens, options).items()}
        part = reduced(x[inside], attention[inside], budget, options)
        values.append(part.x)
        source.append(part.source + first * tokens)
    return kept(features, torch.cat(source), torch.cat(values).to(features.x.dtype))


def keep(share: float, frames: int, grid: Grid) -> Mapping[str, Any]:
    """Raises:
    ValueError: a share that is less than a token a frame.
    """
    number = tokens_within(share, frames, grid, frames, "it gives each frame a budget of a token and more")
    return {"retention": retention_of(number // frames, prod(grid))}


COMPRESSOR = Compressor(Options, compress, keep=keep, reads=("summary",))
