"""Text towers: captions to embeddings in the space of the visual tower.

Letters: L words of a caption, V the vocabulary; others as in `tempme_vl.state`.
"""

from __future__ import annotations

from typing import cast

import open_clip
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from tempme_vl.backbones.open_clip_blocks import OpenClipBlock
from tempme_vl.libraries import undocumented


class ClipTextEmbed(nn.Module):
    """Word and position embeddings: (B, L) ids -> (B, L, D)."""

    def __init__(self, clip: open_clip.CLIP):
        super().__init__()
        self.token_embedding, self.positional_embedding = clip.token_embedding, clip.positional_embedding

    def forward(self, ids: Tensor) -> Tensor:
        x = self.token_embedding(ids)
        return x + self.positional_embedding[: ids.shape[1]].to(x.dtype)


class ClipTextHead(nn.Module):
    """Final norm and projection of the end token: (B, D) -> (B, E)."""

    def __init__(self, clip: open_clip.CLIP):
        super().__init__()
        self.ln_final, self.text_projection = clip.ln_final, clip.text_projection

    def forward(self, x: Tensor) -> Tensor:
        return self.ln_final(x) @ self.text_projection


class ClipTextEncoder(nn.Module):
    """CLIP's text transformer. Words see only those before them, so the end token never sees the padding behind it.

    Args:
        clip: an `open_clip.CLIP`; its text modules are taken over and must not be used afterwards.

    Raises:
        ValueError: a text tower that is not pooled at its end token ("argmax").
    """

    @undocumented("open_clip_torch")
    def __init__(self, clip: open_clip.CLIP):
        super().__init__()
        if clip.text_pool_type != "argmax" or not isinstance(clip.text_projection, nn.Parameter):
            raise ValueError(
                "expected a CLIP text tower pooled at the end token with a projection matrix; "
                f"this one pools by {clip.text_pool_type!r}"
            )
        self.context_length = clip.context_length
        self.embed, self.head = ClipTextEmbed(clip), ClipTextHead(clip)
        self.blocks = nn.ModuleList(OpenClipBlock(block) for block in clip.transformer.resblocks)
        self.grad_checkpointing = False

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        """Embeds captions.

        Args:
            ids: (B, L) int64; start token, words, end token, then padding.
            mask: (B, L), nonzero for real tokens, which come first in each row; it says where the end token is.

        Returns:
            (B, E) projected features of the end token, not normalised.

        Raises:
            ValueError: more words than the tower has positions, or a mask of another shape.
        """
        if ids.shape[1] > self.context_length or ids.shape != mask.shape:
            raise ValueError(
                f"expected ids and mask (B, L) with L <= {self.context_length}; "
                f"got {tuple(ids.shape)} and {tuple(mask.shape)}"
            )
        x = self.embed(ids)
        bias = _causal_bias(x)
        for block in self.blocks:
            if self.grad_checkpointing and torch.is_grad_enabled():
                x = checkpoint(_block, block, x, bias, use_reentrant=False)
            else:
                x = _block(cast(OpenClipBlock, block), x, bias)
        end = mask.bool().sum(dim=1) - 1
        return self.head(x[torch.arange(len(x), device=x.device), end])


def _block(block: OpenClipBlock, x: Tensor, bias: Tensor) -> Tensor:
    x = x + block.attention_branch(x, bias)[0]
    return x + block.mlp_branch(x)


def _causal_bias(x: Tensor) -> Tensor:
    """(B, L, D) -> (1, 1, L, L): 0 where a word may look, -inf at later words."""
    length = x.shape[1]
    return x.new_full((1, 1, length, length), float("-inf")).triu(1)
