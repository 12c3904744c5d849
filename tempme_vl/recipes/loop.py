"""The training loop of every recipe."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from tempme_vl.recipes.options.shared import RunOptions
from tempme_vl.recipes.start import say
from tempme_vl.training.engine import Trainer


@dataclass(frozen=True)
class Trained:
    """A finished training.

    Attributes:
        start_step, seconds: where this process began, and how long it trained.
    """

    start_step: int
    seconds: float


def fit(
    options: RunOptions, trainer: Trainer, model: Any, validate: Callable[[], tuple[float, dict[str, Any]]] | None
) -> Trained | None:
    """Trains to the end, or as far as the options say; OUTPUT/best is the model after its best epoch.

    Args:
        validate: at an epoch's end, the score to choose by and what else to log; None takes the last epoch.

    Returns:
        None if the run was stopped before its end.
    """

    def end_epoch() -> None:
        score = float(trainer.epoch)  # without a validation split the last epoch is the best
        if validate is not None:
            score, found = validate()
            trainer.log(**found)
        if trainer.is_best(score):
            trainer.export(options.output / "best", model.save_pretrained)

    last_step = trainer.total_steps if options.max_steps is None else options.max_steps
    start, start_step = time.perf_counter(), trainer.step
    for batch in trainer.batches(end_epoch):
        if trainer.step >= last_step:
            break
        trainer.update(batch, model.loss)
    trained = Trained(start_step, time.perf_counter() - start)
    if trainer.step == trainer.total_steps:
        return trained
    trainer.save()
    say(f"stopped after {trainer.step} of {trainer.total_steps} steps; the test split was not looked at")
    return None
