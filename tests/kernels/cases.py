"""The fused kernels against the plain functions, on a GPU where there is one.

Elsewhere for a process of its own with TRITON_INTERPRET=1, which Triton looks at as it is imported.
"""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch import Tensor
from towers import random_video, small_clip

from tempme_vl import MergeSchedule, VisualFrontend, kernels
from tempme_vl.backbones.base import QuickGELU
from tempme_vl.backbones.open_clip_blocks import visual_backbone
from tempme_vl.kernels import merging
from tempme_vl.kernels.activation import quick_gelu
from tempme_vl.matching import MergeMap, bipartite_match

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# tokens, prefix, pairs, rows: odd and even, no CLS, several, one pair, all pairs, more than a chunk of 32
SHAPES = [(17, 1, 4, 2), (10, 0, 5, 2), (11, 3, 1, 1), (3, 1, 1, 1), (70, 2, 34, 1)]
every_shape = pytest.mark.parametrize(("tokens", "prefix", "pairs", "rows"), SHAPES)


def random(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    drawn = torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return drawn.to(DEVICE, dtype)


def as_sets(merge: MergeMap) -> list[list[list[int]]]:
    """The input tokens of every output token of every row."""
    rows = []
    for base, src, dst in zip(merge.base.tolist(), merge.src.tolist(), merge.dst.tolist(), strict=True):
        members = [[token] for token in base]
        for token, to in zip(src, dst, strict=True):
            members[to].append(token)
        rows.append(members)
    return rows


@pytest.mark.parametrize("order", ["position", "similarity"])
@every_shape
def test_matches_the_same_pairs(tokens: int, prefix: int, pairs: int, rows: int, order: str) -> None:
    metric = random(rows, tokens, 6)
    with kernels.plain():
        expected = bipartite_match(metric, pairs, prefix, order)
    actual = MergeMap(*merging.match(metric, pairs, prefix, order == "position"))
    for name in ("base", "src", "dst"):
        assert torch.equal(getattr(actual, name), getattr(expected, name)), name


def test_ties_and_what_is_no_number_rank_as_in_the_plain_form() -> None:
    equal, broken = torch.ones(1, 17, 4, device=DEVICE), random(1, 17, 4, seed=3)
    broken[0, 6] = torch.nan
    for metric in (equal, broken):
        with kernels.plain():
            expected = bipartite_match(metric, 4, 1)
        assert as_sets(MergeMap(*merging.match(metric, 4, 1, True))) == as_sets(expected)


@pytest.mark.parametrize(
    ("tokens", "prefix", "pairs", "rows", "dtype"),
    [*((*shape, torch.float32) for shape in SHAPES), (*SHAPES[0], torch.float64), (*SHAPES[0], torch.bfloat16)],
)
def test_merges_to_the_same_tokens_and_gradients(
    tokens: int, prefix: int, pairs: int, rows: int, dtype: torch.dtype
) -> None:
    merge = bipartite_match(random(rows, tokens, 6), pairs, prefix)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    x, size = (
        random(rows, tokens, 20, seed=1, dtype=dtype),
        random(rows, tokens, 1, seed=2, dtype=wide).exp().round() + 1,
    )
    outputs = []
    ways = merge.weighted_mean, partial(merging.weighted_mean, base=merge.base, src=merge.src, dst=merge.dst)
    for way in ways:
        own = x.clone().requires_grad_()
        with kernels.plain():
            merged, new_size = way(own, size)
        (gradient,) = torch.autograd.grad((merged * random(*merged.shape, seed=4, dtype=dtype)).sum(), own)
        assert not new_size.requires_grad and merged.dtype == gradient.dtype == dtype
        outputs.append((merged, new_size, gradient))
    tolerance = {torch.float32: 1e-6, torch.float64: 1e-14, torch.bfloat16: 1e-2}[dtype]
    for actual, expected in zip(outputs[1], outputs[0], strict=True):
        torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_quick_gelu_is_the_plain_one(dtype: torch.dtype) -> None:
    x = 4 * random(3, 801, dtype=dtype)
    outputs = []
    for way in (QuickGELU(), quick_gelu):
        own = x.clone().requires_grad_()
        with kernels.plain():
            y = way(own)
        (gradient,) = torch.autograd.grad((y * random(3, 801, seed=1, dtype=dtype)).sum(), own)
        outputs.append((y, gradient))
    tolerance = {torch.float32: 1e-6, torch.float64: 1e-14, torch.bfloat16: 2e-2}[dtype]
    for actual, expected in zip(outputs[1], outputs[0], strict=True):
        torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)


def test_a_front_end_gives_the_same_tokens_and_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    schedule = MergeSchedule.tempme(2, 4, 17, 2, (1,), (2,), 40, 20)  # each of its steps once
    clip = small_clip(quick_gelu=True, layers=2)
    frontend, video = VisualFrontend(visual_backbone(clip.visual), schedule).to(DEVICE), random_video(4, videos=1)
    frontend.init_clip_positions(0.1)
    video = video.to(DEVICE)
    outputs = []
    for usable in (False, True):
        monkeypatch.setattr(kernels, "usable", lambda x, usable=usable: usable)
        output = frontend(video, trace_source=True)
        gradients = torch.autograd.grad(output.pooled.square().sum(), frontend.parameters(), allow_unused=True)
        outputs.append((output, [gradient for gradient in gradients if gradient is not None]))
    (plain, expected), (own, actual) = outputs
    assert torch.equal(own.source, plain.source) and torch.equal(own.size, plain.size)
    torch.testing.assert_close(own.tokens, plain.tokens, rtol=0, atol=1e-5)
    for one, other in zip(actual, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)
