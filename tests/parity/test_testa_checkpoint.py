"""Public files of BLIP and TESTA fill the same weights as in the original, and models are written under their names."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from parity.cases import Case, assert_close, find
from parity.testa import schedule_of
from torch import Tensor, nn

from tempme_vl import VisualFrontend
from tempme_vl.backbones.testa import TestaConfig, build, saved_config
from tempme_vl.tasks.testa.model import ContrastOptions
from tempme_vl.tasks.testa.pretraining import TestaPretrainingModel
from tempme_vl.tasks.testa.public import load_public, public_names, to_public
from tempme_vl.tasks.testa.retrieval import TestaRetrievalModel
from tempme_vl.text import BertDecoder, BlipShape, BlipTextEncoder

CHECKPOINT = find("testa", "testa_checkpoint*", outside=True)
NAMES = find("testa", "testa_key_names*", outside=True, once=True)
# constants, and the table of words a second time: files have them, models here do not
BESIDE = re.compile(r"position_ids$|\.cls\.predictions\.decoder\.")


def model_of(target: str, c: dict[str, Any], text: BlipShape, tower: TestaConfig, queue: int) -> nn.Module:
    schedule = schedule_of(c, tower.num_frames, tower.layers, {})
    frontend = VisualFrontend(build(tower), schedule, saved_config(tower))
    encoder, words = BlipTextEncoder(text), tuple(map(str, range(text.vocab_size)))
    if target == "retrieval":
        return TestaRetrievalModel(frontend, encoder, words, training=ContrastOptions(queue))
    if target == "pretrain":
        return TestaPretrainingModel(frontend, encoder, words, training=ContrastOptions(queue))
    frontend.head = nn.Identity()  # question answering has no projection
    return nn.ModuleDict({"frontend": frontend, "text": encoder, "decoder": BertDecoder(text, text.layers)})


def small(case: Case, target: str, keys: dict[str, list[int]]) -> nn.Module:
    c = case.config["config"]
    words, positions = (keys[f"text_encoder.embeddings.{name}_embeddings.weight"][0] for name in ("word", "position"))
    sizes = {"mlp_width": c["inter"], "cross_width": c["vw"], "vocab_size": words, "positions": positions}
    text = BlipShape(width=c["h"], layers=c["layers"], heads=c["heads"], **sizes)
    hidden = keys["visual_encoder.blocks.0.mlp.fc1.weight"][0]
    tower = TestaConfig(
        c["img"], c["patch"], c["vw"], c["vdepth"], c["vh"], c["embed"], c["T"], mlp_ratio=hidden / c["vw"]
    )
    return model_of(target, c, text, tower, c["queue"])


@pytest.mark.parametrize("case", CHECKPOINT, ids=str)
@pytest.mark.parametrize("origin", ["blip", "testa"])
@pytest.mark.parametrize("target", ["retrieval", "vqa"])
def test_what_a_file_fills(case: Case, origin: str, target: str) -> None:
    j, t = case.config, case.tensors
    keys = j[f"{origin}_checkpoint_keys"]
    generator = torch.Generator().manual_seed(0)
    state: dict[str, Tensor] = {name: torch.randn(shape, generator=generator) for name, shape in keys.items()}
    state |= case.group(f"in.{origin}.")
    table = "text_decoder.cls.predictions.decoder"
    state[f"{table}.weight"] = state["text_decoder.bert.embeddings.word_embeddings.weight"]
    expected = j["cases"][f"{origin}_to_{target}"]
    model = small(case, target, keys)
    start = {name: value.clone() for name, value in model.state_dict().items()}
    converted = load_public(model, state)
    assert set(converted.missing) == set(expected["missing"])
    # of the file alone: the original makes temporal copies first, for which it may have no place
    unexpected = {name for name in expected["unexpected"] if name in state and not BESIDE.search(name)}
    unused = {name for name in converted.unused if "queue" not in name}
    # resized from the online ones instead
    assert unexpected <= unused and unused - unexpected <= {"visual_encoder_m.time_embed"}
    own, names = model.state_dict(), public_names(model)
    for name, public in names.items():
        source = expected["renamed"].get(public, public)
        value = own[name].reshape(-1) if public == "temp" else own[name]
        if source == "(computed)":
            assert_close(value, t[f"out.{origin}_to_{target}.{public}"], public, float(j["tolerance"]))
        elif source.startswith("("):
            assert torch.equal(own[name], start[name]), public
        else:
            assert torch.equal(value, state[source].reshape(value.shape)), f"{public} is not {source}"
    assert len(names) == expected["total"] - sum(BESIDE.search(name) is not None for name in to_public(model))


def expanded(keys: dict[str, list[int]]) -> dict[str, tuple[int, ...]]:
    """Names of all blocks from blocks.{0-11}."""
    whole = {}
    for name, shape in keys.items():
        match = re.search(r"\{(\d+)-(\d+)\}", name)
        numbers = range(int(match[1]), int(match[2]) + 1) if match else [None]
        for number in numbers:
            whole[name if match is None else name.replace(match[0], str(number))] = tuple(shape)
    return whole


@pytest.mark.parametrize("case", NAMES, ids=str)
@pytest.mark.parametrize("target", ["retrieval", "vqa", "pretrain"])
def test_names_and_shapes_of_public_models(case: Case, target: str) -> None:
    j = case.config
    expected = expanded(j["keys"][target])
    assert len(expected) == j["counts"][target]
    frames, queue = expected["visual_encoder.time_embed"][1], expected.get("image_queue", (256, 1))[1]
    with torch.device("meta"):
        tower = TestaConfig(224, 16, 768, 12, 12, 256, frames, temporal_scaling=target == "pretrain")
        model = model_of(target, {"img": 224, "patch": 16}, BlipShape.named("base"), tower, queue)
        public = to_public(model)
    assert {name: tuple(value.shape) for name, value in public.items()} == expected
    counted = j["parameters"][target]
    for part, number in counted.items():
        own = {n: p for n, p in public.items() if n.startswith(f"{part}.") and not BESIDE.search(n)}
        assert sum(value.numel() for value in own.values()) == number, part
