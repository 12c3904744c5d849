"""BLIP's text encoder (ICML 2022), which TESTA has: BERT's layers, each of which can also attend to a video.

The same weights read a text alone (`BlipTextEncoder.forward`) and a text with a video (`fuse`), both times from the
words on; UMT's lower layers read texts alone and the upper ones go on with a video (`tempme_vl.text.bert`). Two words
are added to BERT's: [DEC] starts a text that is written, [ENC] one that is compared with a video.

Letters as in `tempme_vl.text.bert`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Annotated, Any

import torch
from torch import Tensor

from tempme_vl.fit import misfits
from tempme_vl.schema import Layers, Range, Share, Size
from tempme_vl.text.bert import BertEncoder, VideoKeys, video_keys
from tempme_vl.text.bert_layer import PAD, BertEmbeddings, BertLayer, attention_mask, initialise, run_layer
from tempme_vl.text.decoder import BertDecoder, TiedWords

_TIED = ("crossattention", "intermediate", "output")  # parts of a layer that a tied decoder shares
DECODE, ENCODE = ADDED = ("[DEC]", "[ENC]")


@dataclass(frozen=True)
class BlipShape:
    """All numbers of a text encoder of BLIP.

    Args:
        width: D; heads divide it.
        cross_width: of the video tokens that every layer can look at.
        vocab_size: words, the two added ones the last of them.
        others: see `tempme_vl.text.bert_layer.BertShape`.

    Raises:
        ValueError: heads that do not divide the width.
    """

    width: Size
    layers: Layers
    heads: Size
    mlp_width: Size
    cross_width: Size
    vocab_size: Size = 30524
    positions: Size = 512
    dropout: Share = 0.1
    init_std: Annotated[float, Range(0, 10)] | None = 0.02

    def __post_init__(self) -> None:
        if self.width % self.heads:
            raise ValueError(f"expected heads that divide the width {self.width}; got {self.heads}")

    @property
    def token_types(self) -> bool:
        return False

    @property
    def decode(self) -> int:
        """The number of [DEC]."""
        return self.vocab_size - 2

    @property
    def encode(self) -> int:
        """The number of [ENC]."""
        return self.vocab_size - 1

    @classmethod
    def named(cls, name: str, **changes: Any) -> BlipShape:
        """A shape by name ("base" as published; "tiny"), with some numbers changed.

        Raises:
            ValueError: an unknown name; the message lists the known ones.
        """
        if name not in SHAPES:
            raise ValueError(f"expected one of {sorted(SHAPES)}; got {name!r}")
        return replace(SHAPES[name], **changes)


SHAPES = {
    "base": BlipShape(width=768, layers=12, heads=12, mlp_width=3072, cross_width=768),
    "tiny": BlipShape(
        width=64,
        layers=2,
        heads=4,
        mlp_width=256,
        cross_width=64,
        vocab_size=1000,
        positions=64,
        dropout=0.0,
        init_std=None,
    ),
}


def blip_vocabulary(vocabulary: Sequence[str]) -> tuple[str, ...]:
    """BERT's words, or those of a small model, with the two added ones behind them.

    Raises:
        ValueError: they are there, and not at the end.
    """
    words = tuple(word for word in vocabulary if word not in ADDED)
    if len(words) != len(vocabulary) and tuple(vocabulary) != (*words, *ADDED):
        raise ValueError(f"expected {DECODE} and {ENCODE} as the last two words, or neither of them")
    return (*words, *ADDED)


def started(ids: Tensor, first: int) -> Tensor:
    """(..., L) ids with another first word."""
    return torch.cat([torch.full_like(ids[..., :1], first), ids[..., 1:]], -1)


class BlipTextEncoder(BertEncoder):
    """Embeddings and layers, each with cross-attention; random weights, N(0, 0.02) as BERT's."""

    def __init__(self, shape: BlipShape):
        embeddings = BertEmbeddings(shape)
        # a decoder of pre-training projects onto the same table
        embeddings.word_embeddings = TiedWords(shape.vocab_size, shape.width, padding_idx=PAD)
        layers = [BertLayer(shape, cross=True) for _ in range(shape.layers)]
        for layer in layers:
            layer.crossattention.read_width(shape.cross_width)
        super().__init__(shape.positions, embeddings, layers)
        self.shape = shape
        self.apply(partial(initialise, std=shape.init_std))

    def keys_values(self, tokens: Tensor, size: Tensor | None = None) -> VideoKeys:
        """Keys and values of videos, once for all their texts; see `tempme_vl.text.bert.BertFusion.keys_values`."""
        return video_keys(self.layers, self.shape.cross_width, tokens, size)

    def fuse(self, ids: Tensor, mask: Tensor, keys: VideoKeys) -> Tensor:
        """States of texts that have seen a video.

        Args:
            ids, mask: (P, L), as in `forward`; the first word becomes [ENC].
            keys: of the P videos, one for each text.

        Returns:
            (P, L, D); the first word's is the pair's feature.

        Raises:
            ValueError: see `TextEncoder.check`; or another number of videos.
        """
        self.check(ids, mask)
        if len(keys) != len(ids):
            raise ValueError(
                f"expected ids (P, L) and keys of P videos; got {tuple(ids.shape)} and {len(keys)} videos "
                "(VideoKeys.select repeats videos for pairs)"
            )
        x, words = self.embeddings(started(ids, self.shape.encode)), attention_mask(mask)
        for layer, *seen in zip(self.layers, keys.keys, keys.values, strict=True):
            x = run_layer(layer, self.grad_checkpointing, x, words, seen, keys.bias)
        return x


