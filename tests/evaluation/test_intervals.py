"""Intervals of a bootstrap, where all that can be drawn is known."""

from __future__ import annotations

import numpy as np
import pytest

from tempme_vl.evaluation.intervals import bootstrap


@pytest.mark.parametrize(
    ("values", "low", "high"),
    [
        ([[0.0, 100.0]], 0, 100),  # 0, 50 and 100 in 1, 2 and 1 of 4 draws
        ([[0.0, 0.0, 0.0, 40.0]], 0, 30),  # 40 is drawn three times of four in 4.7 % of draws, four times in 0.4 %
        ([[0.0, 0.0, 0.0], [90.0, 90.0, 90.0]], 0, 90),  # one of the two seeds alone in half of the draws
        ([[30.0, 30.0], [30.0, 30.0]], 30, 30),
    ],
)
def test_the_ends_are_those_of_what_can_be_drawn(values: list[list[float]], low: float, high: float) -> None:
    found = bootstrap(values)
    assert (found.mean, found.low, found.high) == (pytest.approx(np.mean(values)), low, high)


def test_seeds_share_the_questions_that_are_drawn() -> None:
    """Questions of one sign in one seed and of the other in the other cancel, if both seeds are drawn alike often."""
    one = np.array([100.0, -100.0] * 50)
    apart, together = bootstrap([one, -one, one, -one]), bootstrap([one] * 4)
    assert apart.high is not None and together.high is not None
    assert apart.high < 0.7 * together.high and together.high == pytest.approx(19.6, abs=2)


def test_many_numbers_are_drawn_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    values = np.random.default_rng(0).normal(5, 1, (2, 400))
    whole = bootstrap(values, 2000)
    monkeypatch.setattr("tempme_vl.evaluation.intervals._AT_ONCE", 402 * 30)
    parts = bootstrap(values, 2000)
    assert parts.mean == whole.mean and parts.low == pytest.approx(whole.low, abs=0.02)
