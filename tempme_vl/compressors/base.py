"""What compressors between tower and language model have in common: the values they map, and their record.

Letters: T frames (or temporal patches), S tokens of each, D wide; M tokens that are left. The token s of frame t has
the number t * S + s.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, TypeAlias

import torch
from torch import Tensor

from tempme_vl.compressors.inner import Inner

Grid: TypeAlias = tuple[int, int]  # rows and columns of a frame's tokens
# What a compressor may read of a tower beside the features; the names of fields of `FrameFeatures`
Reading = Literal["received", "summary", "keys", "pixels"]


@dataclass(frozen=True)
class FrameFeatures:
    """What a host's tower and projector give for one video, as its language model would read it.

    Attributes:
        x: (T, S, D).
        grid: rows and columns of the S tokens.
        deeper: (T, S, D) each, for deeper layers of the language model.
        received: (T, S) float, attention that each token receives in the tower's last block that counts: softmax, mean
            over heads and over the queries of its frame.
        summary: (T, G), a vector for each frame, and (T, S) float, how much each token has in it.
        keys: (T, S, K), head-mean keys of the same block.
        pixels: (T, S, 2, P), of the first and of the last frame that a temporal patch joins (the same one where it
            joins none) the P values of a token's pixels, all channels, between 0 and 1.
        separator: (D,), what the host puts between rows or frames (LLaVA's newline), where it has one.
    """

    x: Tensor
    grid: Grid
    deeper: tuple[Tensor, ...] = ()
    received: Tensor | None = None
    summary: tuple[Tensor, Tensor] | None = None
    keys: Tensor | None = None
    pixels: Tensor | None = None
    separator: Tensor | None = None


class Clip(NamedTuple):
    """Tokens that stand together: how many, and the first and the last frame that they are of."""

    tokens: int
    first: int
    last: int


@dataclass(frozen=True)
class KeptFeatures:
    """What is left of a video, in the order in which the language model reads it.

    Attributes:
        x: (M, D).
        source: (M,) int64, the number of the token in whose place each stands; -1 for a separator.
        deeper: (M, D) each.
        clips: the parts of it, one behind the other; () where each frame is one (`by_frame`).
        size: (M,) float, how many tokens of the host each holds; None where nobody asks.
    """

    x: Tensor
    source: Tensor
    deeper: tuple[Tensor, ...] = ()
    clips: tuple[Clip, ...] = ()
    size: Tensor | None = None


@dataclass(frozen=True)
class Compressor:
    """A method that makes the tokens of a video fewer between tower and language model.

    Attributes:
        options: a frozen dataclass, with the defaults of its paper.
        compress: (features, options) -> what is left. Of features for deeper layers it keeps those of the tokens that
            are left (`kept`), unless it says otherwise.
        count: (T, grid, options) -> M, computed ahead; None where the data decide, whatever the options or with these.
        keep: (share, T, grid) -> options, by name, with which at most this share of the tokens is left (of a count
            that the data decide: about this share); None where no option sets it.
        reads: what it needs beside x; where options decide it, (options) -> that.
        inner: (options, layers of the language model) -> what it does inside the language model, or None.
        keep_inside: (share) -> options, by name, with which the layers of the language model read at most this share of
            the tokens on average; where `keep` is None.
    """

    options: type
    compress: Callable[[FrameFeatures, Any], KeptFeatures]
    count: Callable[[int, Grid, Any], int | None] | None = None
    keep: Callable[[float, int, Grid], Mapping[str, Any]] | None = None
    reads: tuple[Reading, ...] | Callable[[Any], tuple[Reading, ...]] = ()
    inner: Callable[[Any, int], Inner | None] | None = None
    keep_inside: Callable[[float], Mapping[str, Any]] | None = None

    @property
    def takes_budget(self) -> bool:
        """Whether an option sets how many tokens are left."""
        return self.keep is not None or self.keep_inside is not None

    def reads_with(self, options: Any) -> tuple[Reading, ...]:
        """What it needs beside x with these options."""
        return self.reads(options) if callable(self.reads) else self.reads


def kept(features: FrameFeatures, source: Tensor, x: Tensor | None = None) -> KeptFeatures:
    """What is left where tokens are chosen, those of deeper layers by the same choice.

    Args:
        source: (M,) int64.
        x: (M, D), where the tokens that stay were changed.
    """
    chosen = features.x.flatten(0, 1)[source] if x is None else x
    return KeptFeatures(chosen, source, tuple(level.flatten(0, 1)[source] for level in features.deeper))


def by_frame(left: KeptFeatures, tokens: int) -> KeptFeatures:
    """The same with each frame's tokens together, in ascending order of frames, and a clip for each that has some. A
    separator stays behind what it follows.

    Args:
        tokens: S.
    """
    if left.clips:
        return left
    frame = torch.div(_followed(left.source), tokens, rounding_mode="floor")
    order = frame.argsort(stable=True)
    frames, counts = frame[order].unique_consecutive(return_counts=True)
    clips = tuple(Clip(count, t, t) for t, count in zip(frames.tolist(), counts.tolist(), strict=True))
    deeper = tuple(level[order] for level in left.deeper)
    return KeptFeatures(left.x[order], left.source[order], deeper, clips)


def _followed(source: Tensor) -> Tensor:
    """(M,) with the number of the token before it in the place of each separator's -1."""
    number = torch.arange(len(source), device=source.device)
    before = torch.where(source >= 0, number, -1).cummax(0).values
    return source[before.clamp(min=0)].clamp(min=0)


def require(features: FrameFeatures, *names: Reading) -> None:
    """Raises:
    ValueError: features without what a compressor reads.
    """
    if missing := [name for name in names if getattr(features, name) is None]:
        raise ValueError(f"expected features with {', '.join(missing)}, which this method reads; got them without")
