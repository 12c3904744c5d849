"""Proportional attention has one result, whether its bias is a mask or part of the keys."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

import tempme_vl
from tempme_vl.backbones.attention import attend, bias_in_keys


def random_heads(width: int, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Queries, keys, values and the logarithms of sizes 1 to 24."""
    generator = torch.Generator().manual_seed(width)
    q, k, v = (torch.randn(3, 2, 11, width, generator=generator, dtype=torch.float64).to(dtype) for _ in range(3))
    size = torch.randint(1, 25, (3, 11, 1), generator=generator)
    return q, k, v, size.to(torch.promote_types(dtype, torch.float32)).log().transpose(1, 2).unsqueeze(1)


@pytest.mark.parametrize("scale", [None, 0.3])
@pytest.mark.parametrize("width", [4, 64, 72, 80, 88])
def test_both_forms_are_attention_with_copies_of_the_keys(width: int, scale: float | None) -> None:
    q, k, v, bias = random_heads(width)
    copies = bias.exp().round().long().squeeze(1, 2)
    rows = [
        F.scaled_dot_product_attention(
            q[i], *(t[i].repeat_interleave(copies[i], dim=1) for t in (k, v)), scale=scale
        ).transpose(0, 1)
        for i in range(3)
    ]
    expected = torch.stack(rows).flatten(2)
    torch.testing.assert_close(attend(q, k, v, bias, scale=scale), expected, rtol=0, atol=1e-12)
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        torch.testing.assert_close(attend(q, k, v, bias, scale=scale), expected, rtol=0, atol=1e-12)


def test_longer_heads_are_multiples_of_8_and_change_no_product_of_values() -> None:
    q, k, v, bias = random_heads(64)
    longer = bias_in_keys(q, k, v, bias, 0.125)
    assert [t.shape for t in longer] == [(3, 2, 11, 72)] * 3
    torch.testing.assert_close(longer[0] @ longer[1].mT * 0.125, q @ k.mT * 0.125 + bias, rtol=0, atol=1e-12)
    assert torch.equal(longer[2][..., :64], v) and not longer[2][..., 64:].any()


def test_keys_carry_the_bias_to_16_bits_in_bfloat16() -> None:
    q, k, v, bias = random_heads(64, torch.bfloat16)
    _, longer, _ = bias_in_keys(q, k, v, bias, 0.125)
    carried = longer[..., 64:].double().sum(dim=-1) * 0.125
    error = (carried - bias.double().squeeze(-2)).abs() / bias.double().squeeze(-2).clamp(min=0.1)
    assert error.max() < 2**-16
    assert ((bias.bfloat16() - bias).abs() / bias.clamp(min=0.1)).max() > 2**-10, "what the bias as a mask loses"


def test_gradients_are_the_same() -> None:
    *heads, bias = random_heads(64)
    gradients = []
    for backends in ([SDPBackend.MATH], [SDPBackend.FLASH_ATTENTION, SDPBackend.MATH]):
        leaves = [t.clone().requires_grad_() for t in heads]
        with sdpa_kernel(backends):
            attend(*leaves, bias).square().sum().backward()
        gradients.append([t.grad for t in leaves])
    torch.testing.assert_close(gradients[1], gradients[0], rtol=0, atol=1e-11)


def test_only_the_flash_kernel_gets_no_mask(monkeypatch: pytest.MonkeyPatch) -> None:
    masks: list[bool] = []
    attention = F.scaled_dot_product_attention

    def spy(*heads: Tensor, attn_mask: Tensor | None = None, **options: float) -> Tensor:
        masks.append(attn_mask is not None)
        return attention(*heads, attn_mask=attn_mask, **options)

    monkeypatch.setattr(F, "scaled_dot_product_attention", spy)
    heads = random_heads(64)
    flash, efficient, math = SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH
    for backends in ([flash], [flash, math], [flash, efficient, math], [math]):
        with sdpa_kernel(backends):
            attend(*heads)
    assert masks == [False, False, True, True]


def test_a_front_end_runs_where_flash_is_the_only_kernel() -> None:
    torch.manual_seed(0)
    frontend = tempme_vl.create_frontend(
        "open_clip:tiny",
        method="tempme",
        num_frames=4,
        r=1,
        merge_layers=(2,),
        merge_frames=(2,),
        cross_percent=30,
        intra_percent=10,
    ).eval()
    side = frontend.shape.image_size
    video = torch.randn(2, 4, 3, side, side)
    with torch.inference_mode():
        expected = frontend(video)
        with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
            output = frontend(video)
    torch.testing.assert_close(output.tokens, expected.tokens, rtol=0, atol=1e-5)
    torch.testing.assert_close(output.pooled, expected.pooled, rtol=0, atol=1e-6)
    assert torch.equal(output.size, expected.size)
