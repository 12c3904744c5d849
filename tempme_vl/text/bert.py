"""UMT's text side, made of BERT's layers: an encoder of words, and the fusion of its states with video tokens.

The first `fusion_layer` layers see the text alone (`BertTextEncoder`); each of the rest also attends to the tokens of a
video (`BertFusion`). A video's keys and values do not depend on the text, so they are computed once
(`BertFusion.keys_values`) and shared by every text that is compared with the video.

Letters: L words of a text, P (text, video) pairs, M tokens of a video, D width of the text, Dv of the video tokens,
H heads of width Dh = D / H; others as in `tempme_vl.state`.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import partial

from torch import Tensor, nn

from tempme_vl.fit import misfits
from tempme_vl.text.base import TextEncoder
from tempme_vl.text.bert_layer import (
    BertEmbeddings,
    BertLayer,
    BertShape,
    attention_mask,
    cross_keys_values,
    initialise,
    run_layer,
)


class BertEncoder(TextEncoder):
    """Words through BERT's layers, in all kinds of BERT here."""

    def __init__(self, positions: int, embeddings: BertEmbeddings, layers: Iterable[BertLayer]):
        super().__init__(positions)
        self.embeddings = embeddings
        self.layers = nn.ModuleList(layers)

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        """States of the words of texts alone, padded ones included.

        Args:
            ids: (B, L) int64; [CLS], words, padding.
            mask: (B, L), nonzero for real words; each row starts with a real one ([CLS]).

        Returns:
            (B, L, D) states; those of real words do not depend on the padding.

        Raises:
            ValueError: see `TextEncoder.check`.
        """
        self.check(ids, mask)
        x, words = self.embeddings(ids), attention_mask(mask)
        for layer in self.layers:
            x = run_layer(layer, self.grad_checkpointing, x, words)
        return x

    def input_side(self) -> nn.Module:
        return self.embeddings


class BertTextEncoder(BertEncoder):
    """Embeddings and the layers before the first fusion layer; random weights, N(0, 0.02) as BERT's."""

    def __init__(self, shape: BertShape):
        super().__init__(shape.positions, BertEmbeddings(shape), (BertLayer(shape) for _ in range(shape.fusion_layer)))
        self.shape = shape
        self.apply(partial(initialise, std=shape.init_std))


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


def video_keys(layers: nn.ModuleList, width: int, tokens: Tensor, size: Tensor | None) -> VideoKeys:
    """See `BertFusion.keys_values`; of any layers with cross-attention to tokens of a width."""
    if tokens.ndim != 3 or tokens.shape[-1] != width:
        raise ValueError(f"expected video tokens (B, M, {width}); got {tuple(tokens.shape)}")
    if size is not None and size.shape != (*tokens.shape[:2], 1):
        raise ValueError(f"expected sizes {(*tokens.shape[:2], 1)}; got {tuple(size.shape)}")
    keys, values = zip(*cross_keys_values(layers, tokens), strict=True)
    bias = None if size is None else size.log().transpose(1, 2).unsqueeze(1).to(tokens.dtype)
    return VideoKeys(keys, values, bias)


class BertFusion(nn.Module):
    """The layers from the first fusion layer on; each attends to the words, then to the video. Random weights."""

    def __init__(self, shape: BertShape):
        super().__init__()
        self.shape = shape
        layers = [BertLayer(shape, cross=True) for _ in range(shape.layers - shape.fusion_layer)]
        for layer in layers:
            layer.crossattention.read_width(shape.cross_width)
        self.layers = nn.ModuleList(layers)
        self.grad_checkpointing = False
        self.apply(partial(initialise, std=shape.init_std))

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
        return video_keys(self.layers, self.shape.cross_width, tokens, size)

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
        x, words = states, attention_mask(mask)
        for layer, *seen in zip(self.layers, keys.keys, keys.values, strict=True):
            x = run_layer(layer, self.grad_checkpointing, x, words, seen, keys.bias)
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
    if trouble := misfits(bert_to_umt(text, fusion), state):
        raise ValueError(f"these are not the weights of {shape}: {trouble}")
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
