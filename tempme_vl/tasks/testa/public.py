"""Whole models under the names of BLIP's and TESTA's public files, and back."""

from __future__ import annotations

import re
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from tempme_vl.backbones import testa as towers
from tempme_vl.backbones.testa_checkpoint import Converted, convert
from tempme_vl.fit import misfits
from tempme_vl.merging import is_of_merging
from tempme_vl.text.blip import text_name
from tempme_vl.text.decoder import decoder_name

_TEMPERATURE = "temperature.temperature"  # (1,) here, a number there
_NAMES = {_TEMPERATURE: "temp", "queue.video": "image_queue", "queue.text": "text_queue", "queue.ids": "idx_queue"}
_COPIES = "momentum.copies."
_WORDS, _TABLE = "bert.embeddings.word_embeddings.weight", "cls.predictions.decoder"


def public_names(model: nn.Module) -> dict[str, str]:
    """Of each of a model's weights, but for a merging method's, the name in a public file.

    Args:
        model: with `frontend`, `text`, `decoder`, `text_proj`, `match_head`, `momentum` or `queue` among its children.
    """
    own = [name for name in model.state_dict() if not is_of_merging(model, name)]
    # retrieval numbers its queue and calls the place in it otherwise than pre-training
    place = "ptr_queue" if "queue.ids" in own else "queue_ptr"
    return {name: place if name == "queue.place" else _public(name) for name in own}


def _public(name: str) -> str:
    if name in _NAMES:
        return _NAMES[name]
    if name.startswith(_COPIES):
        return re.sub(r"^(\w+)\.", r"\1_m.", _public(name.removeprefix(_COPIES)))
    part, _, rest = name.partition(".")
    if part == "frontend":
        return towers.public_name(re.sub(r"^(blocks\.\d+)\.block\.", r"\1.", rest))
    if part in ("text", "decoder"):
        return f"text_encoder.{text_name(rest)}" if part == "text" else f"text_decoder.{decoder_name(rest)}"
    return f"itm_head.{rest}" if part == "match_head" else name


def to_public(model: nn.Module) -> dict[str, Tensor]:
    """The weights under public names, bit for bit, with what files hold beside them: the numbers of positions, and the
    decoder's table of words a second time."""
    state, exported = model.state_dict(), {}
    for name, public in public_names(model).items():
        exported[public] = state[name].squeeze(0) if name.endswith(_TEMPERATURE) else state[name]
    for name in [name for name in exported if name.endswith("embeddings.position_embeddings.weight")]:
        numbers = torch.arange(len(exported[name]), device=exported[name].device)
        exported[name.replace("position_embeddings.weight", "position_ids")] = numbers.unsqueeze(0)
    if f"text_decoder.{_WORDS}" in exported:
        exported[f"text_decoder.{_TABLE}.weight"] = exported[f"text_decoder.{_WORDS}"]
        exported[f"text_decoder.{_TABLE}.bias"] = exported["text_decoder.cls.predictions.bias"]
    return exported


def load_public(model: nn.Module, state: Mapping[str, Tensor], queues: bool = False) -> Converted:
    """Loads what a public file has of a model; the rest keeps its start.

    Args:
        state: see `tempme_vl.backbones.testa_checkpoint.read_checkpoint`.
        queues: see `tempme_vl.backbones.testa_checkpoint.convert`.

    Returns:
        what became of the names of the file. Numbers of positions and a projection that is the table of words have no
        place, and are not listed.

    Raises:
        ValueError: weights of other shapes, or a decoder whose projection is not its table of words.
    """
    table, words = f"text_decoder.{_TABLE}.weight", f"text_decoder.{_WORDS}"
    if table in state and words in state and not torch.equal(state[table], state[words]):
        raise ValueError("the decoder's projection is its table of word embeddings; this file's is another")
    given = {
        key: value for key, value in state.items() if not key.endswith("position_ids") and f".{_TABLE}." not in key
    }
    own, names = model.state_dict(), public_names(model)
    wanted = {public: own[name].shape for name, public in names.items()}
    converted = convert(given, wanted, queues)
    found = {name: converted.state[public] for name, public in names.items() if public in converted.state}
    if _TEMPERATURE in found:
        found[_TEMPERATURE] = found[_TEMPERATURE].reshape(1)
    if trouble := misfits({name: own[name] for name in found}, found):
        raise ValueError(f"the file does not hold the weights of this model: {trouble}")
    model.load_state_dict(found, strict=False)
    return converted
