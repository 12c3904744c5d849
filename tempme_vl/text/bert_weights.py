"""Public BERT weights: what of them a text encoder, its fusion layers and an answer decoder can start from.

Cross-attention to a video is in no BERT; it stays as it starts.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from tempme_vl.fit import misfits
from tempme_vl.hub import hub_file
from tempme_vl.pretrained import WEIGHTS_FILE
from tempme_vl.text.bert import BertFusion, BertTextEncoder, bert_to_umt
from tempme_vl.text.decoder import BertDecoder, decoder_to_umt
from tempme_vl.weights.files import read_weights


def read_bert(source: str | Path) -> dict[str, Tensor]:
    """The weights of a BERT model under the names of `bert_to_umt`, the language head as "cls.*".

    Args:
        source: a folder with model.safetensors, or the name of a model on the hub ("bert-base-uncased").

    Raises:
        ValueError: see `hub_file` and `read_weights`; or a file that is not a BERT's.
    """
    file = hub_file(source, WEIGHTS_FILE)
    state = {}
    for key, value in read_weights(file).state.items():
        key = re.sub(r"LayerNorm\.gamma$", "LayerNorm.weight", re.sub(r"LayerNorm\.beta$", "LayerNorm.bias", key))
        state[key.removeprefix("bert.")] = value
    if "embeddings.word_embeddings.weight" not in state:
        raise ValueError(f"expected the weights of a BERT in {file}; got names like {sorted(state)[:3]}")
    return state


def load_bert(text: BertTextEncoder, fusion: BertFusion, state: Mapping[str, Tensor]) -> None:
    """Starts both parts from a BERT of the same size.

    Raises:
        ValueError: weights that are missing or of other shapes; all are listed.
    """
    _copy(bert_to_umt(text, fusion), state, "text side")


def load_bert_decoder(decoder: BertDecoder, state: Mapping[str, Tensor]) -> None:
    """Starts a decoder from the same BERT: its last layers, its words and its language head (BLIP).

    Raises:
        ValueError: weights that are missing or of other shapes; all are listed.
    """
    layers = {int(match[1]) for key in state if (match := re.match(r"encoder\.layer\.(\d+)\.", key))}
    first = len(layers) - len(decoder.layers)
    renamed = {}
    for key, value in state.items():
        match = re.match(r"encoder\.layer\.(\d+)\.(.*)", key)
        if match is None:
            renamed[key if key.startswith("cls.") else f"bert.{key}"] = value
        elif int(match[1]) >= first:
            renamed[f"bert.encoder.layer.{int(match[1]) - first}.{match[2]}"] = value
    _copy(decoder_to_umt(decoder), renamed, "decoder")


def _copy(own: Mapping[str, Tensor], state: Mapping[str, Tensor], what: str) -> None:
    wanted = {name: value for name, value in own.items() if ".crossattention." not in name}
    if trouble := misfits(wanted, {name: value for name, value in state.items() if name in wanted}):
        raise ValueError(f"this BERT does not fit the {what}: {trouble}")
    for name, value in wanted.items():
        value.copy_(state[name])
