"""The match and the merge of `tempme_vl.matching` as Triton kernels.

Each reads and writes every token once, in float32 or better. Nothing is added up by atomics, so the same input gives
the same bits again. Shapes: R rows of N tokens, r merged pairs, K = N - r output tokens.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

_COUNTS = ["tokens", "pairs", "num_prefix", "first_a", "first_b", "count_a", "count_b"]
MOST_RANKED = 2048  # tokens of one side, which a kernel compares with each other in one program's registers


def match(metric: Tensor, pairs: int, num_prefix: int, by_position: bool) -> tuple[Tensor, Tensor, Tensor]:
    """`tempme_vl.matching.bipartite_match` for pairs > 0: base (R, K), src (R, r) and dst (R, r), int64.

    Args:
        metric: (R, N, D_metric), at most 2 * MOST_RANKED tokens.
    """
    rows, tokens, _ = metric.shape
    first_a, first_b = num_prefix + num_prefix % 2, num_prefix + 1 - num_prefix % 2
    unit = normalized(metric)
    side_a, side_b = unit[:, first_a::2], unit[:, first_b::2]
    best, partner = (side_a @ side_b.transpose(1, 2)).max(dim=-1)
    base, src, dst = (partner.new_empty(rows, length) for length in (tokens - pairs, pairs, pairs))
    count_a, count_b = side_a.shape[1], side_b.shape[1]
    block = triton.next_power_of_2(max(count_a, count_b, num_prefix))
    with torch.cuda.device_of(metric):
        _rank[(rows,)](
            *(best, partner, base, src, dst, tokens, pairs, num_prefix, first_a, first_b, count_a, count_b),
            by_position,
            block,
            min(32, block),
            num_warps=8 if block > 256 else 4,
        )
    return base, src, dst


def normalized(x: Tensor) -> Tensor:
    """(R, N, D) -> the same in at least float32, its vectors of length 1 (`F.normalize`)."""
    unit = torch.empty(x.shape, dtype=torch.promote_types(x.dtype, torch.float32), device=x.device)
    width = triton.next_power_of_2(x.shape[-1])
    vectors, together = x.shape[0] * x.shape[1], max(1, 2048 // width)
    with torch.cuda.device_of(x):
        _normalize[(triton.cdiv(vectors, together),)](x.contiguous(), unit, vectors, x.shape[-1], together, width)
    return unit


def weighted_mean(x: Tensor, size: Tensor, base: Tensor, src: Tensor, dst: Tensor) -> tuple[Tensor, Tensor]:
    """`tempme_vl.matching.MergeMap.weighted_mean`; no gradient to the sizes."""
    return _WeightedMean.apply(x.contiguous(), size.contiguous(), base, src, dst)


class _WeightedMean(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, size: Tensor, base: Tensor, src: Tensor, dst: Tensor) -> tuple[Tensor, Tensor]:
        rows, tokens, width = x.shape
        kept = base.shape[1]
        merged, new_size = x.new_empty(rows, kept, width), size.new_empty(rows, kept, 1)
        maps = [index.contiguous() for index in (base, src, dst)]
        _launch(_merge, x, (x, size, *maps, merged, new_size), tokens, kept)
        ctx.save_for_backward(size, new_size, *maps)
        ctx.mark_non_differentiable(new_size)
        return merged, new_size

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor, None, None, None, None]:
        size, new_size, base, src, dst = ctx.saved_tensors
        grad = grad.contiguous()
        rows, tokens, _ = size.shape
        grad_x = grad.new_empty(rows, tokens, grad.shape[-1])
        _launch(_merge_backward, grad, (grad_x, size, base, src, dst, grad, new_size), tokens, base.shape[1])
        return grad_x, None, None, None, None


def _launch(kernel: Any, x: Tensor, tensors: tuple[Tensor, ...], tokens: int, kept: int) -> None:
    """A program an output token."""
    rows, width, pairs = x.shape[0], x.shape[-1], tokens - kept
    blocks = (triton.next_power_of_2(width), triton.next_power_of_2(max(pairs, 1)))
    with torch.cuda.device_of(x):
        kernel[(rows * kept,)](*tensors, tokens, kept, pairs, width, *blocks)


@triton.jit(do_not_specialize=["tokens", "kept", "pairs"])
def _merge(
    x,
    size,
    base,
    src,
    dst,
    merged,
    new_size,
    tokens,
    kept,
    pairs,
    width,
    WIDTH: tl.constexpr,
    PAIRS: tl.constexpr,
):
    program = tl.program_id(0).to(tl.int64)
    row, output = program // kept, program % kept
    column = tl.arange(0, WIDTH)
    pair = tl.arange(0, PAIRS)
    token = row * tokens + tl.load(base + program)
    total = tl.load(size + token)
    added = tl.load(x + token * width + column, mask=column < width, other=0.0).to(total.dtype) * total
    to_here = tl.load(dst + row * pairs + pair, mask=pair < pairs, other=-1) == output
    following = tl.min(tl.where(to_here, pair, PAIRS), 0)
    while following < PAIRS:  # in the order of the pairs
        token = row * tokens + tl.load(src + row * pairs + following)
        weight = tl.load(size + token)
        added += tl.load(x + token * width + column, mask=column < width, other=0.0).to(total.dtype) * weight
        total += weight
        following = tl.min(tl.where(to_here & (pair > following), pair, PAIRS), 0)
    tl.store(merged + program * width + column, added / total, mask=column < width)
    tl.store(new_size + program, total)


@triton.jit(do_not_specialize=["tokens", "kept", "pairs"])
def _merge_backward(
    grad_x,
    size,
    base,
    src,
    dst,
    grad,
    new_size,
    tokens,
    kept,
    pairs,
    width,
    WIDTH: tl.constexpr,
    PAIRS: tl.constexpr,
):
    program = tl.program_id(0).to(tl.int64)
    row, output = program // kept, program % kept
    column = tl.arange(0, WIDTH)
    pair = tl.arange(0, PAIRS)
    total = tl.load(new_size + program)
    share = tl.load(grad + program * width + column, mask=column < width, other=0.0).to(total.dtype) / total
    token = row * tokens + tl.load(base + program)
    tl.store(grad_x + token * width + column, share * tl.load(size + token), mask=column < width)
    to_here = tl.load(dst + row * pairs + pair, mask=pair < pairs, other=-1) == output
    following = tl.min(tl.where(to_here, pair, PAIRS), 0)
    while following < PAIRS:
        token = row * tokens + tl.load(src + row * pairs + following)
        tl.store(grad_x + token * width + column, share * tl.load(size + token), mask=column < width)
        following = tl.min(tl.where(to_here & (pair > following), pair, PAIRS), 0)


@triton.jit
def _normalize(x, unit, vectors, width, VECTORS: tl.constexpr, WIDTH: tl.constexpr):
    vector = tl.program_id(0).to(tl.int64) * VECTORS + tl.arange(0, VECTORS)
    column = tl.arange(0, WIDTH)
    place = vector[:, None] * width + column[None, :]
    inside = (vector < vectors)[:, None] & (column < width)[None, :]
    values = tl.load(x + place, mask=inside, other=0.0).to(unit.dtype.element_ty)
    length = tl.sqrt(tl.sum(values * values, 1))
    tl.store(unit + place, values / tl.maximum(length, 1e-12)[:, None], mask=inside)


@triton.jit(do_not_specialize=_COUNTS)
def _rank(
    best,
    partner,
    base,
    src,
    dst,
    tokens,
    pairs,
    num_prefix,
    first_a,
    first_b,
    count_a,
    count_b,
    BY_POSITION: tl.constexpr,
    BLOCK: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """One row: a token's rank is the number of those in front of it; NaN above all, equal ones in ascending order."""
    row = tl.program_id(0).to(tl.int64)
    own = tl.arange(0, BLOCK)
    of_a = own < count_a
    value = tl.load(best + row * count_a + own, mask=of_a, other=0.0)
    value = tl.where(value == value, value, float("inf"))
    rank = own * 0
    for first in range(0, count_a, CHUNK):
        other = first + tl.arange(0, CHUNK)
        there = other < count_a
        theirs = tl.load(best + row * count_a + other, mask=there, other=0.0)
        theirs = tl.where(theirs == theirs, theirs, float("inf"))
        larger = theirs[None, :] > value[:, None]
        equal = theirs[None, :] == value[:, None]
        in_front = (larger | (equal & (other[None, :] < own[:, None]))) & there[None, :]
        rank += tl.sum(in_front.to(tl.int32), 1)

    merges, stays = of_a & (rank < pairs), of_a & (rank >= pairs)
    token = (first_a + 2 * own).to(tl.int64)
    first_kept = row * (tokens - pairs) + num_prefix
    if BY_POSITION:
        place = tl.cumsum(stays.to(tl.int32), 0) - 1
    else:
        place = rank - pairs
    tl.store(base + first_kept + place, token, mask=stays)
    kept_a = count_a - pairs
    tl.store(base + first_kept + kept_a + own, (first_b + 2 * own).to(tl.int64), mask=own < count_b)
    tl.store(base + first_kept - num_prefix + own, own.to(tl.int64), mask=own < num_prefix)
    to = num_prefix + kept_a + tl.load(partner + row * count_a + own, mask=of_a, other=0)
    tl.store(src + row * pairs + rank, token, mask=merges)
    tl.store(dst + row * pairs + rank, to, mask=merges)
