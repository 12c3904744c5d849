"""UMT's text side on transformers' BERT: an encoder of words, and the fusion of its states with video tokens.

The first `fusion_layer` layers see the text alone (`BertTextEncoder`); each of the rest also attends to the tokens of a
video (`BertFusion`). A video's keys and values do not depend on the text, so they are computed once
(`BertFusion.keys_values`) and shared by every text that is compared with the video.

Letters: L words of a text, P (text, video) pairs, M tokens of a video, D width of the text, Dv of the video tokens,
H heads of width Dh = D / H; others as in `tempme_vl.state`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint
from transformers import BertConfig, BertLayer
from transformers.models.bert.modeling_bert import BertEmbeddings


@dataclass(frozen=True)
class BertShape:
    """All numbers of a text encoder and its fusion layers.

    Args:
        width: D; heads divide it.
        layers: text and fusion layers together; the first fusion_layer of them are text layers.
        positions: most words of a text.
        cross_width: Dv, the width of the video tokens that the fusion layers look at.
        dropout: of hidden states and of attention weights, in training.
        init_std: random weights are N(0, init_std^2) as BERT's; None for 1 / fan-in as their variance, with which a
            small model learns within minutes.

    Raises:
        ValueError: no text layer or no fusion layer, or heads that do not divide the width.
    """

    width: int
    layers: int
    heads: int
    mlp_width: int
    fusion_layer: int
    cross_width: int
    vocab_size: int = 30522
    positions: int = 512
    dropout: float = 0.1
    init_std: float | None = 0.02

    def __post_init__(self) -> None:
        if not 0 < self.fusion_layer < self.layers:
            raise ValueError(
                f"expected at least one text layer and one fusion layer, 0 < fusion_layer < layers; "
                f"got fusion_layer {self.fusion_layer} of {self.layers} layers"
            )
        if self.heads < 1 or self.width % self.heads:
            raise ValueError(f"expected heads that divide the width {self.width}; got {self.heads}")

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

    def config(self, **extra: Any) -> BertConfig:
        """The same in transformers' words."""
        settings: dict[str, Any] = {"attn_implementation": "sdpa", **extra}
        return BertConfig(
            vocab_size=self.vocab_size,
            hidden_size=self.width,
            num_attention_heads=self.heads,
            intermediate_size=self.mlp_width,
            max_position_embeddings=self.positions,
            hidden_dropout_prob=self.dropout,
            attention_probs_dropout_prob=self.dropout,
            **settings,
        )


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


class BertTextEncoder(nn.Module):
    """Embeddings and the layers before the first fusion layer; random weights, N(0, 0.02) as BERT's."""

    context_length: int

    def __init__(self, shape: BertShape):
        super().__init__()
        config = shape.config()
        self.shape, self.context_length = shape, shape.positions
        self.embeddings = BertEmbeddings(config)
        self.layers = nn.ModuleList(BertLayer(config) for _ in range(shape.fusion_layer))
        self.grad_checkpointing = False
        self.apply(partial(_initialise, std=shape.init_std))

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        """States of words, padded ones included.

        Args:
            ids: (B, L) int64; [CLS], words, padding.
            mask: (B, L), nonzero for real words; each row starts with a real one ([CLS]).

        Returns:
            (B, L, D) states; those of real words do not depend on the padding.

        Raises:
            ValueError: more words than there are positions, or a mask of another shape.
        """
        if ids.ndim != 2 or ids.shape[1] > self.context_length or ids.shape != mask.shape:
            raise ValueError(
                f"expected ids and mask (B, L) with L <= {self.context_length}; "
                f"got {tuple(ids.shape)} and {tuple(mask.shape)}"
            )
        x, words = self.embeddings(ids), _attention_mask(mask)
        for layer in self.layers:
            if self.grad_checkpointing and torch.is_grad_enabled():
                x = checkpoint(_text_layer, layer, x, words, use_reentrant=False)
            else:
                x = _text_layer(cast(BertLayer, layer), x, words)
        return x


@dataclass(frozen=True)
class VideoKeys:
    """What the fusion layers need of B videos: one tensor (B, H, M, Dh) per layer, keys and values.

    `bias`: (B, 1, 1, M), added to the attention logits; None for 0.
    """

    keys: tuple[Tensor, ...]
    values: tuple[Tensor, ...]
    bias: Tensor | None = None

    def __len__(self) -> int:
        return len(self.keys[0])

    def select(self, rows: Tensor) -> VideoKeys:
        """Those of P pairs, from the number of each pair's video: (P,) int64, repeated as needed."""
        return VideoKeys(
            tuple(key.index_select(0, rows) for key in self.keys),
            tuple(value.index_select(0, rows) for value in self.values),
            None if self.bias is None else self.bias.index_select(0, rows),
        )

    def expand(self, pairs: int) -> VideoKeys:
        """Those of one video's P pairs, as views: what `select` would copy P times.

        Raises:
            ValueError: more than one video.
        """
        if len(self) != 1:
            raise ValueError(f"expected the keys of one video; got {len(self)} videos (VideoKeys.select takes many)")
        return VideoKeys(
            tuple(key.expand(pairs, -1, -1, -1) for key in self.keys),
            tuple(value.expand(pairs, -1, -1, -1) for value in self.values),
            self.bias,
        )


