"""BERT (Devlin et al., 2019): its sizes, embeddings and layers, of which text encoder, fusion and decoder are made.

Modules carry the names of BERT's published weights. All attention is `Attention`; whoever looks at the same states many
times computes their keys and values once.

Letters: B texts, N words, S states that are looked at, D width, H heads of width Dh = D / H.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import Annotated, Any, Protocol, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from tempme_vl.schema import Layers, Range, Share, Size

PAD = 0  # the number of [PAD]
NORM_EPS = 1e-12

KeyValue = tuple[Tensor, Tensor]


class BertSizes(Protocol):
    """What layers need to know: `BertShape`, or the sizes of another model that is made of them."""

    @property
    def width(self) -> int: ...
    @property
    def heads(self) -> int: ...
    @property
    def mlp_width(self) -> int: ...
    @property
    def vocab_size(self) -> int: ...
    @property
    def positions(self) -> int: ...
    @property
    def dropout(self) -> float: ...
    @property
    def init_std(self) -> float | None: ...
    @property
    def token_types(self) -> bool:
        """Whether words have one of BERT's two types, all the first."""


@dataclass(frozen=True)
class BertShape:
    """All numbers of a text encoder and its fusion layers.

    Args:
        width: D; heads divide it.
        layers: text and fusion layers together; the first fusion_layer of them are text layers.
        positions: most words of a text.
        cross_width: the width of the video tokens that the fusion layers look at.
        dropout: of hidden states and of attention weights, in training.
        init_std: random weights are N(0, init_std^2) as BERT's; None for 1 / fan-in as their variance, with which a
            small model learns within minutes.

    Raises:
        ValueError: no text layer or no fusion layer, or heads that do not divide the width.
    """

    width: Size
    layers: Layers
    heads: Size
    mlp_width: Size
    fusion_layer: Layers
    cross_width: Size
    vocab_size: Size = 30522
    positions: Size = 512
    dropout: Share = 0.1
    init_std: Annotated[float, Range(0, 10)] | None = 0.02

    def __post_init__(self) -> None:
        if not 0 < self.fusion_layer < self.layers:
            raise ValueError(
                f"expected at least one text layer and one fusion layer, 0 < fusion_layer < layers; "
                f"got fusion_layer {self.fusion_layer} of {self.layers} layers"
            )
        if self.heads < 1 or self.width % self.heads:
            raise ValueError(f"expected heads that divide the width {self.width}; got {self.heads}")

    @property
    def token_types(self) -> bool:
        return True

    @classmethod
    def named(cls, name: str, **changes: Any) -> BertShape:
        """A shape by name ("bert-base", "bert-large" as in UMT; "tiny"), with some numbers changed.

        Raises:
            ValueError: an unknown name; the message lists the known ones.
        """
        if name not in SHAPES:
            raise ValueError(f"expected one of {sorted(SHAPES)}; got {name!r}")
        return replace(SHAPES[name], **changes)

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers for JSON; `BertShape(**numbers)` is the way back."""
        return asdict(self)


SHAPES = {
    "bert-base": BertShape(width=768, layers=12, heads=12, mlp_width=3072, fusion_layer=9, cross_width=768),
    "bert-large": BertShape(width=1024, layers=24, heads=16, mlp_width=4096, fusion_layer=19, cross_width=1024),
    "tiny": BertShape(
        width=64,
        layers=3,
        heads=4,
        mlp_width=256,
        fusion_layer=2,
        cross_width=64,
        vocab_size=1000,
        positions=64,
        dropout=0.0,
        init_std=None,
    ),
}


class BertEmbeddings(nn.Module):
    """Words, positions and, where there are types, the first of BERT's two, normalised."""

    def __init__(self, shape: BertSizes):
        super().__init__()
        self.word_embeddings = nn.Embedding(shape.vocab_size, shape.width, padding_idx=PAD)
        self.position_embeddings = nn.Embedding(shape.positions, shape.width)
        if shape.token_types:
            self.token_type_embeddings = nn.Embedding(2, shape.width)
        self.token_types = shape.token_types
        self.LayerNorm = nn.LayerNorm(shape.width, eps=NORM_EPS)
        self.dropout = nn.Dropout(shape.dropout)

    def forward(self, ids: Tensor, first: int = 0) -> Tensor:
        """(B, N) int64 words, the first of them at a position, -> (B, N, D)."""
        positions = torch.arange(first, first + ids.shape[1], device=ids.device)
        x = self.word_embeddings(ids)
        if self.token_types:
            x = x + self.token_type_embeddings(torch.zeros_like(ids))
        return self.dropout(self.LayerNorm(x + self.position_embeddings(positions)))


