"""Embeddings and the pooling head of transformers' vision towers, on the library's own modules."""

from __future__ import annotations

from typing import Any

import torch
from einops import rearrange
from torch import Tensor, nn

from tempme_vl.backbones.hf_blocks import check_children


class ImageEmbed(nn.Module):
    """The tower's own embeddings and the norm behind them, if any: (R, 3, H, W) -> (R, N, D).

    Args:
        options: further keywords of the embeddings' forward.
    """

    def __init__(self, embeddings: nn.Module, norm_pre: nn.Module, options: dict[str, Any]):
        super().__init__()
        self.embeddings, self.norm_pre, self.options = embeddings, norm_pre, options

    def forward(self, images: Tensor) -> Tensor:
        x = self.embeddings(images, **self.options)
        if isinstance(x, tuple):  # InternVL's of transformers 4 give the grid too
            x = x[0]
        return self.norm_pre(x)


class PackedEmbed(nn.Module):
    """SigLIP 2's (NaFlex) embeddings, which take patches and not images: (R, 3, H, W) -> (R, N, D)."""

    def __init__(self, embeddings: nn.Module, patch_size: int):
        super().__init__()
        self.embeddings, self.patch_size = embeddings, patch_size

    def forward(self, images: Tensor) -> Tensor:
        p = self.patch_size
        patches = rearrange(images, "r c (rows h) (columns w) -> r (rows columns) (h w c)", h=p, w=p)
        # all images have one shape, so their positions are resized once and broadcast
        return self.embeddings(patches, torch.tensor([[images.shape[2] // p, images.shape[3] // p]]))


class SiglipPool(nn.Module):
    """SigLIP's attention pooling: (R, n, D) normed tokens and their sizes (R, n, 1) -> (R, D)."""

    def __init__(self, head: Any):
        super().__init__()
        check_children(head, {"attention", "layernorm", "mlp"}, {"probe"})
        self.attention, self.layernorm, self.mlp, self.probe = head.attention, head.layernorm, head.mlp, head.probe

    def forward(self, x: Tensor, size: Tensor | None) -> Tensor:
        bias = None
        if size is not None:
            bias = size.log().to(x.dtype).transpose(1, 2).repeat_interleave(self.attention.num_heads, dim=0)
        probe = self.probe.to(x.dtype).expand(x.shape[0], -1, -1)
        x = self.attention(probe, x, x, attn_mask=bias)[0]
        return (x + self.mlp(self.layernorm(x)))[:, 0]
