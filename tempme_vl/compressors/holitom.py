"""HoliTom (arXiv 2505.21334, "HoliTom: Holistic Token Merging for Fast Video Large Language Models"): the video is cut
into windows so that as many tokens as possible stand still in them; a place that stands still becomes one token for
its window, and of all that is then there only the attended tokens and the centres of clusters stay.

The paper goes on inside the language model (`tempme_vl.compressors.holitom_inner`): here with `inner_layer`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from math import ceil
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import normalize

from tempme_vl.compressors import holitom_inner
from tempme_vl.compressors.base import Clip, Compressor, FrameFeatures, Grid, KeptFeatures, require
from tempme_vl.compressors.clusters import cluster, sums
from tempme_vl.compressors.inner import Inner
from tempme_vl.compressors.separators import insert, kept_between
from tempme_vl.merging.method import checked
from tempme_vl.precision import at_least_float32
from tempme_vl.schema import Cosine, Portion, Share, Size


@dataclass(frozen=True)
class Options:
    """retention: share of the tokens that is left.
    tau: a place stands still between two frames where its cosine is above it (with a retention of 0.1 the paper takes
        0.65).
    contextual: share of what is left of a frame that are centres of clusters, and not the most attended.
    beta: what a centre counts in its cluster, beside the mean of the others; None for the mean of all.
    neighbours: of a token's density.
    longest: frames of a window at most.
    rows: a frame's tokens in the order of their places, with the host's separator behind each row that has some, as
        LLaVA-Video reads them; otherwise the places that stand still come first, then frame by frame the attended ones
        and the centres.
    inner_layer: of the language model, in front of which the video tokens that the last token attends to least go into
        the others (the paper's for 28 layers: 18); None for nowhere.
    inner_ratio: share of them that go.
    """

    retention: Portion = 0.15
    tau: Cosine = 0.8
    contextual: Share = 0.0
    beta: Share | None = 0.6
    neighbours: Size = 7
    longest: Size = 1024
    rows: bool = False
    inner_layer: Size | None = None
    inner_ratio: Share = 0.5


class Windows(NamedTuple):
    """frames: of each, in order. saved: how many tokens fewer there are once each still place is one token."""

    frames: list[range]
    saved: int


class Part(NamedTuple):
    """x: (M, D), of the frames from first to last. source: (M,) int64."""

    x: Tensor
    source: Tensor
    first: int
    last: int


def place_similarity(x: Tensor) -> Tensor:
    """(T, S, D) -> (T - 1, S), the cosine of each token with that at its place in the next frame."""
    unit = normalize(x, dim=-1)
    return (unit[:-1] * unit[1:]).sum(-1)


def windows(still: Tensor, longest: int) -> Windows:
    """The windows that save most, found exactly; among equals the shorter ones, with the later frames in them.

    Args:
        still: (T - 1, S) bool, places that stay the same into the next frame.
        longest: frames of a window at most.
    """
    frames = len(still) + 1
    # alike[a][i]: places that are still in all of the frames from a to a + i + 1
    alike = [still[a:].long().cumprod(0).sum(1).tolist() for a in range(frames - 1)]
    best, start = [0] * (frames + 1), [0] * frames  # saved before a frame; the first of the window that ends with it
    for end in range(frames):
        best[end + 1], start[end] = best[end], end
        for length in range(2, min(end + 1, longest) + 1):
            first = end - length + 1
            saved = best[first] + alike[first][length - 2] * (length - 1)
            if saved > best[end + 1]:
                best[end + 1], start[end] = saved, first
    found, end = [], frames - 1
    while end >= 0:
        found.append(range(start[end], end + 1))
        end = start[end] - 1
    return Windows(found[::-1], best[-1])


def remaining_retention(retention: float, saved: int, tokens: int) -> float:
    """The share that may stay of what is there once each still place is one token."""
    return min(retention / ((tokens - saved) / tokens), 1.0)


def still_places(still: Tensor, window: range) -> Tensor:
    """(T - 1, S) -> (S,) bool; of a window of one frame none."""
    return still[window.start : window.stop - 1].all(0) & (len(window) > 1)


def contextual_tokens(x: Tensor, count: int, options: Options) -> tuple[Tensor, Tensor]:
    """Clusters around density peaks.

    Args:
        x: (N, D).
        count: M.

    Returns:
        (M, D); (M,) int64, the centres, ascending.
    """
    if count == 0:
        return x[:0], torch.zeros(0, dtype=torch.int64, device=x.device)
    centres, assigned = cluster(x, count, min(options.neighbours, count), ascending=True)
    others = torch.ones(len(x), dtype=torch.bool, device=x.device).index_fill(0, centres, False)
    total, number = sums(x[others], assigned[others], count)
    if options.beta is None:
        return (x[centres] + total) / (number + 1), centres
    merged = options.beta * x[centres] + (1 - options.beta) * total / number.clamp(min=1)
    return torch.where(number > 0, merged, x[centres]), centres


def frame_tokens(x: Tensor, received: Tensor, retention: float, options: Options) -> tuple[Tensor, Tensor]:
    """(N, D), (N,) of one frame -> (M, D), (M,) int64: the most attended ones, then centres; each ascending."""
    total = ceil(len(x) * retention)
    attended = received.topk(round(total * (1 - options.contextual))).indices.sort().values
    rest = torch.ones(len(x), dtype=torch.bool, device=x.device).index_fill(0, attended, False).nonzero()[:, 0]
    merged, centres = contextual_tokens(x[rest], total - len(attended), options)
    return torch.cat([x[attended], merged]), torch.cat([attended, rest[centres]])


def window_parts(
    x: Tensor, received: Tensor, window: range, still: Tensor, retention: float, options: Options
) -> Iterator[Part]:
    """What is left of a window: what stands still, then each frame's others.

    Args:
        x: (T, S, D).
        received: (T, S).
        still: (S,) bool.
        retention: of these tokens.
    """
    tokens, first = x.shape[1], window.start
    fixed, moving = still.nonzero()[:, 0], (~still).nonzero()[:, 0]
    whole = x[first : window.stop, fixed].mean(0)
    merged, centres = contextual_tokens(whole, round(len(fixed) * retention), options)
    yield Part(merged, fixed[centres] + first * tokens, first, window.stop - 1)
    for t in window:
        left, places = frame_tokens(x[t, moving], received[t, moving], retention, options)
        yield Part(left, moving[places] + t * tokens, t, t)


def in_rows(parts: list[Part], tokens: int, columns: int, separator: Tensor) -> list[Part]:
    """What stands still beside the first frame's others, each frame in the order of places, a separator behind each
    row."""
    still, first, *others = parts
    joined = Part(torch.cat([still.x, first.x]), torch.cat([still.source, first.source]), first.first, first.last)
    return [_in_rows(part, tokens, columns, separator) for part in (joined, *others)]


def _in_rows(part: Part, tokens: int, columns: int, separator: Tensor) -> Part:
    source, order = part.source.sort()
    row = source % tokens // columns
    ends = torch.ones_like(row, dtype=torch.bool)
    ends[:-1] = row[1:] != row[:-1]
    return Part(*insert(part.x[order], source, ends, separator), part.first, part.last)


def compress(features: FrameFeatures, options: Options) -> KeptFeatures:
    """Window by window; see `Options.rows`.

    Raises:
        ValueError: options out of bounds, features without `received`, or rows without a separator.
    """
    options = checked("holitom", options)
    require(features, "received")
    assert features.received is not None  # for type checkers
    if options.rows and features.separator is None:
        raise ValueError("rows end with the host's separator, and features came without one: leave out rows")
    x, received = at_least_float32(features.x), at_least_float32(features.received)
    frames, tokens, _ = x.shape
    still = place_similarity(x) > options.tau
    cut = windows(still, options.longest)
    retention = remaining_retention(options.retention, cut.saved, frames * tokens)
    parts: list[Part] = []
    for window in cut.frames:
        left = list(window_parts(x, received, window, still_places(still, window), retention, options))
        if options.rows and features.separator is not None:
            left = in_rows(left, tokens, features.grid[1], features.separator)
        parts += left
    clips = tuple(Clip(len(part.x), part.first, part.last) for part in parts if len(part.x))
    return kept_between(features, torch.cat([part.source for part in parts]), torch.cat([p.x for p in parts]), clips)


def keep(share: float, frames: int, grid: Grid) -> dict[str, Any]:
    """About this share: numbers are rounded up in each frame, and separators come on top."""
    return {"retention": share}


def inner(options: Options, layers: int) -> Inner | None:
    """Inside the language model."""
    if options.inner_layer is None:
        return None
    return holitom_inner.inner(holitom_inner.Options(options.inner_layer, options.inner_ratio))


COMPRESSOR = Compressor(Options, compress, keep=keep, reads=("received",), inner=inner)
