"""Runs of the retrieval recipe. Each function runs in processes of its own."""

from __future__ import annotations

import os
import signal
from typing import Any

import full_ft_msrvtt as recipe
import torch

from tempme_vl.tasks.retrieval import RetrievalModel
from tempme_vl.training.engine import Trainer


def train(arguments: list[str], die_at: int | None = None, number: int = signal.SIGKILL, only_rank: int = 0) -> None:
    """The recipe's command line; a rank sends itself a signal in the update after step `die_at`."""
    update = Trainer.update

    def deadly(self: Trainer, *args: Any) -> float:
        if self.step == die_at and int(os.environ["RANK"]) == only_rank:
            os.kill(os.getpid(), number)
        return update(self, *args)

    Trainer.update = deadly  # type: ignore[method-assign]
    recipe.main(recipe.parse(arguments))


def train_on_nan(arguments: list[str], bad_step: int) -> None:
    """The recipe with a loss that is NaN at a step."""
    original, steps = RetrievalModel.loss, []

    def loss_fn(*args: Any) -> torch.Tensor:
        steps.append(None)
        return original(*args) * (float("nan") if len(steps) == bad_step + 1 else 1.0)

    RetrievalModel.loss = loss_fn  # type: ignore[method-assign]
    recipe.main(recipe.parse(arguments))
