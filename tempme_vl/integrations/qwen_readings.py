"""What compressors read of a Qwen vision tower beside its features: the attention of its last block.

Letters: T temporal patches of a video, S blocks of each, u patches of a block; H heads of d.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from tempme_vl.compressors.base import Reading
from tempme_vl.integrations.qwen_attention import rotated
from tempme_vl.integrations.qwen_parts import Grid, layout_of, ordered, patch_angles
from tempme_vl.integrations.readings import received_attention
from tempme_vl.precision import at_least_float32
from tempme_vl.state import AttentionContext

READINGS: tuple[Reading, ...] = ("received", "summary", "keys", "pixels")


@contextmanager
def watched(tower: Any, wanted: object = True) -> Iterator[list[Tensor]]:
    """Keeps, if wanted, queries, keys and values, (N * u, 3 * H * d), that the last block makes while the tower runs
    in it."""
    seen: list[Tensor] = []
    if not wanted:
        yield seen
        return
    handle = tower.blocks[-1].attn.qkv.register_forward_hook(lambda module, given, made: seen.append(made.detach()))
    try:
        yield seen
    finally:
        handle.remove()


@torch.no_grad()
def last_attention(tower: Any, qkv: Tensor, grids: Sequence[Grid]) -> list[AttentionContext]:
    """The attention of each video's frames, patches in the order of the pixels: (T, H, S * u, d) queries and keys.

    Args:
        qkv: what was kept of one run of the tower.
        grids: of its videos.

    Raises:
        ValueError: a tower whose last block sees windows, so that nothing has seen a frame.
    """
    layout, depth = layout_of(tower, grids, qkv.device), len(tower.blocks)
    if depth - 1 not in layout.full_at:
        raise ValueError(f"expected a tower whose last block, {depth - 1}, attends to whole frames")
    attn = tower.blocks[-1].attn
    pairs = qkv.unflatten(1, (3, attn.num_heads, -1))[:, :2]
    pairs = rotated(pairs, *patch_angles(tower, pairs, grids, layout.order))
    back = None if layout.order is None else layout.order.argsort()
    pairs = ordered(pairs, back, tower)
    found = []
    for (slots, rows, columns), video in zip(grids, pairs.split([t * h * w for t, h, w in grids]), strict=True):
        queries, keys = video.unflatten(0, (slots, rows * columns)).permute(2, 0, 3, 1, 4)
        found.append(AttentionContext(keys, queries, scale=attn.scaling))
    return found


def by_blocks(values: Tensor, unit: int) -> Tensor:
    """(T, S * u, ...) -> (T, S, ...), the mean over the patches of each block."""
    return values.unflatten(1, (-1, unit)).mean(2)


def summary_attention(attention: AttentionContext, unit: int) -> Tensor:
    """(T, S): how a frame's mean query attends to the mean keys of its blocks, on average over heads (FastVID)."""
    assert attention.queries is not None
    query = at_least_float32(attention.queries).mean(2, keepdim=True)
    keys = at_least_float32(attention.keys).unflatten(2, (-1, unit)).mean(3)
    return AttentionContext(keys, query, scale=attention.scale).rows(0, 1)[:, :, 0].mean(1)


@torch.no_grad()
def readings(names: Sequence[Reading], attention: AttentionContext, x: Tensor, unit: int) -> dict[str, Any]:
    """Fields of `FrameFeatures` for one video, but for pixels.

    Args:
        x: (T, S, D), its features; their mean sums up a frame.
    """
    found: dict[str, Any] = {}
    if "received" in names:
        found["received"] = by_blocks(received_attention(attention, 0), unit)
    if "summary" in names:
        found["summary"] = x.mean(1), summary_attention(attention, unit)
    if "keys" in names:
        found["keys"] = by_blocks(attention.features(), unit)
    return found