class BertFusion(nn.Module):
    """The layers from the first fusion layer on; each attends to the words, then to the video. Random weights."""

    def __init__(self, shape: BertShape):
        super().__init__()
        self.shape = shape
        self.layers = nn.ModuleList(_fusion_layer(shape) for _ in range(shape.layers - shape.fusion_layer))
        self.grad_checkpointing = False
        self.apply(partial(_initialise, std=shape.init_std))

    def keys_values(self, tokens: Tensor, size: Tensor | None = None) -> VideoKeys:
        """Keys and values of videos, once for all their texts.

        Args:
            tokens: (B, M, Dv) tokens of B videos.
            size: (B, M, 1), how many input tokens each of them holds: a token gets the attention of that many
                (proportional attention, ToMe). 0 for a token that is not real; a video has one that is. Without it
                all tokens count alike, as in UMT.

        Raises:
            ValueError: tokens of another width, or sizes of another shape.
        """
        if tokens.ndim != 3 or tokens.shape[-1] != self.shape.cross_width:
            raise ValueError(f"expected video tokens (B, M, {self.shape.cross_width}); got {tuple(tokens.shape)}")
        if size is not None and size.shape != (*tokens.shape[:2], 1):
            raise ValueError(f"expected sizes {(*tokens.shape[:2], 1)}; got {tuple(size.shape)}")
        cross = [cast(BertLayer, layer).crossattention.self for layer in self.layers]
        return VideoKeys(
            tuple(_split_heads(attention.key(tokens), attention.num_attention_heads) for attention in cross),
            tuple(_split_heads(attention.value(tokens), attention.num_attention_heads) for attention in cross),
            None if size is None else size.log().transpose(1, 2).unsqueeze(1).to(tokens.dtype),
        )

    def forward(self, states: Tensor, mask: Tensor, keys: VideoKeys) -> Tensor:
        """States of texts that have seen a video.

        Args:
            states: (P, L, D) from the text encoder.
            mask: (P, L), nonzero for real words; each row starts with a real one.
            keys: of the P videos, one for each text.

        Returns:
            (P, L, D); the first word's ([CLS]) is the pair's feature.

        Raises:
            ValueError: texts, masks and videos that do not fit each other.
        """
        if states.shape[:2] != mask.shape or len(keys) != len(states):
            raise ValueError(
                f"expected states (P, L, D), a mask (P, L) and keys of P videos; got {tuple(states.shape)}, "
                f"{tuple(mask.shape)} and {len(keys)} videos (VideoKeys.select repeats videos for pairs)"
            )
        x, words = states, _attention_mask(mask)
        for layer, key, value in zip(self.layers, keys.keys, keys.values, strict=True):
            if self.grad_checkpointing and torch.is_grad_enabled():
                x = checkpoint(_fuse, layer, x, words, key, value, keys.bias, use_reentrant=False)
            else:
                x = _fuse(cast(BertLayer, layer), x, words, key, value, keys.bias)
        return x


def bert_from_umt(state: Mapping[str, Tensor], heads: int, dropout: float = 0.1) -> tuple[BertTextEncoder, BertFusion]:
    """Text encoder and fusion layers from weights under UMT's names; all sizes but the heads follow from the weights.

    Args:
        state: `embeddings.*` and `encoder.layer.N.*`, without "text_encoder." or "text_encoder.bert." in front. Fusion
            starts at the first layer with cross-attention. `embeddings.position_ids` (0, 1, 2, ...) is not needed.
        heads: of every attention.

    Raises:
        ValueError: weights that are missing or unexpected, or of shapes that contradict each other; all are listed.
    """
    state = {name: value for name, value in state.items() if name != "embeddings.position_ids"}
    shape = _shape_of(state, heads, dropout)
    text, fusion = BertTextEncoder(shape), BertFusion(shape)
    expected = bert_to_umt(text, fusion)
    missing, unexpected = sorted(expected.keys() - state.keys()), sorted(state.keys() - expected.keys())
    misfits = [
        f"{name} {tuple(state[name].shape)} instead of {tuple(value.shape)}"
        for name, value in expected.items()
        if name in state and state[name].shape != value.shape
    ]
    if missing or unexpected or misfits:
        raise ValueError(
            f"weights of {shape}: {len(missing)} missing: {missing}; {len(unexpected)} unexpected: {unexpected}; "
            f"{len(misfits)} of another shape: {misfits}"
        )
    text.load_state_dict({name: state[_umt_name(name, 0)] for name in text.state_dict()})
    fusion.load_state_dict({name: state[_umt_name(name, shape.fusion_layer)] for name in fusion.state_dict()})
    return text, fusion


