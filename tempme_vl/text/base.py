"""What retrieval needs of a text tower, whatever library it comes from."""

from __future__ import annotations

from dataclasses import dataclass, replace

from torch import Tensor, nn


@dataclass(frozen=True)
class TextState:
    """Words between two steps of a text tower.

    Attributes:
        x: (B, L, D).
        attention_bias: (1, 1, L, L) on the logits, such as the mask of a causal tower, or None.
    """

    x: Tensor
    attention_bias: Tensor | None = None

    def add(self, delta: Tensor) -> TextState:
        """The state after a residual branch."""
        return replace(self, x=self.x + delta)


class TextEncoder(nn.Module):
    """A text tower.

    Attributes:
        context_length: the most words it takes, the start and end token among them.
        fixed_length: words see the padding, or the last place is what stands for the text: every text has exactly
            `context_length` places, as in pretraining.
    """

    context_length: int
    fixed_length: bool

    def __init__(self, context_length: int, fixed_length: bool = False):
        super().__init__()
        self.context_length, self.fixed_length = context_length, fixed_length
        self.grad_checkpointing = False

    def input_side(self) -> nn.Module:
        """What stands before the first block, which CLIP4Clip freezes."""
        raise NotImplementedError

    def words(self, ids: Tensor, mask: Tensor) -> Tensor:
        """(B, L, E): every word in the space of whole texts, not normalised; ids and mask as in a call.

        Raises:
            ValueError: a tower whose single words have no place in that space.
        """
        raise ValueError(f"{type(self).__name__} has no embeddings of single words")

    def max_words(self, wanted: int) -> int:
        """Places that a text gets where so many are wanted."""
        return self.context_length if self.fixed_length else min(wanted, self.context_length)

    def check(self, ids: Tensor, mask: Tensor) -> None:
        """Raises:
        ValueError: more words than the tower has places, another number than its fixed one, or a mask of another shape.
        """
        words = ids.shape[1] if ids.ndim == 2 else 0
        fits = words == self.context_length if self.fixed_length else words <= self.context_length
        if ids.ndim != 2 or not fits or ids.shape != mask.shape:
            raise ValueError(
                f"expected ids and mask (B, L) with L {'=' if self.fixed_length else '<='} {self.context_length}; "
                f"got {tuple(ids.shape)} and {tuple(mask.shape)}"
            )
