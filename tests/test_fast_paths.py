"""Fast paths beside plain ones on shapes drawn at random: values and gradients in float32."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from towers import tiny_frontend

from tempme_vl import MergeSchedule
from tempme_vl.backbones.attention import attend
from tempme_vl.matching import bipartite_match, descending

often = settings(max_examples=40, deadline=None, derandomize=True)


def drawn(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def with_gradients(value: Tensor, leaves: list[Tensor]) -> list[Tensor]:
    """The value, and gradients of a sum of its numbers that weighs each otherwise."""
    weighed = value * drawn(*value.shape, seed=99)
    return [value.detach(), *torch.autograd.grad(weighed.sum(), leaves)]


@often
@given(
    rows=st.integers(1, 4),
    heads=st.integers(1, 3),
    tokens=st.integers(1, 40),
    width=st.integers(1, 24),
    seed=st.integers(0, 999),
)
def test_attention_with_sizes(rows: int, heads: int, tokens: int, width: int, seed: int) -> None:
    """As a bias, in the keys, and as a softmax written out over copies of the keys."""
    size = torch.randint(1, 9, (rows, tokens), generator=torch.Generator().manual_seed(seed))
    bias = size.log().view(rows, 1, 1, tokens)
    found = []
    for way in ("copies", "bias", "keys"):
        q, k, v = leaves = [drawn(rows, heads, tokens, width, seed=seed + i).requires_grad_() for i in range(3)]
        if way == "copies":
            out = torch.stack([plain(q[i], k[i], v[i], size[i]) for i in range(rows)])
        elif way == "bias":
            out = attend(q, k, v, bias)
        else:
            with sdpa_kernel([SDPBackend.FLASH_ATTENTION, SDPBackend.MATH]):
                out = attend(q, k, v, bias)
        found.append(with_gradients(out, leaves))
    for other in found[1:]:
        torch.testing.assert_close(other, found[0], rtol=1e-5, atol=1e-5)


def plain(q: Tensor, k: Tensor, v: Tensor, size: Tensor) -> Tensor:
    """Heads (h, N, d) of one row, a key as often as its size says."""
    keys, values = (t.repeat_interleave(size, dim=1) for t in (k, v))
    weights = (q @ keys.transpose(1, 2) / q.shape[-1] ** 0.5).softmax(-1)
    return (weights @ values).transpose(0, 1).flatten(1)


@often
@given(
    rows=st.integers(1, 4),
    tokens=st.integers(2, 60),
    prefix=st.integers(0, 4),
    share=st.floats(0, 1),
    width=st.integers(1, 9),
    seed=st.integers(0, 999),
)
def test_match_and_merge(rows: int, tokens: int, prefix: int, share: float, width: int, seed: int) -> None:
    """Beside a loop over pairs that goes through all A tokens, the most similar first."""
    prefix = min(prefix, tokens)
    pairs = round(share * ((tokens - prefix) // 2))
    metric, size = drawn(rows, tokens, 5, seed=seed), drawn(rows, tokens, 1, seed=seed + 1).exp()
    found = []
    for way in (bipartite_match(metric, pairs, prefix).weighted_mean, looped(metric, pairs, prefix)):
        x = drawn(rows, tokens, width, seed=seed + 2).requires_grad_()
        merged, new_size = way(x, size)
        found.append([*with_gradients(merged, [x]), new_size])
    torch.testing.assert_close(found[0], found[1], rtol=1e-5, atol=1e-5)


def looped(metric: Tensor, pairs: int, prefix: int) -> Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]:
    def merge(x: Tensor, size: Tensor) -> tuple[Tensor, Tensor]:
        rows = [one_row(*row, pairs, prefix) for row in zip(metric, x, size, strict=True)]
        return torch.stack([row[0] for row in rows]), torch.stack([row[1] for row in rows])

    return merge


def one_row(metric: Tensor, x: Tensor, size: Tensor, pairs: int, prefix: int) -> tuple[Tensor, Tensor]:
    a, b = ([i for i in range(prefix, len(x)) if i % 2 == side] for side in (0, 1))
    if not pairs:
        return x, size
    unit = F.normalize(metric, dim=-1)
    best = {i: max(b, key=lambda j: float(unit[i] @ unit[j])) for i in a}
    first = sorted(a, key=lambda i: -float(unit[i] @ unit[best[i]]))[:pairs]
    groups = [[i] for i in range(prefix)] + [[i] for i in a if i not in first]
    groups += [[j, *(i for i in first if best[i] == j)] for j in b]
    sizes = torch.stack([size[group].sum(0) for group in groups])
    return torch.stack([(x[group] * size[group]).sum(0) for group in groups]) / sizes, sizes


@often
@given(rows=st.integers(1, 3), length=st.integers(1, 30), levels=st.integers(1, 5), seed=st.integers(0, 999))
def test_ranks_are_those_of_a_sort(rows: int, length: int, levels: int, seed: int) -> None:
    values = torch.randint(levels, (rows, length), generator=torch.Generator().manual_seed(seed)).float()
    expected = [sorted(range(length), key=lambda i: (-row[i], i)) for row in values.tolist()]
    assert descending(values).tolist() == expected


SHAPES = [(1, 2, 1, (2,)), (3, 4, 0, (2, 2)), (2, 6, 5, (3, 2)), (2, 3, 8, (3,))]


@pytest.mark.parametrize(("batch", "frames", "r", "joins"), SHAPES)
def test_a_batch_is_its_videos(batch: int, frames: int, r: int, joins: tuple[int, ...]) -> None:
    """Tokens, embeddings and gradients: what a batch shares are kernels, never values."""
    schedule = MergeSchedule.tempme(6, frames, 17, r, tuple(range(2, 2 + len(joins))), joins, 30, 20)
    frontend = tiny_frontend(schedule)
    side, weights = frontend.shape.image_size, [p for p in frontend.parameters() if p.requires_grad]
    video = drawn(batch, frames, 3, side, side, seed=batch)
    together, alone = frontend(video), [frontend(video[i : i + 1]) for i in range(batch)]
    for field in ("tokens", "pooled", "size"):
        each = torch.cat([getattr(output, field) for output in alone])
        torch.testing.assert_close(getattr(together, field), each, rtol=1e-5, atol=1e-5)
    pooled = together.pooled, torch.cat([output.pooled for output in alone])
    gradients = [torch.autograd.grad(p.square().sum(), weights, allow_unused=True) for p in pooled]
    for one, other in zip(*gradients, strict=True):
        assert (one is None) == (other is None)
        if one is not None and other is not None:
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5 * max(1.0, float(other.abs().max())))
