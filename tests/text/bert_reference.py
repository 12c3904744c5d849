"""Shapes in transformers' words, for its public models as references."""

from __future__ import annotations

from typing import Any

from transformers import BertConfig

from tempme_vl.text import BertShape


def bert_config(shape: BertShape, layers: int, **extra: Any) -> BertConfig:
    return BertConfig(
        vocab_size=shape.vocab_size,
        hidden_size=shape.width,
        num_hidden_layers=layers,
        num_attention_heads=shape.heads,
        intermediate_size=shape.mlp_width,
        max_position_embeddings=shape.positions,
        hidden_dropout_prob=shape.dropout,
        attention_probs_dropout_prob=shape.dropout,
        **extra,
    )
