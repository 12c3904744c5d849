"""The text side that UMT's retrieval and question answering models share: sizes by name, loading public weights."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from torch import Tensor

from tempme_vl.text import BertFusion, BertTextEncoder, bert_from_umt

TEXT_OF = {"tiny": "tiny", "b16": "bert-base", "l16": "bert-large"}


def load_bert_side(text: BertTextEncoder, fusion: BertFusion, state: Mapping[str, Tensor]) -> None:
    """Loads both parts from weights as `bert_from_umt` takes them; nothing if there are none.

    Raises:
        ValueError: a text side of other sizes than the model's.
    """
    if not state:
        return
    wanted = text.shape
    loaded_text, loaded_fusion = bert_from_umt(state, wanted.heads)
    # weights tell sizes alone; how they start and drop out is the model's own
    found = replace(loaded_text.shape, dropout=wanted.dropout, init_std=wanted.init_std)
    if found != wanted:
        raise ValueError(f"the checkpoint's text side is {found}; the model wants {wanted}")
    text.load_state_dict(loaded_text.state_dict())
    fusion.load_state_dict(loaded_fusion.state_dict())
