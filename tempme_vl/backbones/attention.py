"""Proportional attention under fused kernels: a key of size s counts as s keys.

Two forms of one softmax. A bias on the logits is what most kernels take. Flash kernels take none, so there the bias
travels as part of the keys; how it is added is then the kernel's own arithmetic.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.backends import cuda as kernels  # the switches of every device, whatever their name


def attend(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, dropout: float = 0.0, scale: float | None = None
) -> Tensor:
    """softmax(scale q k^T + bias) v: queries, keys and values (R, heads, N, D_head) -> (R, N, heads * D_head).

    Where `torch.nn.attention.sdpa_kernel` leaves flash as the only fused kernel, the bias goes into the keys.

    Args:
        bias: on the keys, (R, 1, 1, N) float32 as `TokenState.attention_bias` gives it, or None.
        dropout: rate on the attention weights, for this call.
        scale: None for D_head ** -0.5.
    """
    if bias is None:
        attended = F.scaled_dot_product_attention(q, k, v, dropout_p=dropout, scale=scale)
    elif _only_flash():
        scale = 1 / math.sqrt(q.shape[-1]) if scale is None else scale
        longer = bias_in_keys(q, k, v, bias, scale)
        attended = F.scaled_dot_product_attention(*longer, dropout_p=dropout, scale=scale)[..., : v.shape[-1]]
    else:
        attended = F.scaled_dot_product_attention(q, k, v, attn_mask=bias.to(q.dtype), dropout_p=dropout, scale=scale)
    return attended.transpose(1, 2).flatten(2)


def bias_in_keys(q: Tensor, k: Tensor, v: Tensor, bias: Tensor, scale: float) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values whose attention without a mask is that of q, k, v with a bias on the keys.

    A query is continued by two ones, a key by bias / scale as a sum of two numbers of its precision (the second is what
    the first one's rounding leaves: log(size) keeps 16 bits in bfloat16, where the bias form rounds it to 8), and all
    by zeros up to a multiple of 8, as kernels want. Of the result, the first D_head values count.

    Args:
        q, k, v: (R, heads, N, D_head).
        bias: (R, 1, 1, N).
        scale: of the logits.

    Returns:
        three (R, heads, N, 8 ceil((D_head + 2) / 8)).
    """
    carried = (bias / scale).transpose(-1, -2).expand(*k.shape[:-1], 1)
    coarse = carried.to(k.dtype)
    fine = (carried - coarse.to(carried.dtype)).to(k.dtype)
    padding = -(k.shape[-1] + 2) % 8
    q = F.pad(F.pad(q, (0, 2), value=1.0), (0, padding))
    k = F.pad(torch.cat([k, coarse, fine], dim=-1), (0, padding))
    return q, k, F.pad(v, (0, padding + 2))


def _only_flash() -> bool:
    if torch.compiler.is_compiling():  # the tracer cannot read the switches: a compiled tower keeps its form
        from tempme_vl.backbones.tracing import constant

        return constant(_flash_alone)
    return _flash_alone()


def _flash_alone() -> bool:
    return kernels.flash_sdp_enabled() and not (kernels.mem_efficient_sdp_enabled() or kernels.cudnn_sdp_enabled())
