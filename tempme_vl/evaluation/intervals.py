"""Means with their 95 % intervals: over a few seeds by Student, over questions and seeds by a bootstrap."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

DRAWS = 10_000  # of a bootstrap
LEVEL = 95  # percent, of all intervals
# Student's t at (1 + LEVEL %) / 2 by degrees of freedom, for the few seeds that are usual
STUDENT = {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776, 5: 2.571, 6: 2.447, 7: 2.365, 8: 2.306, 9: 2.262}
NORMAL = 1.960  # beyond
_AT_ONCE = 2**22  # numbers that a bootstrap holds


@dataclass(frozen=True)
class Interval:
    """A mean and the ends of its 95 % interval; without ends where there is one value only."""

    mean: float
    low: float | None = None
    high: float | None = None

    def shown(self, signed: bool = False) -> str:
        sign = "+" if signed else ""
        ends = "" if self.low is None or self.high is None else f" [{self.low:{sign}.1f}, {self.high:{sign}.1f}]"
        return f"{self.mean:{sign}.1f}{ends}"


def over_seeds(values: Sequence[float]) -> Interval:
    """Mean and Student's interval of one number a seed."""
    mean, count = statistics.fmean(values), len(values)
    if count == 1:
        return Interval(mean)
    half = STUDENT.get(count - 1, NORMAL) * statistics.stdev(values) / math.sqrt(count)
    return Interval(mean, mean - half, mean + half)


def bootstrap(values: ArrayLike, draws: int = DRAWS) -> Interval:
    """The mean of a number for each seed and question.

    Seeds and questions are drawn anew with replacement, the same questions of all seeds, and the middle 95 % of the
    means are between the ends. Of paired differences it is the interval of the mean difference.

    Args:
        values: (S, Q), S seeds and Q questions.
    """
    of_seeds = np.asarray(values, dtype=float)
    seeds, questions = of_seeds.shape
    rng, means = np.random.default_rng(0), np.empty(draws)
    step = max(1, _AT_ONCE // (seeds + questions))
    for first in range(0, draws, step):
        count = min(step, draws - first)
        chosen = rng.integers(seeds, size=(count, seeds))
        times = np.stack([(chosen == seed).sum(axis=1) for seed in range(seeds)], axis=1)
        each = times @ of_seeds / seeds  # (draws, Q), the mean over the seeds that were drawn
        which = rng.integers(questions, size=(count, questions))
        means[first : first + count] = np.take_along_axis(each, which, axis=1).mean(axis=1)
    low, high = np.percentile(means, [(100 - LEVEL) / 2, (100 + LEVEL) / 2])
    return Interval(float(of_seeds.mean()), float(low), float(high))
