"""A transformer block of CLIP's kind, for the small transformers that ways of tuning train."""

from __future__ import annotations

from collections import OrderedDict

from torch import Tensor, nn

from tempme_vl.backbones.base import BlockAdapter, QuickGELU, SelfAttention
from tempme_vl.state import AttentionContext


class Block(BlockAdapter):
    """x += attention(ln_1 x); x += c_proj(QuickGELU(c_fc(ln_2 x))); starts as torch's own layers do.

    Args:
        width, heads: of the tokens; the MLP is four times as wide.
    """

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.ln_1, self.attn, self.ln_2 = nn.LayerNorm(width), SelfAttention(width, heads), nn.LayerNorm(width)
        layers = {"c_fc": nn.Linear(width, 4 * width), "gelu": QuickGELU(), "c_proj": nn.Linear(4 * width, width)}
        self.mlp = nn.Sequential(OrderedDict(layers))
        nn.init.xavier_uniform_(self.attn.qkv.weight)  # as nn.MultiheadAttention does
        nn.init.zeros_(self.attn.qkv.bias)
        nn.init.zeros_(self.attn.proj.bias)

    def forward(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """(R, N, D) -> (R, N, D); bias on the logits, as in `attention_branch`."""
        x = x + self.attention_branch(x, bias)[0]
        return x + self.mlp_branch(x)

    def attention_branch(self, x: Tensor, bias: Tensor | None) -> tuple[Tensor, AttentionContext]:
        return self.attn(self.ln_1(x), bias)

    def mlp_branch(self, x: Tensor) -> Tensor:
        return self.mlp(self.ln_2(x))
