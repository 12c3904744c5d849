"""Batches as a function of the step."""

from __future__ import annotations

from itertools import chain

import pytest

from tempme_vl.training.sampler import StepSampler


def test_ranks_in_order_make_the_batch_of_one_process() -> None:
    alone = list(StepSampler(50, 12, 3, seed=1))
    for world in (2, 3, 4):
        parts = [list(StepSampler(50, 12, 3, seed=1, rank=rank, world=world)) for rank in range(world)]
        assert [[*chain.from_iterable(batch)] for batch in zip(*parts, strict=True)] == alone


@pytest.mark.parametrize("start", [0, 1, 4, 7, 12])
def test_a_later_start_continues_exactly(start: int) -> None:
    whole = list(StepSampler(50, 12, 3, seed=1, rank=1, world=2))
    rest = StepSampler(50, 12, 3, seed=1, start_step=start, rank=1, world=2)
    assert len(rest) == len(whole) - start
    assert list(rest) == whole[start:]


def test_an_epoch_holds_each_sample_at_most_once_and_epochs_differ() -> None:
    sampler = StepSampler(50, 12, 3, seed=1)
    assert (sampler.steps_per_epoch, sampler.total_steps) == (4, 12)
    epochs: list[list[int]] = [[], [], []]
    for step, batch in enumerate(sampler):
        assert len(batch) == 12
        assert {epoch for epoch, _ in batch} == {step // 4}
        epochs[step // 4] += [index for _, index in batch]
    for order in epochs:
        assert len(set(order)) == 48
        assert set(order) <= set(range(50))
    assert len({tuple(order) for order in epochs}) == 3


def test_a_batch_size_that_divides_leaves_nothing_out() -> None:
    assert sorted(index for batch in StepSampler(24, 8, 1, seed=0) for _, index in batch) == list(range(24))


def test_the_seed_decides() -> None:
    assert list(StepSampler(50, 12, 1, seed=1)) == list(StepSampler(50, 12, 1, seed=1))
    assert list(StepSampler(50, 12, 1, seed=1)) != list(StepSampler(50, 12, 1, seed=2))


def test_impossible_batches() -> None:
    with pytest.raises(ValueError, match=r"9 does not divide over 2 ranks.*--batch-size"):
        StepSampler(50, 9, 1, seed=0, world=2)
    with pytest.raises(ValueError, match=r"a batch of 60 .*has 50; lower --batch-size"):
        StepSampler(50, 60, 1, seed=0)
