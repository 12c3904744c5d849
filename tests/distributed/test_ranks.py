"""Several ranks compute what one computes, at every ZeRO stage, in pieces or whole."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from distributed.runs import (
    STEPS,
    contrastive_gradient,
    different_rows,
    exchanges_of_a_step,
    train_cases,
    train_in_used_memory,
)
from torch import Tensor
from training.models import small_model
from training.processes import run

STAGES = ("zero0", "zero1", "zero2", "zero3", "partitioned", "zero3_offload")
CASES: dict[str, dict[str, Any]] = {
    **{stage: {"stage": stage, "optimizer": "sgd"} for stage in STAGES},
    "zero0 chunks": {"stage": "zero0", "optimizer": "sgd", "chunks": 4},
    **{
        f"{stage} chunks": {"stage": stage, "optimizer": "sgd", "chunks": 2}
        for stage in ("zero1", "zero3", "partitioned")
    },
    "zero1 adamw": {"stage": "zero1", "optimizer": "adamw"},
    "partitioned adamw": {"stage": "partitioned", "optimizer": "adamw"},
    **{
        f"{task} {stage}": {"stage": stage, "optimizer": "sgd", "task": task}
        for task, stages in (
            ("classifier", ("zero0", "zero1", "zero2", "partitioned")),
            ("decoder", ("zero0", "zero2", "partitioned")),
            ("lora", ("zero0", "partitioned")),
        )
        for stage in stages
    },
}
# each of what they combine is in another case; on several ranks they take as long as those together
SECOND = (
    *("zero1", "zero3", "zero3 chunks", "partitioned adamw"),
    *("classifier zero0", "classifier zero1", "classifier partitioned", "decoder zero0"),
)
FIRST = [name for name in CASES if name not in SECOND]
# partitioned weights cost seconds a case; one rank holds them whole in any case
ONE = [name for name in CASES if "zero3" not in name and not name.endswith(" partitioned")]
TASKS = ("retrieval", "classifier", "decoder")
Trained = dict[str, tuple[list[float], dict[str, Tensor]]]


@pytest.fixture(scope="module")
def one(tmp_path_factory: pytest.TempPathFactory) -> Trained:
    return run(train_cases, {name: CASES[name] for name in ONE}, tmp_path_factory.mktemp("one"))[0]


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> list[Trained]:
    return on_two_ranks(FIRST, tmp_path_factory.mktemp("two"))


def on_two_ranks(names: Sequence[str], folder: Path) -> list[Trained]:
    return run(train_cases, {name: CASES[name] for name in names}, folder, world=2)


def test_what_fills_up_a_part_of_a_weight_is_none_of_it(two: list[Trained], tmp_path: Path) -> None:
    """An odd number of weights, on two ranks: DeepSpeed leaves a place that nothing is written to."""
    name = "partitioned"
    for trained, expected in zip(run(train_in_used_memory, {name: CASES[name]}, tmp_path, world=2), two, strict=True):
        assert trained[name][0] == expected[name][0]


def test_a_step_exchanges_little_and_seldom(tmp_path: Path) -> None:
    """Ids of all pairs at once, the features, whether the loss is finite, the loss and the norm, signals."""
    for seen in run(exchanges_of_a_step, tmp_path, world=2):
        assert [name.partition(" ")[0] for name in seen] == 3 * ["all_gather"] + 3 * ["all_reduce"]
        assert seen[3:5] == ["all_reduce 1", "all_reduce 2"] and seen[0] == "all_gather 12"  # three ids of four pairs


def assert_same_weights(left: dict[str, Tensor], right: dict[str, Tensor]) -> None:
    assert left.keys() == right.keys()
    for name in left:
        torch.testing.assert_close(left[name], right[name], rtol=1e-5, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("case", FIRST)
def test_two_ranks_equal_one(case: str, one: Trained, two: list[Trained]) -> None:
    assert_two_equal_one(case, one, two)


@pytest.mark.slow
def test_two_ranks_equal_one_in_second_cases(one: Trained, tmp_path: Path) -> None:
    two = on_two_ranks(SECOND, tmp_path)
    for case in SECOND:
        assert_two_equal_one(case, one, two)


def assert_two_equal_one(case: str, one: Trained, two: list[Trained]) -> None:
    losses, weights = one[case if case in ONE else plain(case)]
    assert len(losses) == STEPS
    for rank_losses, rank_weights in (rank[case] for rank in two):
        assert rank_losses == pytest.approx(losses, rel=1e-5)
        if CASES[case]["optimizer"] == "sgd":  # Adam divides tiny gradients by themselves
            assert_same_weights(weights, rank_weights)


@pytest.mark.parametrize("case", [name for name in ONE if "adamw" not in name])
def test_all_stages_and_chunks_train_the_same(case: str, one: Trained) -> None:
    expected = one[plain(case)]
    assert one[case][0] == pytest.approx(expected[0], rel=1e-5)
    assert_same_weights(one[case][1], expected[1])


def plain(case: str) -> str:
    """The case of the same task without any partitioning."""
    task = CASES[case].get("task")
    return f"{task} zero0" if task else "zero0"


@pytest.mark.parametrize("task", TASKS)
def test_every_trained_parameter_moved(task: str, one: Trained) -> None:
    model = small_model(task)
    schedule = model.frontend.schedule
    assert schedule.output_tokens < schedule.frames * schedule.tokens
    _, weights = one["zero0" if task == "retrieval" else f"{task} zero0"]
    before = dict(model.named_parameters())
    assert before.keys() <= weights.keys()
    positions = [name for name in before if "clip_position" in name]
    assert len(positions) == 2
    moved = {
        "retrieval": ("logit_scale.log_scale", "text.embed.token_embedding.weight"),
        "classifier": ("head.classifier.0.weight", "head.questions.text.embeddings.word_embeddings.weight"),
        "decoder": ("head.decoder.head.dense.weight", "head.questions.fusion.layers.0.crossattention.self.key.weight"),
    }
    for name in (*positions, *moved[task], "frontend.embed.conv1.weight"):
        assert before[name].detach().abs().max() > 0
        assert not torch.equal(before[name], weights[name]), name


def test_lora_moves_its_own_weights_and_clip_positions_alone(one: Trained) -> None:
    before = dict(small_model("lora").named_parameters())
    moved = {name for name, weight in before.items() if not torch.equal(weight, one["lora zero0"][1][name])}
    assert moved == {name for name in before if "lora_" in name or "clip_position" in name} and len(moved) == 4 * 2 + 2


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("world", [2, 4])
def test_gradient_of_gathered_loss_equals_the_full_batch(shared: bool, world: int) -> None:
    (full,) = run(contrastive_gradient, shared)
    for parts in run(contrastive_gradient, shared, world=world):
        for name, value in full.items():
            torch.testing.assert_close(parts[name], value, rtol=1e-10, atol=1e-12)


def test_masks_change_the_loss() -> None:
    assert run(contrastive_gradient, False)[0]["loss"] != run(contrastive_gradient, True)[0]["loss"]


def test_gathered_rows_keep_rank_order_and_return_their_own_gradient() -> None:
    first, second = run(different_rows, world=2)
    weights = torch.arange(12.0).view(4, 3)
    # times the number of ranks, over which the engine averages
    assert torch.equal(first, 2 * weights[:2])
    assert torch.equal(second, 2 * weights[2:])