def tie(decoder: BertDecoder, text: BlipTextEncoder) -> None:
    """Gives a decoder the encoder's modules, all but its attention to words, as BLIP's pre-training has them.

    Raises:
        ValueError: another number of layers, or of another width.
    """
    own, theirs = len(decoder.layers), len(text.layers)
    widths = (decoder.shape.width, decoder.cross_width), (text.shape.width, text.shape.cross_width)
    if own != theirs or widths[0] != widths[1]:
        raise ValueError(
            f"expected a decoder of {theirs} layers of the widths {widths[1]}, as the encoder's; got {own} of "
            f"{widths[0]}"
        )
    decoder.embeddings = text.embeddings
    for layer, other in zip(decoder.layers, text.layers, strict=True):
        for part in _TIED:
            setattr(layer, part, getattr(other, part))


def is_tied(name: str) -> bool:
    """Whether `tie` made a decoder's weight the encoder's of the same name."""
    return re.match(rf"embeddings\.|layers\.\d+\.({'|'.join(_TIED)})\.", name) is not None


def text_to_public(text: BlipTextEncoder) -> dict[str, Tensor]:
    """The weights under the names of BLIP's files, without "text_encoder." in front."""
    return {text_name(name): value for name, value in text.state_dict().items()}


def text_name(name: str) -> str:
    """One of its weights under that name."""
    return re.sub(r"^layers\.", "encoder.layer.", name)


def text_from_public(state: Mapping[str, Tensor], heads: int, dropout: float = 0.1) -> BlipTextEncoder:
    """A text encoder of such weights; all sizes but the heads follow from them.

    Args:
        state: see `blip_shape_of`; the constant `embeddings.position_ids` is not needed.

    Raises:
        ValueError: weights that are missing, unknown or of other shapes; all are listed.
    """
    state = {name: value for name, value in state.items() if name != "embeddings.position_ids"}
    text = BlipTextEncoder(blip_shape_of(state, heads, dropout))
    if trouble := misfits(text_to_public(text), state):
        raise ValueError(f"these are not the weights of {text.shape}: {trouble}")
    text.load_state_dict({re.sub(r"^encoder\.layer\.", "layers.", name): value for name, value in state.items()})
    return text


def blip_shape_of(state: Mapping[str, Tensor], heads: int, dropout: float = 0.1) -> BlipShape:
    """The shape that weights of a file were made with.

    Args:
        state: `embeddings.*` and `encoder.layer.N.*`, without "text_encoder." in front.
        heads: of every attention.

    Raises:
        ValueError: no text encoder of BLIP.
    """
    layers = [int(match[1]) for name in state if (match := re.match(r"encoder\.layer\.(\d+)\.crossattention\.", name))]
    needed = (
        "embeddings.word_embeddings.weight",
        "embeddings.position_embeddings.weight",
        "encoder.layer.0.intermediate.dense.weight",
        "encoder.layer.0.crossattention.self.key.weight",
    )
    if missing := [name for name in needed if name not in state]:
        raise ValueError(
            f"expected embeddings.* and encoder.layer.N.*, each layer with cross-attention; missing: {missing}; first "
            f"names: {sorted(state)[:5]}"
        )
    words, positions, mlp, key = (state[name].shape for name in needed)
    return BlipShape(
        width=words[1],
        layers=1 + max(layers),
        heads=heads,
        mlp_width=mlp[0],
        cross_width=key[1],
        vocab_size=words[0],
        positions=positions[0],
        dropout=dropout,
    )
