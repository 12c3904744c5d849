"""VisionZip: Longer is Better but Not Necessary in Vision Language Models (arXiv 2412.04467, CVPR 2025).

In each frame the tokens that receive most attention stay (dominant). Of the rest, in the order of places, tokens at
even distances are targets; each other one goes to the target whose key is most like its own, and a target becomes
itself plus the mean of what came to it: a sum of two, as in the public code.

The paper's CLIP has a CLS token: attention is that of its CLS query, CLS itself is the first dominant token, and all of
it happens in front of the projector (`dominant_with_cls`). `COMPRESSOR` is for towers without one, such as SigLIP: the
attention that a token receives from its whole frame, and tokens as the language model would read them. Public code that
does so for LLaVA puts rows' newlines behind the wrong tokens; here a token keeps its place.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from tempme_vl.compressors.base import Compressor, FrameFeatures, Grid, KeptFeatures, kept, require
from tempme_vl.compressors.shares import frame_tokens, retention_of, tokens_within
from tempme_vl.merging.method import checked
from tempme_vl.precision import at_least_float32
from tempme_vl.schema import Share


@dataclass(frozen=True)
class Options:
    """retention: share of each frame's tokens that stay, rounded down; the paper's 64 of 576.
    dominant: share of these that attention chooses, rounded down, at least one; the others gather the rest. The paper's
        54 of 64.
    """

    retention: Share = 64 / 576
    dominant: Share = 54 / 64


def dominant(attention: Tensor, number: int) -> Tensor:
    """(T, S) -> (T, number) int64, the tokens of each frame that receive the most, ascending."""
    return attention.topk(number, dim=1).indices.sort(dim=1).values


def dominant_with_cls(attention: Tensor, number: int) -> Tensor:
    """The same for towers with a CLS token in front, which is the first of them.

    Args:
        attention: (T, S), of CLS to the S tokens behind it.
        number: with CLS.

    Returns:
        (T, number) int64, as CLS and S tokens are counted.
    """
    return F.pad(1 + dominant(attention, number - 1), (1, 0))


def rest(chosen: Tensor, tokens: int) -> Tensor:
    """(T, A) int64 of so many tokens -> (T, tokens - A), the others, ascending."""
    taken = torch.zeros(len(chosen), tokens, dtype=torch.uint8, device=chosen.device).scatter(1, chosen, 1)
    return taken.argsort(dim=1, stable=True)[:, : tokens - chosen.shape[1]]


def targets(tokens: int, number: int) -> list[int]:
    """So many of the tokens at even distances, from the first."""
    step = max(1, tokens // max(1, number))
    return list(range(0, tokens, step))[:number]


class Gathered(NamedTuple):
    """x: (T, C, D), the targets with what came to them. assigned: (T, N - C) int64, the target of each other token."""

    x: Tensor
    assigned: Tensor


def gather(x: Tensor, keys: Tensor, number: int) -> Gathered:
    """Tokens that gather all others.

    Args:
        x: (T, N, D).
        keys: (T, N, K).
        number: C, 1 or more.
    """
    places = targets(x.shape[1], number)
    others = sorted(set(range(x.shape[1])) - set(places))
    unit = F.normalize(keys, dim=-1)
    assigned = (unit[:, others] @ unit[:, places].transpose(1, 2)).argmax(dim=-1)
    belongs = F.one_hot(assigned, number).transpose(1, 2).to(x.dtype)  # (T, C, N - C)
    means = belongs @ x[:, others] / belongs.sum(-1, keepdim=True).clamp(min=1)
    return Gathered(x[:, places] + means, assigned)


def compress(features: FrameFeatures, options: Options) -> KeptFeatures:
    """Of each frame the dominant tokens, then the targets. For deeper layers a target has its own features alone.

    Raises:
        ValueError: options out of bounds, or such that leave a frame without a token; features without attention or
            keys.
    """
    options = checked("visionzip", options)
    require(features, "received", "keys")
    assert features.received is not None and features.keys is not None
    frames, tokens, _ = features.x.shape
    first, more = _numbers(tokens, options)
    x, keys = at_least_float32(features.x), at_least_float32(features.keys)
    chosen = dominant(features.received, first)
    others = rest(chosen, tokens)
    gathered = gather(_at(x, others), _at(keys, others), more).x if more else x[:, :0]
    places = torch.cat([chosen, others[:, targets(tokens - first, more)]], dim=1)
    source = places + tokens * torch.arange(frames, device=places.device).unsqueeze(1)
    left = torch.cat([_at(x, chosen), gathered], dim=1).to(features.x.dtype)
    return kept(features, source.flatten(), left.flatten(0, 1))


def _at(x: Tensor, places: Tensor) -> Tensor:
    """(T, S, D), (T, N) int64 -> (T, N, D)."""
    return x.gather(1, places.unsqueeze(-1).expand(-1, -1, x.shape[-1]))


def _numbers(tokens: int, options: Options) -> tuple[int, int]:
    """Dominant tokens and targets of a frame."""
    stay = frame_tokens(options.retention, tokens)
    first = max(1, int(stay * options.dominant))
    return first, stay - first


def count(frames: int, grid: Grid, options: Options) -> int:
    """Raises:
    ValueError: see `compress`.
    """
    return frames * sum(_numbers(prod(grid), checked("visionzip", options)))


def keep(share: float, frames: int, grid: Grid) -> Mapping[str, Any]:
    """Raises:
    ValueError: a share that is less than a token a frame.
    """
    number = tokens_within(share, frames, grid, frames, "each frame keeps a token")
    return {"retention": retention_of(number // frames, prod(grid))}


COMPRESSOR = Compressor(Options, compress, count, keep, ("received", "keys"))
