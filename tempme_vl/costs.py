"""What the parts of a transformer cost, as the papers' tables count.

Multiply-accumulates of convolution, linear layers, attention and matching count 1; softmax 1 an element, LayerNorm 2,
GELU 1 (QuickGELU 2), a bias addition 1. What else runs, such as other activations and sums, is left out. This
convention gives all rows of 12 frames in the tables of TempMe (ICLR 2025) within 0.2%.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Counting:
    """What counts beside multiply-accumulates, for an element each."""

    softmax: int = 1
    norm: int = 2
    gelu: int = 1
    bias: int = 1


PAPER = Counting()
# as the counter fvcore, which TESTA (EMNLP Findings 2023) used; it gives that paper's table to the digit
FVCORE = Counting(softmax=0, norm=5, gelu=0, bias=0)


def linear(rows: int, inputs: int, outputs: int, bias: bool = True, counting: Counting = PAPER) -> int:
    """Of a linear layer on so many rows."""
    return rows * outputs * (inputs + bias * counting.bias)


def norm(rows: int, width: int, counting: Counting = PAPER) -> int:
    """Of a LayerNorm."""
    return counting.norm * rows * width


def attention(queries: int, keys: int, width: int, heads: int, counting: Counting = PAPER) -> int:
    """Of scores, softmax and weighted values of all heads."""
    return queries * keys * (2 * width + heads * counting.softmax)


@dataclass(frozen=True)
class BlockCost:
    """A block of a ViT: norm, attention; norm, MLP.

    Attributes:
        width, heads: of the tokens.
        mlp_ratio: the MLP is so many times as wide.
        quick_gelu: whether its activation is QuickGELU, and not GELU.
        counting: what counts.
    """

    width: int
    heads: int
    mlp_ratio: float = 4.0
    quick_gelu: bool = True
    counting: Counting = PAPER

    def attention(self, tokens: int) -> int:
        """Of the norm, queries, keys, values, attention and projection of tokens that all attend to each other."""
        projected = self._linear(tokens, self.width, 3 * self.width) + self._linear(tokens, self.width, self.width)
        products = attention(tokens, tokens, self.width, self.heads, self.counting)
        return norm(tokens, self.width, self.counting) + projected + products

    def over_time(self, frames: int) -> int:
        """Of the attention of frames to each other at one place, and the linear layer behind it (TimeSformer)."""
        return self.attention(frames) + self._linear(frames, self.width, self.width)

    def mlp(self, tokens: int) -> int:
        """Of the norm and the MLP."""
        inner = int(self.width * self.mlp_ratio)
        layers = self._linear(tokens, self.width, inner) + self._linear(tokens, inner, self.width)
        activation = tokens * inner * (2 if self.quick_gelu else 1) * self.counting.gelu
        return norm(tokens, self.width, self.counting) + layers + activation

    def whole(self, tokens: int) -> int:
        """Of both."""
        return self.attention(tokens) + self.mlp(tokens)

    def _linear(self, rows: int, inputs: int, outputs: int) -> int:
        return linear(rows, inputs, outputs, counting=self.counting)
