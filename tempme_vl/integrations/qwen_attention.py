"""Attention of a Qwen vision tower among chosen patches: its own projections, its rotation, its attention function.

Letters: N patches, u of them a block; H heads of d; G segments (`tempme_vl.merging.tubes.Segments`), of blocks.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AttentionInterface

from tempme_vl.merging.tubes import Segments


class Batch(NamedTuple):
    """Segments of equal lengths: how many, and the blocks that each has as queries and as keys."""

    segments: int
    queries: int
    keys: int


@dataclass(frozen=True)
class Pattern:
    """Segments in the form in which an attention function takes them.

    Attributes:
        queries, keys: (.,) int64, blocks in the order in which they go in; None as they stand.
        back: (N / u,) int64, where each block stands in what comes out; None as they stand.
        bias: (keys * u,) float, added for single keys.
        batches: that go in one by one; () where all go in at once, packed.
        ends: of packed segments the int32 ends of queries and of keys, in patches, each from 0 on.
        longest: patches of the longest packed segment.
        unit: u.
    """

    unit: int
    queries: Tensor | None
    keys: Tensor | None
    back: Tensor | None = None
    bias: Tensor | None = None
    batches: tuple[Batch, ...] = ()
    ends: tuple[Tensor, Tensor] | None = None
    longest: int = 0

    @classmethod
    def packed(cls, segments: Segments, unit: int, longest: int) -> Pattern:
        """For flash attention, without waiting for the device.

        Args:
            longest: blocks of the longest segment.

        Raises:
            ValueError: segments with a bias, which these functions do not take.
        """
        if segments.bias is not None or segments.queries is not None:
            raise ValueError(
                'attend="clip" adds to single keys, which flash attention does not; load the model with '
                'attn_implementation="sdpa", or take attend="slot"'
            )
        lengths = (segments.query_lengths, segments.key_lengths)
        ends = tuple(F.pad((unit * each).cumsum(0, dtype=torch.int32), (1, 0)) for each in lengths)
        return cls(unit, None, segments.keys, ends=(ends[0], ends[1]), longest=unit * longest)

    @classmethod
    def batched(cls, segments: Segments, unit: int) -> Pattern:
        """For functions that take equal lengths: segments of the same ones go in together. The numbers are the same as
        one by one, in fewer calls."""
        lengths = list(zip(segments.query_lengths.tolist(), segments.key_lengths.tolist(), strict=True))
        parts: dict[tuple[int, int], list[int]] = {}
        for number, pair in enumerate(lengths):
            if pair[0]:
                parts.setdefault(pair, []).append(number)
        batches = tuple(Batch(len(numbers), *pair) for pair, numbers in parts.items())
        if len(parts) == 1 and segments.keys is None:
            return cls(unit, None, None, batches=batches)
        device = segments.key_lengths.device
        queries, keys = (
            torch.cat([_rows(starts, numbers, pair[side]) for pair, numbers in parts.items()]).to(device)
            for side, starts in enumerate(_starts(lengths))
        )
        if segments.queries is not None:
            queries = segments.queries[queries]
        bias = None if segments.bias is None else segments.bias[keys].repeat_interleave(unit)
        keys = keys if segments.keys is None else segments.keys[keys]
        return cls(unit, queries, keys, queries.argsort(), bias, batches)


def _starts(lengths: list[tuple[int, int]]) -> list[Tensor]:
    """Where the queries and the keys of each segment start."""
    return list(F.pad(torch.tensor(lengths).cumsum(0), (0, 0, 1, 0))[:-1].unbind(1))


def _rows(starts: Tensor, numbers: list[int], length: int) -> Tensor:
    return (starts[numbers].unsqueeze(1) + torch.arange(length)).flatten()


def attention(
    attn: Any, implementation: str, x: Tensor, angles: tuple[Tensor, Tensor], pattern: Pattern
) -> tuple[Tensor, Tensor]:
    """The attention module of a block.

    Args:
        attn: with `qkv`, `proj`, `num_heads` and `scaling`.
        implementation: what transformers calls the attention function.
        x: (N, D).
        angles: see `rotated`.

    Returns:
        (N, D), and the rotated keys (N, H, d).
    """
    qkv = attn.qkv(x).unflatten(1, (3, attn.num_heads, -1))
    q, k = rotated(qkv[:, :2], *angles).unbind(1)
    keys, v = k, qkv[:, 2]
    q, k, v = (
        _blocks(t, rows, pattern.unit) for t, rows in ((q, pattern.queries), (k, pattern.keys), (v, pattern.keys))
    )
    function = eager if implementation == "eager" else AttentionInterface()[implementation]
    if pattern.ends is not None:
        named = ("cu_seq_lens_q", "cu_seq_lens_k")
        more = dict(zip(named, pattern.ends, strict=True)) | dict.fromkeys(
            ("max_length_q", "max_length_k"), pattern.longest
        )
        out = _call(function, attn, (q, k, v), 1, None, **more)
    else:
        out = _by_batch(function, attn, (q, k, v), pattern)
    return attn.proj(_blocks(out, pattern.back, pattern.unit)), keys


def rotated(x: Tensor, cosines: Tensor, sines: Tensor) -> Tensor:
    """Queries and keys turned by the angles of their rows and columns, in float32 as the host does it.

    Args:
        x: (N, 2, H, d).
        cosines, sines: (N, 1, 1, d) float.
    """
    wide = x.float()
    first, second = wide.chunk(2, dim=-1)
    return (wide * cosines + torch.cat((-second, first), dim=-1) * sines).to(x.dtype)


def eager(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, scaling: float, **_: Any
) -> tuple[Tensor, Tensor]:
    """Attention as these towers write it out themselves, which no public name of transformers is: softmax in float32.

    Args:
        query, key, value: (B, H, ., d).
    """
    logits = query @ key.transpose(2, 3) * scaling
    logits = logits if attention_mask is None else logits + attention_mask
    weights = logits.softmax(dim=-1, dtype=torch.float32).to(query.dtype)
    return (weights @ value).transpose(1, 2).contiguous(), weights


def _blocks(x: Tensor, rows: Tensor | None, unit: int) -> Tensor:
    """(N, ...) -> (rows * u, ...), whole blocks."""
    return x if rows is None else x.unflatten(0, (-1, unit)).index_select(0, rows).flatten(0, 1)


def _by_batch(function: Callable[..., Any], attn: Any, qkv: tuple[Tensor, Tensor, Tensor], pattern: Pattern) -> Tensor:
    """(., D), batch by batch."""
    u, out, at = pattern.unit, [], (0, 0)
    for count, queries, keys in pattern.batches:
        q_rows, k_rows = (
            slice(u * start, u * (start + count * n)) for start, n in zip(at, (queries, keys), strict=True)
        )
        at = at[0] + count * queries, at[1] + count * keys
        mask = None
        if pattern.bias is not None:
            mask = pattern.bias[k_rows].to(qkv[0].dtype).view(count, 1, 1, -1).expand(-1, -1, u * queries, -1)
        out.append(_call(function, attn, (qkv[0][q_rows], qkv[1][k_rows], qkv[2][k_rows]), count, mask))
    return torch.cat(out) if len(out) > 1 else out[0]


def _call(
    function: Callable[..., Any],
    attn: Any,
    qkv: tuple[Tensor, Tensor, Tensor],
    count: int,
    mask: Tensor | None,
    **more: Any,
) -> Tensor:
    """(count * L, D) of queries (count * L, H, d)."""
    q, k, v = (t.unflatten(0, (count, -1)).transpose(1, 2) for t in qkv)
    out = function(attn, q, k, v, attention_mask=mask, scaling=attn.scaling, dropout=0.0, is_causal=False, **more)[0]
    return out.reshape(len(qkv[0]), -1)
