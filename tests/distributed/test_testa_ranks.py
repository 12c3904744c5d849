"""TESTA's retrieval on two ranks: its momentum copies and its queue are those of one, and what it cannot do it says."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from distributed.testa_runs import STEPS, answer_stages, refusal, train_stages
from training.processes import run

STAGES = ("zero0", "zero1", "zero2", "zero3", "partitioned")


def test_two_ranks_train_as_one_that_compares_each_half_by_itself(tmp_path: Path) -> None:
    """A rank's contrast has its own momentum features as columns, and not those of others in the same step (as TESTA);
    all else is that of the whole batch: negatives among all pairs, copies, queue."""
    (one,) = run(train_stages, STAGES[:1], tmp_path / "one")
    expected, weights = one["zero0"]
    assert len(expected) == STEPS and expected[0] != expected[1]
    assert {name.split(".")[0] for name in weights} >= {"frontend", "text", "momentum", "queue"}
    assert int(weights["queue.place"]) == 8 and weights["queue.ids"].min() >= 0
    for found in run(train_stages, STAGES, tmp_path / "two", world=2):
        for stage in STAGES:
            losses, its = found[stage]
            assert losses == pytest.approx(expected, rel=1e-5), stage
            assert its.keys() == weights.keys()
            for name, weight in weights.items():
                torch.testing.assert_close(its[name], weight, rtol=1e-4, atol=1e-5, msg=f"{stage}: {name}")


@pytest.mark.slow
def test_answers_are_learned_on_two_ranks_as_on_one(tmp_path: Path) -> None:
    (one,) = run(answer_stages, STAGES[:1], tmp_path / "one")
    assert len(set(one["zero0"])) == STEPS
    for found in run(answer_stages, STAGES, tmp_path / "two", world=2):
        for stage in STAGES:
            assert found[stage] == pytest.approx(one["zero0"], rel=1e-5), stage


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"stage": "zero1", "precision": "bf16"}, "momentum copies follow float32 weights: .*; got bf16"),
        ({"stage": "zero1", "batch_size": 16}, "expected a queue of a multiple of 16 places, .*; it has 24"),
    ],
)
def test_what_the_copies_cannot_follow_is_refused_first(changes: dict[str, object], said: str, tmp_path: Path) -> None:
    assert re.search(said, run(refusal, tmp_path / "run", changes)[0])
