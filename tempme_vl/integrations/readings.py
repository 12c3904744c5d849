"""What compressors read of a plain ViT beside its tokens: the attention of the block whose output the host takes, and
what sums up a frame."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from tempme_vl.compressors.base import Reading
from tempme_vl.integrations.devices import own_weights
from tempme_vl.merging import TokenMerger
from tempme_vl.state import AttentionContext, TokenState


class Watch(TokenMerger):
    """Keeps the attention that its block has just run, and changes nothing."""

    seen: AttentionContext | None = None

    def forward(self, state: TokenState, context: AttentionContext) -> TokenState:
        self.seen = context
        return state


def received_attention(attention: AttentionContext, prefix: int) -> Tensor:
    """(R, N - P): what each patch gets on average over heads and queries (FlashVID, HoliTom, VisionZip for SigLIP)."""
    sums = attention.column_sums().mean(1)
    return sums[:, prefix:] / sums.shape[1]


def cls_summary(attention: AttentionContext, tokens: Tensor, prefix: int) -> tuple[Tensor, Tensor]:
    """The CLS token of each frame, and how it attends to the patches.

    Args:
        tokens: (R, N, D), behind the block.

    Returns:
        (R, D); (R, N - P).
    """
    return tokens[:, 0], attention.rows(0, 1).mean(1)[:, 0, prefix:]


def pooling_head(tower: nn.Module) -> nn.Module | None:
    """SigLIP's head, which pools a frame by attention; None where a host's tower has none."""
    inner = getattr(tower, "vision_model", tower)
    return inner if getattr(inner, "head", None) is not None and hasattr(inner, "post_layernorm") else None


def head_summary(inner: Any, tokens: Tensor) -> tuple[Tensor, Tensor]:
    """What SigLIP's head makes of each frame's normed tokens, and how its one query attends to them (FastVID).

    Args:
        inner: what `pooling_head` gave.
        tokens: (R, N, D), before the last norm.

    Returns:
        (R, D); (R, N).
    """
    normed = inner.post_layernorm(tokens)
    with own_weights(inner.head):
        query = inner.head.probe.expand(len(normed), -1, -1)
    _, weights = inner.head.attention(query, normed, normed)  # on average over heads
    return inner.head(normed), weights[:, 0]


def read_videos(
    names: tuple[Reading, ...],
    attention: AttentionContext,
    frames: Tensor,
    prefix: int,
    tower: nn.Module,
    pool: Callable[[Tensor], Tensor],
) -> list[dict[str, Any]]:
    """Fields of `FrameFeatures` for each video.

    Args:
        names: which.
        attention: of the block whose output the host takes, of all frames.
        frames: (V, F, N, D), that output.
        prefix: P.
        pool: (R, N - P, C) -> (R, S, C), what the host does to the grid of a frame.
    """
    videos, tokens = len(frames), frames.flatten(0, 1)

    def by_video(values: Tensor) -> list[Tensor]:
        return list(values.unflatten(0, (videos, -1)))

    def on_grid(values: Tensor) -> Tensor:
        return pool(values.unsqueeze(-1).to(tokens)).squeeze(-1).float()

    found: list[dict[str, Any]] = [{} for _ in range(videos)]
    with torch.no_grad():
        if "received" in names:
            for each, values in zip(found, by_video(on_grid(received_attention(attention, prefix))), strict=True):
                each["received"] = values
        if "keys" in names:
            for each, values in zip(found, by_video(pool(attention.features()[:, prefix:])), strict=True):
                each["keys"] = values
        if "summary" in names:
            inner = pooling_head(tower)
            vector, weights = cls_summary(attention, tokens, prefix) if inner is None else head_summary(inner, tokens)
            for each, *pair in zip(found, by_video(vector), by_video(on_grid(weights)), strict=True):
                each["summary"] = tuple(pair)
    return found
