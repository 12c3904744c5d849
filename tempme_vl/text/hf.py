"""Text towers of transformers: CLIP, SigLIP, SigLIP 2."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from tempme_vl.libraries import describe
from tempme_vl.text.base import TextEncoder

# by class name, so that only those in use are imported: whether words see only those before them
CAUSAL = {
    "CLIPTextModel": True,
    "CLIPTextTransformer": True,
    "SiglipTextModel": False,
    "SiglipTextTransformer": False,
    "Siglip2TextModel": False,
    "Siglip2TextTransformer": False,
}


class HFTextEncoder(TextEncoder):
    """A text tower of transformers, called as a whole, and CLIP's projection behind it.

    SigLIP's words see each other and the padding, and the last place stands for the text, so its length is fixed.

    Args:
        tower: what transformers calls `text_model`.
        projection: CLIP's `text_projection`; SigLIP's belongs to the tower.

    Raises:
        ValueError: a tower of another kind.
    """

    def __init__(self, tower: nn.Module, projection: nn.Module | None = None):
        name = type(tower).__name__
        if name not in CAUSAL:
            raise ValueError(
                f"expected a text tower of transformers, one of {', '.join(CAUSAL)}; got {name} "
                f"({describe('transformers')})"
            )
        config: Any = tower.config
        super().__init__(config.max_position_embeddings, fixed_length=not CAUSAL[name])
        self.tower, self.projection = tower, nn.Identity() if projection is None else projection

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        """Embeds captions.

        Args:
            ids: (B, L) int64, as the model's own tokenizer gives them, padded behind the text.
            mask: (B, L), nonzero for real words; SigLIP, which was trained without one, does not look at it.

        Returns:
            (B, E) features, not normalised.

        Raises:
            ValueError: see `TextEncoder.check`.
        """
        self.check(ids, mask)
        seen = None if self.fixed_length else mask
        if self.grad_checkpointing and torch.is_grad_enabled():
            return cast(Tensor, checkpoint(self._encode, ids, seen, use_reentrant=False))
        return self._encode(ids, seen)

    def words(self, ids: Tensor, mask: Tensor) -> Tensor:
        """(B, L, E) of CLIP; see `TextEncoder.words`."""
        if self.fixed_length:  # SigLIP's projection is a part of how it pools
            return super().words(ids, mask)
        self.check(ids, mask)
        return self.projection(self.tower(input_ids=ids, attention_mask=mask).last_hidden_state)

    def _encode(self, ids: Tensor, mask: Tensor | None) -> Tensor:
        return self.projection(self.tower(input_ids=ids, attention_mask=mask).pooler_output)

    def input_side(self) -> nn.Module:
        return cast(nn.Module, self.tower.embeddings)
