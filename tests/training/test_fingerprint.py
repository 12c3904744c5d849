"""Only the same run goes on from a checkpoint: what is compared, and what the refusal says."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from training.models import Line, Numbers, train_config
from training.processes import run

from tempme_vl.training import config, distributed, fingerprint
from tempme_vl.training.config import TrainConfig
from tempme_vl.training.engine import Trainer

FACTS = {"method": "none", "merge_layers": (1, 2), "annotations": {"train": "a1"}, "words": list(range(400))}


def trained(output: Path, facts: dict[str, Any], *cases: dict[str, Any]) -> list[str]:
    """A checkpoint of a run with `facts`; then what resuming it in each of the cases says, "" where it goes on."""
    distributed.initialize()

    def trainer(
        facts: dict[str, Any] | None = facts,
        lr: float = 0.1,
        frozen: bool = False,
        rule: Any = torch.optim.AdamW,
        settings: dict[str, Any] | None = None,
        **changes: Any,
    ) -> Trainer:
        model = Line()
        model.b.requires_grad_(not frozen)
        optimizer = rule([weight for weight in model.parameters() if weight.requires_grad], lr=lr)
        config = train_config(output, **{"batch_size": 4, **changes})
        if settings is not None:
            file = output / "own.json"
            file.write_text(json.dumps({**json.loads(config.deepspeed_config.read_text()), **settings}))
            config = dataclasses.replace(config, deepspeed_config=file)
        return Trainer(model, optimizer, Numbers(), config, facts)

    first = trainer()
    first.update(next(first.batches()), lambda output, batch: output["y"].mean())
    first.save()
    said = []
    for case in cases:
        try:
            step = trainer(**{"resume": "auto", **case}).step
            said.append("" if step == 1 else f"step {step}")
        except ValueError as error:
            said.append(str(error))
    return said


@pytest.fixture(scope="module")
def said(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    cases = {
        "same": {},
        "unimportant": {"workers": 2, "save_every": 7, "tensorboard": False, "precision": "fp32"},
        "other file, same content": {"settings": {"wall_clock_breakdown": False}},
        "method": {"facts": {**FACTS, "method": "tome"}},
        "several": {"facts": {**FACTS, "method": "tome", "merge_layers": (1, 3), "annotations": {"train": "b2"}}},
        "long": {"facts": {**FACTS, "words": [1, *range(1, 400)]}},
        "more": {"facts": {**FACTS, "rank": 8}},
        "fewer": {"facts": {k: v for k, v in FACTS.items() if k != "method"}},
        "none": {"facts": None},
        "rate": {"lr": 0.01},
        "rule": {"rule": torch.optim.Adam},
        "frozen": {"frozen": True},
        "warmup": {"warmup": 0.5},
        "lr_floor": {"lr_floor": 0.5},
        "clip_grad": {"clip_grad": 0.0},
        "precision": {"precision": "bf16"},
        "chunks": {"chunks": 2},
        "deepspeed": {"settings": {"zero_optimization": {"stage": 0, "reduce_bucket_size": 7}}},
    }
    (answers,) = run(trained, tmp_path_factory.mktemp("run"), FACTS, *cases.values())
    return dict(zip(cases, answers, strict=True))


@pytest.mark.parametrize("case", ["same", "unimportant", "other file, same content"])
def test_what_decides_nothing_may_change(said: dict[str, str], case: str) -> None:
    assert said[case] == ""


@pytest.mark.parametrize(
    ("case", "expected"),
    [
        ("method", ["method none, now tome"]),
        ("several", ["method none, now tome", "merge_layers [1, 2], now [1, 3]", "annotations.train a1, now b2"]),
        ("long", ["words hash "]),
        ("more", ["rank not recorded, now 8"]),
        ("fewer", ["method none, now not given"]),
        ("none", ["method none, now not given", "annotations.train a1, now not given"]),
        ("rate", ["optimizer.0.lr 0.1, now 0.01"]),
        ("rule", ["optimizer.rule AdamW, now Adam"]),
        ("frozen", ["parameters "]),
        ("warmup", ["warmup 0.1, now 0.5"]),
        ("lr_floor", ["lr_floor 0.0, now 0.5"]),
        ("clip_grad", ["clip_grad 1.0, now 0.0"]),
        ("precision", ["bf16 False, now True"]),
        ("chunks", ["chunks 1, now 2"]),
        ("deepspeed", ["deepspeed.zero_optimization.reduce_bucket_size not recorded, now 7"]),
    ],
)
def test_every_difference_is_refused_and_named(said: dict[str, str], case: str, expected: list[str]) -> None:
    for difference in expected:
        assert difference in said[case]
    assert "step-00000001" in said[case] and "another --output" in said[case]
    if case in ("method", "several", "warmup", "rate"):
        assert said[case].count(", now ") == len(expected)


def test_a_value_of_another_type_is_another_value() -> None:
    assert fingerprint.differences({"a": 1}, {"a": True}) == ["a 1, now True"]
    assert fingerprint.differences(fingerprint.flat({"a": (1, 2)}), fingerprint.flat({"a": [1, 2]})) == []


def test_every_option_of_the_engine_is_compared_or_listed() -> None:
    names = {field.name for field in dataclasses.fields(TrainConfig)}
    assert names > config.MAY_CHANGE
    compared = train_config(Path("x")).fingerprint()
    assert set(compared) == names - config.MAY_CHANGE
    assert {"epochs", "batch_size", "chunks", "warmup", "lr_floor", "clip_grad", "seed"} <= set(compared)
