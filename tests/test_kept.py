"""What a forward pass keeps for its backward pass: no similarities, no copies of indices, QuickGELU's input alone."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch import nn
from towers import random_video, small_clip

from tempme_vl import MergeSchedule, VisualFrontend
from tempme_vl.backbones.base import QuickGELU
from tempme_vl.backbones.open_clip_blocks import visual_backbone
from tempme_vl.evaluation.saved import kept_bytes, kept_tensors
from tempme_vl.state import TokenState


def usual(x: torch.Tensor) -> torch.Tensor:
    return x * torch.sigmoid(1.702 * x)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_quick_gelu_keeps_its_input_and_has_the_usual_gradient(dtype: torch.dtype) -> None:
    drawn = torch.Generator().manual_seed(0)
    values, cotangent = (torch.randn(5, 33, generator=drawn).to(dtype) * 3 for _ in range(2))
    gradients = []
    for function in (QuickGELU(), usual):
        x = values.clone().requires_grad_()
        kept = kept_tensors(partial(function, x), (x,))
        gradients.append(torch.autograd.grad(function(x), x, cotangent)[0])
        assert bool(kept) == (function is usual)
    assert torch.equal(*gradients)


def test_quick_gelu_has_a_second_derivative() -> None:
    x = torch.linspace(-3, 3, 7, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(QuickGELU(), x) and torch.autograd.gradgradcheck(QuickGELU(), x)


def test_what_is_known_or_shares_memory_counts_once() -> None:
    linear, x = torch.nn.Linear(4, 8, bias=False), torch.randn(3, 4)
    assert kept_bytes(linear, x) == 0
    y = torch.randn(3, 4, requires_grad=True)
    (kept,) = kept_tensors(lambda: (y.exp().view(4, 3) * 2).sum())
    assert (kept.shape, kept.dtype, kept.bytes) == ((3, 4), torch.float32, 48)


@pytest.mark.parametrize("method", ["none", "tempme"])
def test_a_block_keeps_what_its_tokens_are_and_nothing_of_the_match(method: str) -> None:
    """Fifteen numbers of a token that enters it for each channel, its merged tokens twice, a few bytes of indices."""
    plan = {
        "none": MergeSchedule.identity(3, 6, 17),
        "tempme": MergeSchedule.tempme(3, 6, 17, 2, (1, 2), (2, 3), 40, 20),
    }
    frontend = VisualFrontend(visual_backbone(small_clip(quick_gelu=True, layers=3).visual), plan[method])
    state = TokenState.start(frontend.embed(random_video(6, videos=1).flatten(0, 1)), 6, 1)

    def step(block: nn.Module, state: TokenState) -> None:
        outputs.append(block(state))

    outputs: list[TokenState] = []
    for block in frontend.blocks:
        known = (state.x, state.size, *block.parameters())
        kept = kept_tensors(partial(step, block, state), known)
        tokens, width = state.x.shape[0] * state.x.shape[1], frontend.shape.width
        whole = sum(one.bytes for one in kept if not one.dtype.is_floating_point)
        numbers = sum(one.bytes for one in kept) / 4 - whole / 4
        assert whole <= 4 * 8 * tokens
        assert numbers <= tokens * (15 * width + 16) and numbers >= tokens * 8 * width
        state = outputs[-1]