def bert_to_umt(text: BertTextEncoder, fusion: BertFusion) -> dict[str, Tensor]:
    """The weights of both under UMT's names, as `bert_from_umt` reads them."""
    names = {_umt_name(name, 0): value for name, value in text.state_dict().items()}
    return names | {_umt_name(name, len(text.layers)): value for name, value in fusion.state_dict().items()}


def _umt_name(name: str, first_layer: int) -> str:
    return re.sub(r"^layers\.(\d+)\.", lambda match: f"encoder.layer.{first_layer + int(match[1])}.", name)


def _shape_of(state: Mapping[str, Tensor], heads: int, dropout: float) -> BertShape:
    layers = {int(match[1]) for name in state if (match := re.match(r"encoder\.layer\.(\d+)\.", name))}
    fusing = {layer for layer in layers if f"encoder.layer.{layer}.crossattention.self.key.weight" in state}
    fusion_layer = min(fusing, default=0)
    words, positions = "embeddings.word_embeddings.weight", "embeddings.position_embeddings.weight"
    mlp = f"encoder.layer.{fusion_layer}.intermediate.dense.weight"
    missing = [name for name in (words, positions, mlp) if name not in state]
    if not fusing or missing:
        raise ValueError(
            "expected embeddings.*, encoder.layer.N.* and, in the last layers, encoder.layer.N.crossattention.*; "
            f"got layers {sorted(layers)}, with cross-attention {sorted(fusing)}; missing: {missing}; "
            f"first names: {sorted(state)[:5]}"
        )
    return BertShape(
        width=state[words].shape[1],
        layers=max(layers) + 1,
        heads=heads,
        mlp_width=state[mlp].shape[0],
        fusion_layer=fusion_layer,
        cross_width=state[f"encoder.layer.{fusion_layer}.crossattention.self.key.weight"].shape[1],
        vocab_size=state[words].shape[0],
        positions=state[positions].shape[0],
        dropout=dropout,
    )


def _fusion_layer(shape: BertShape) -> BertLayer:
    """A BertLayer whose cross-attention reads the video's width; transformers only builds that of the text."""
    layer = BertLayer(shape.config(is_decoder=True, add_cross_attention=True))
    cross = layer.crossattention.self
    cross.key, cross.value = nn.Linear(shape.cross_width, shape.width), nn.Linear(shape.cross_width, shape.width)
    return layer


def _text_layer(layer: BertLayer, x: Tensor, words: Tensor) -> Tensor:
    return layer.feed_forward_chunk(layer.attention(x, words)[0])


def _fuse(layer: BertLayer, x: Tensor, words: Tensor, key: Tensor, value: Tensor, bias: Tensor | None) -> Tensor:
    x = layer.attention(x, words)[0]
    cross = layer.crossattention.self
    query = _split_heads(cross.query(x), cross.num_attention_heads)
    dropout = cross.dropout.p if layer.training else 0.0
    seen = functional.scaled_dot_product_attention(query, key, value, attn_mask=bias, dropout_p=dropout)
    return layer.feed_forward_chunk(layer.crossattention.output(seen.transpose(1, 2).flatten(2), x))


def _split_heads(x: Tensor, heads: int) -> Tensor:
    """(B, N, D) -> (B, H, N, Dh)."""
    return x.unflatten(-1, (heads, -1)).transpose(1, 2)


def _attention_mask(mask: Tensor) -> Tensor:
    """(B, N) -> (B, 1, 1, N) bool, true where attention may look. UMT adds -10000 elsewhere: a weight of 0 too."""
    return mask.bool()[:, None, None, :]


def _initialise(module: nn.Module, std: float | None) -> None:
    """BERT's initialisation, which transformers applies to whole models only."""
    if isinstance(module, nn.Linear | nn.Embedding):
        nn.init.normal_(module.weight, std=module.weight.shape[1] ** -0.5 if std is None else std)
    if isinstance(module, nn.Linear):
        nn.init.zeros_(module.bias)
    if isinstance(module, nn.Embedding) and module.padding_idx is not None:
        with torch.no_grad():
            module.weight[module.padding_idx].zero_()
