"""What the parts of a transformer cost, as the papers' tables count.

Multiply-accumulates of convolution, linear layers, attention and matching count 1; softmax 1 an element, LayerNorm 2,
GELU 1 (QuickGELU 2), a bias addition 1. What else runs, such as other activations and sums, is left out. This
convention gives all rows of 12 frames in the tables of TempMe (ICLR 2025) within 0.2%.
"""

from __future__ import annotations

from dataclasses import dataclass


def linear(rows: int, inputs: int, outputs: int, bias: bool = True) -> int:
    """Of a linear layer on so many rows."""
    return rows * outputs * (inputs + bias)


def norm(rows: int, width: int) -> int:
    """Of a LayerNorm."""
    return 2 * rows * width


def attention(queries: int, keys: int, width: int, heads: int) -> int:
    """Of scores, softmax and weighted values of all heads."""
    return queries * keys * (2 * width + heads)


@dataclass(frozen=True)
class BlockCost:
    """A block of a ViT: norm, attention; norm, MLP.

    Attributes:
        width, heads: of the tokens.
        mlp_ratio: the MLP is so many times as wide.
        quick_gelu: whether its activation is QuickGELU, and not GELU.
    """

    width: int
    heads: int
    mlp_ratio: float = 4.0
    quick_gelu: bool = True

    def attention(self, tokens: int) -> int:
        """Of the norm, queries, keys, values, attention and projection of tokens that all attend to each other."""
        projected = linear(tokens, self.width, 3 * self.width) + linear(tokens, self.width, self.width)
        return norm(tokens, self.width) + projected + attention(tokens, tokens, self.width, self.heads)

    def mlp(self, tokens: int) -> int:
        """Of the norm and the MLP."""
        inner = int(self.width * self.mlp_ratio)
        layers = linear(tokens, self.width, inner) + linear(tokens, inner, self.width)
        return norm(tokens, self.width) + layers + tokens * inner * (2 if self.quick_gelu else 1)

    def whole(self, tokens: int) -> int:
        """Of both."""
        return self.attention(tokens) + self.mlp(tokens)