class Heads(nn.Module):
    """The attention proper."""

    def __init__(self, shape: BertSizes):
        super().__init__()
        self.heads = shape.heads
        self.query, self.key, self.value = (nn.Linear(shape.width, shape.width) for _ in range(3))
        self.dropout = nn.Dropout(shape.dropout)  # of attention weights

    def split(self, x: Tensor) -> Tensor:
        """(B, N, D) -> (B, H, N, Dh)."""
        return x.unflatten(-1, (self.heads, -1)).transpose(1, 2)

    def keys_values(self, states: Tensor) -> KeyValue:
        return self.split(self.key(states)), self.split(self.value(states))

    def forward(self, x: Tensor, seen: KeyValue | None, mask: Tensor | None, causal: bool) -> Tensor:
        query = self.split(self.query(x))
        key, value = self.keys_values(x) if seen is None else seen
        dropout = self.dropout.p if self.training else 0.0
        x = F.scaled_dot_product_attention(query, key, value, attn_mask=mask, dropout_p=dropout, is_causal=causal)
        return x.transpose(1, 2).flatten(2)


class AddNorm(nn.Module):
    """The end of a branch: its output, (B, N, D) behind a linear layer, is added to x, and the sum normalised."""

    def __init__(self, branch_width: int, shape: BertSizes):
        super().__init__()
        self.dense = nn.Linear(branch_width, shape.width)
        self.LayerNorm = nn.LayerNorm(shape.width, eps=NORM_EPS)
        self.dropout = nn.Dropout(shape.dropout)

    def forward(self, branch: Tensor, x: Tensor) -> Tensor:
        return self.LayerNorm(self.dropout(self.dense(branch)) + x)


class Attention(nn.Module):
    """Attention of words to themselves or to other states; added and normalised."""

    def __init__(self, shape: BertSizes):
        super().__init__()
        self.self, self.output = Heads(shape), AddNorm(shape.width, shape)

    def read_width(self, width: int) -> None:
        """Makes new keys and values, of states of another width."""
        self.self.key, self.self.value = (nn.Linear(width, self.self.query.out_features) for _ in range(2))

    def keys_values(self, states: Tensor) -> KeyValue:
        """Of states (B, S, D), or of the width that it reads: (B, H, S, Dh) each."""
        return self.self.keys_values(states)

    def forward(
        self, x: Tensor, seen: KeyValue | None = None, mask: Tensor | None = None, causal: bool = False
    ) -> Tensor:
        """(B, N, D) -> (B, N, D).

        Args:
            seen: keys and values of the states that x looks at; without them x looks at itself.
            mask: broadcasts to (B, H, N, S): bool, true where a word may look, or a bias of the attention logits.
            causal: word n looks at the states 0 to n.
        """
        return self.output(self.self(x, seen, mask, causal), x)


class Intermediate(nn.Module):
    """The wide half of the feed-forward network."""

    def __init__(self, shape: BertSizes):
        super().__init__()
        self.dense = nn.Linear(shape.width, shape.mlp_width)

    def forward(self, x: Tensor) -> Tensor:
        return F.gelu(self.dense(x))


class BertLayer(nn.Module):
    """Attention to the words, then, with `cross`, to other states, then the feed-forward network."""

    crossattention: Attention

    def __init__(self, shape: BertSizes, cross: bool = False):
        super().__init__()
        self.attention = Attention(shape)
        if cross:
            self.crossattention = Attention(shape)
        self.intermediate, self.output = Intermediate(shape), AddNorm(shape.mlp_width, shape)

    def feed_forward(self, x: Tensor) -> Tensor:
        return self.output(self.intermediate(x), x)

    def forward(self, x: Tensor, mask: Tensor, seen: KeyValue | None = None, seen_mask: Tensor | None = None) -> Tensor:
        """(B, N, D) words -> (B, N, D).

        Args:
            mask: of the words, as in `Attention`.
            seen, seen_mask: keys and values of the other states, and where words may look at them.
        """
        x = self.attention(x, mask=mask)
        if seen is not None:
            x = self.crossattention(x, seen, seen_mask)
        return self.feed_forward(x)


def cross_keys_values(layers: nn.ModuleList, states: Tensor) -> tuple[KeyValue, ...]:
    """Keys and values of states (B, S, width) for the cross-attention of every layer."""
    return tuple(cast(BertLayer, layer).crossattention.keys_values(states) for layer in layers)


def run_layer(layer: nn.Module, checkpointing: bool, *inputs: Any) -> Any:
    """A layer's output; with checkpointing, what it computes on the way is computed again for the gradient."""
    if checkpointing and torch.is_grad_enabled():
        return checkpoint(layer, *inputs, use_reentrant=False)
    return layer(*inputs)


def attention_mask(mask: Tensor) -> Tensor:
    """(B, S) -> (B, 1, 1, S) bool, true where attention may look. UMT adds -10000 elsewhere: a weight of 0 too."""
    return mask.bool()[:, None, None, :]


def initialise(module: nn.Module, std: float | None) -> None:
    """BERT's random weights, see `BertShape.init_std`; for `nn.Module.apply`."""
    if isinstance(module, nn.Linear | nn.Embedding):
        nn.init.normal_(module.weight, std=module.weight.shape[1] ** -0.5 if std is None else std)
    if isinstance(module, nn.Linear):
        nn.init.zeros_(module.bias)
    if isinstance(module, nn.Embedding) and module.padding_idx is not None:
        with torch.no_grad():
            module.weight[module.padding_idx].zero_()
