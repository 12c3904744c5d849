"""open_clip's text towers: captions to embeddings in the space of the visual tower.

Letters: L words of a caption, V the vocabulary; others as in `tempme_vl.state`.
"""

from __future__ import annotations

from typing import Any, cast

import open_clip
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from tempme_vl.backbones.open_clip_blocks import OpenClipBlock
from tempme_vl.libraries import describe, undocumented
from tempme_vl.text.base import TextEncoder

_PACKAGE = "open_clip_torch"
with undocumented(_PACKAGE):
    from open_clip.transformer import TextTransformer


class ClipTextEmbed(nn.Module):
    """Word and position embeddings: (B, L) ids -> (B, L, D)."""

    def __init__(self, tower: Any):
        super().__init__()
        self.token_embedding, self.positional_embedding = tower.token_embedding, tower.positional_embedding

    def forward(self, ids: Tensor) -> Tensor:
        x = self.token_embedding(ids)
        return x + self.positional_embedding[: ids.shape[1]].to(x.dtype)


class ClipTextHead(nn.Module):
    """Final norm and projection of the word that stands for the text, or of any: (..., D) -> (..., E)."""

    def __init__(self, tower: Any):
        super().__init__()
        self.ln_final, self.text_projection = tower.ln_final, tower.text_projection

    def forward(self, x: Tensor) -> Tensor:
        x = self.ln_final(x)
        return self.text_projection(x) if isinstance(self.text_projection, nn.Linear) else x @ self.text_projection


class ClipTextEncoder(TextEncoder):
    """The text transformer of CLIP, and of open_clip's models with a text tower of their own (SigLIP, MobileCLIP).

    In CLIP words see only those before them, so the end token never sees the padding behind it. Where all see each
    other, or the last place stands for the text, the length is fixed.

    Args:
        tower: an `open_clip.CLIP`, or the `text` of an `open_clip.CustomTextCLIP`; its text modules are taken over and
            must not be used afterwards.

    Raises:
        ValueError: a text tower of transformers, one with a class token, a mask of padding or without a projection, or
            one that is pooled neither at its end token ("argmax") nor at its last place ("last").
    """

    @undocumented(_PACKAGE)
    def __init__(self, tower: open_clip.CLIP | nn.Module):
        if not isinstance(tower, open_clip.CLIP | TextTransformer):
            raise ValueError(
                f"expected open_clip's own text transformer; got {type(tower).__name__} ({describe(_PACKAGE)})"
            )
        source: Any = tower
        pool = source.text_pool_type if isinstance(tower, open_clip.CLIP) else source.pool_type
        unknown = [name for name in ("cls_emb", "use_pad_mask") if getattr(source, name, None) not in (None, False)]
        if pool not in ("argmax", "last") or source.text_projection is None or unknown:
            raise ValueError(
                "expected a text tower pooled at the end token ('argmax') or the last place ('last'), with a "
                f"projection; this one pools by {pool!r}{''.join(f', with {name}' for name in unknown)}"
                f"{', without a projection' if source.text_projection is None else ''}"
            )
        causal = source.attn_mask is not None
        super().__init__(source.context_length, fixed_length=not causal or pool == "last")
        self.causal, self.pool = causal, pool
        self.embed, self.head = ClipTextEmbed(source), ClipTextHead(source)
        self.blocks = nn.ModuleList(OpenClipBlock(block) for block in source.transformer.resblocks)

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        """Embeds captions.

        Args:
            ids: (B, L) int64; start token, words, end token, then padding.
            mask: (B, L), nonzero for real tokens, which come first in each row; it says where the end token is.

        Returns:
            (B, E) projected features of the end token, or of the last place, not normalised.

        Raises:
            ValueError: see `TextEncoder.check`.
        """
        x = self._encode(ids, mask)
        if self.pool == "last":
            return self.head(x[:, -1])
        end = mask.bool().sum(dim=1) - 1
        return self.head(x[torch.arange(len(x), device=x.device), end])

    def words(self, ids: Tensor, mask: Tensor) -> Tensor:
        """(B, L, E); see `TextEncoder.words`."""
        return self.head(self._encode(ids, mask))

    def _encode(self, ids: Tensor, mask: Tensor) -> Tensor:
        self.check(ids, mask)
        x = self.embed(ids)
        bias = _causal_bias(x) if self.causal else None
        for block in self.blocks:
            if self.grad_checkpointing and torch.is_grad_enabled():
                x = checkpoint(_block, block, x, bias, use_reentrant=False)
            else:
                x = _block(cast(OpenClipBlock, block), x, bias)
        return x

    def input_side(self) -> nn.Module:
        return self.embed


def _block(block: OpenClipBlock, x: Tensor, bias: Tensor | None) -> Tensor:
    x = x + block.attention_branch(x, bias)[0]
    return x + block.mlp_branch(x)


def _causal_bias(x: Tensor) -> Tensor:
    """(B, L, D) -> (1, 1, L, L): 0 where a word may look, -inf at later words."""
    length = x.shape[1]
    return x.new_full((1, 1, length, length), float("-inf")).triu(1)
