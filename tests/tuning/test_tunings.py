"""Every way of tuning: what trains, what is saved, and that a new one is a class and a line."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from tuning.models import KINDS, make, outputs, train, trained

from tempme_vl.tasks.qa import load_qa_model
from tempme_vl.tasks.retrieval import load_retrieval_model
from tempme_vl.tuning import TUNINGS, Lora, Tuning, find_tuning


@pytest.mark.parametrize("kind", KINDS)
def test_lora_starts_as_the_model_trains_little_and_is_saved_as_plain_weights(kind: str, tmp_path: Path) -> None:
    plain, model = make(kind), make(kind, Lora(rank=2, alpha=3.0))
    assert torch.equal(outputs(model, kind), outputs(plain, kind))
    new = {name for name in trained(plain) if plain.is_new_parameter(name)}
    added = {name for name, _ in model.named_parameters() if ".lora_" in name}
    assert trained(model) == new | added and added
    assert all(model.is_new_parameter(name) for name in trained(model))
    layers = {name.split(".lora_")[0].rpartition(".")[2] for name in added}
    assert layers == ({"qkv", "query", "key", "value"} if kind == "UMT" else {"qkv"})
    if kind == "QA":
        assert all(name.startswith("frontend.") for name in added)

    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    train(model, kind)
    for name, p in model.named_parameters():
        assert torch.equal(p, before[name]) or name in trained(model), name
    assert all(not torch.equal(p, before[name]) for name, p in model.named_parameters() if ".lora_B" in name)
    tuned = outputs(model, kind)
    assert (tuned - outputs(plain, kind)).abs().max() > 1e-3

    model.save_pretrained(tmp_path / "best")
    loaded = (load_qa_model if kind == "QA" else load_retrieval_model)(tmp_path / "best")
    assert loaded.state_dict().keys() == plain.state_dict().keys()
    torch.testing.assert_close(outputs(loaded, kind), tuned, rtol=1e-4, atol=1e-5)
    assert not torch.equal(outputs(loaded, kind), outputs(plain, kind))


def test_weights_in_half_precision_stay_so() -> None:
    """What is merged is added in float32, and rounded once."""
    model = make("CLIP", "lora")
    state = {name: value.bfloat16() for name, value in model.state_dict().items()}
    layer = "text.blocks.0.attn.qkv"
    a, b = (torch.randn_like(state[f"{layer}.lora_{side}.default.weight"]) for side in "AB")
    state |= {f"{layer}.lora_A.default.weight": a, f"{layer}.lora_B.default.weight": b}
    merged = model.plain_state(state)[f"{layer}.weight"]
    expected = state[f"{layer}.base_layer.weight"].double() + b.double() @ a.double()
    assert merged.dtype == torch.bfloat16
    assert (merged.double() - expected).abs().max() <= expected.abs().max() * 2**-8


def test_towers_are_exported_with_lora_in_them() -> None:
    model = make("CLIP", "lora")
    train(model, "CLIP")
    exported, started = model.openai_state_dict(), make("CLIP").openai_state_dict()
    changed = {name for name in started if not torch.equal(exported[name], started[name])}
    assert exported.keys() == started.keys()
    assert changed == {name for name in started if name.endswith("in_proj_weight")} and len(changed) > 4


def test_clip4clip_freezes_parts_of_clip_alone() -> None:
    frozen = {name for name, p in make("CLIP", "clip4clip").named_parameters() if not p.requires_grad}
    assert frozen and all(".embed." in name for name in frozen)
    with pytest.raises(ValueError, match="clip4clip names parts of CLIP to freeze; UMTRetrievalModel has none"):
        make("UMT", "clip4clip")


@pytest.mark.parametrize(
    ("tuning", "options", "message"),
    [
        ("loar", {}, "unknown tuning 'loar'; expected one of full, clip4clip, lora"),
        ("lora", {"rnk": 4}, "tuning 'lora': unknown keys 'rnk'; expected rank, alpha, dropout, targets"),
        ("lora", {"rank": "4"}, "tuning 'lora', 'rank': expected a whole number"),
        ("lora", {"rank": 0}, "expected a rank of at least 1"),
        ("lora", {"dropout": 1.0}, "a dropout from 0 to below 1"),
        ("full", {"rank": 8}, "tuning 'full': unknown keys 'rank'"),
    ],
)
def test_what_is_no_tuning(tuning: str, options: Mapping[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        find_tuning(tuning, options)


def test_layers_that_are_not_there_and_a_second_tuning() -> None:
    with pytest.raises(ValueError, match="no layer of RetrievalModel is called q_proj or v_proj"):
        make("CLIP", Lora(targets=("q_proj", "v_proj")))
    model = make("CLIP", "lora")
    with pytest.raises(ValueError, match=r"without modules of another tuning; Lora\(rank=8, .*\) has added some"):
        model.tune(Lora())
    other = make("CLIP", "clip4clip")
    other.tune(Lora())  # which freezes more


def test_names_are_those_of_the_table() -> None:
    assert {name: kind.name for name, kind in TUNINGS.items()} == {name: name for name in TUNINGS}
    assert all(issubclass(kind, Tuning) for kind in TUNINGS.values())
