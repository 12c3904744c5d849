"""open_clip's text towers: captions to embeddings in the space of the visual tower.

Letters: L words of a caption, V the vocabulary; others as in `tempme_vl.state`.
"""

from __future__ import annotations

from typing import Any, cast

import open_clip
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from tempme_vl.backbones.open_clip_blocks import OpenCLIPBlock
from tempme_vl.libraries import describe, undocumented
from tempme_vl.text.base import TextEncoder, TextState

_PACKAGE = "open_clip_torch"
with undocumented(_PACKAGE):
    from open_clip.transformer import TextTransformer


class WordPlace(nn.Module):
    """The place in front of the positions where a tuning adds words that are learnt. Empty as it is here."""

    def forward(self, words: Tensor, end: Tensor) -> tuple[Tensor, Tensor]:
        """Args:
            words: (B, L, D) embedded words without positions.
            end: (B,) int64, the place that stands for each text.

        Returns:
            words (B, L', D), and that place among them.
        """
        return words, end


class CLIPTextEmbed(nn.Module):
    """Word and position embeddings.

    Attributes:
        tuned: what a tuning adds between the two.
    """

    def __init__(self, tower: Any):
        super().__init__()
        self.token_embedding, self.positional_embedding = tower.token_embedding, tower.positional_embedding
        self.tuned = WordPlace()

    def forward(self, ids: Tensor, end: Tensor) -> tuple[Tensor, Tensor]:
        """(B, L) ids and (B,) the places that stand for the texts -> (B, L, D) words, and these places; L may grow."""
        x, end = self.tuned(self.token_embedding(ids), end)
        return x + self.positional_embedding[: x.shape[1]].to(x.dtype), end


class CLIPTextHead(nn.Module):
    """Final norm and projection of the word that stands for the text, or of any: (..., D) -> (..., E)."""

    def __init__(self, tower: Any):
        super().__init__()
        self.ln_final, self.text_projection = tower.ln_final, tower.text_projection

    def forward(self, x: Tensor) -> Tensor:
        x = self.ln_final(x)
        return self.text_projection(x) if isinstance(self.text_projection, nn.Linear) else x @ self.text_projection


class CLIPTextEncoder(TextEncoder):
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
        self.causal, self.pool, self.width = causal, pool, source.ln_final.normalized_shape[0]
        self.embed, self.head = CLIPTextEmbed(source), CLIPTextHead(source)
        self.blocks = nn.ModuleList(OpenCLIPBlock(block) for block in source.transformer.resblocks)

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
        x, end = self._encode(ids, mask)
        return self.head(x[torch.arange(x.shape[0], device=x.device), end])

    def words(self, ids: Tensor, mask: Tensor) -> Tensor:
        """(B, L, E); see `TextEncoder.words`.

        Raises:
            ValueError: a tuning has put learnt words among those of texts.
        """
        x, _ = self._encode(ids, mask)
        if x.shape[1] != ids.shape[1]:
            raise ValueError(
                "the head compares the words of texts, and the tuning puts learnt words among them: choose another "
                "tuning, or the head 'mean'"
            )
        return self.head(x)

    def _encode(self, ids: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """(B, L, D) after the blocks, and (B,) the place of each text's end."""
        self.check(ids, mask)
        end = mask.bool().sum(dim=1) - 1
        x, end = self.embed(ids, torch.full_like(end, ids.shape[1] - 1) if self.pool == "last" else end)
        state = TextState(x, _causal_bias(x) if self.causal else None)
        for block in self.adapters():
            if self.grad_checkpointing and torch.is_grad_enabled():
                state = checkpoint(_block, block, state, use_reentrant=False)
            else:
                state = _block(block, state)
        return state.x, end

    def shorten(self, places: int, fixed_length: bool = False) -> None:
        """Leaves so many places fewer for the words of texts, for words that are learnt.

        Args:
            fixed_length: whether every text has all of the places from now on.

        Raises:
            ValueError: not even a start token, a word and an end token would be left.
        """
        if self.context_length - places < 3:
            raise ValueError(
                f"{places} learnt words leave {self.context_length - places} of {self.context_length} places for "
                "texts; expected at least 3 to be left"
            )
        self.context_length -= places
        self.fixed_length = self.fixed_length or fixed_length

    def adapters(self) -> list[OpenCLIPBlock]:
        """The blocks in order."""
        return [cast(OpenCLIPBlock, block) for block in self.blocks]

    def input_side(self) -> nn.Module:
        return self.embed


def _block(block: OpenCLIPBlock, state: TextState) -> TextState:
    return block.mlp_step(block.attention_step(state)[0])


def _causal_bias(x: Tensor) -> Tensor:
    """(B, L, D) -> (1, 1, L, L): 0 where a word may look, -inf at later words."""
    length = x.shape[1]
    return x.new_full((1, 1, length, length), float("-inf")).triu(1)
