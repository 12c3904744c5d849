"""What a rank does with every method and every way of tuning in turn, so that one start of ranks serves them all."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor
from training.models import train_config
from tuning.models import Pairs, made, outputs

from tempme_vl.tasks.retrieval import load_retrieval_model
from tempme_vl.training import distributed
from tempme_vl.training.engine import Trainer
from tempme_vl.training.optim import parameter_groups

SAVED, STEPS = 2, 3  # the checkpoint is that of the step before the last


class Trained(NamedTuple):
    """What became of one model.

    Attributes:
        losses: of all steps.
        weights: those that train, whole, after the last step.
        repeats: whether the last step from the checkpoint is, bit for bit, the last step.
        exported: the largest difference between the exported folder's output and the model's.
    """

    losses: list[float]
    weights: dict[str, Tensor]
    repeats: bool
    exported: float


def train_each(cases: list[tuple[str, str]], output: Path, stage: str) -> dict[tuple[str, str], Trained]:
    """What becomes of every (tuning, method)."""
    distributed.initialize()
    return {case: train(output / "-".join(case), *case, stage) for case in cases}


def train(output: Path, tuning: str, method: str, stage: str) -> Trained:
    trainer = trainer_of(output, tuning, method, stage, "never")
    losses = steps(trainer)
    weights = trained(trainer)
    model = trainer.engine.module
    trainer.export(output / "best", lambda folder, state: model.save_pretrained(folder, state))
    exported = outputs(load_retrieval_model(output / "best"), "CLIP") - outputs(model, "CLIP")
    trainer.engine.destroy()

    again = trainer_of(output, tuning, method, stage, "auto")
    assert again.step == SAVED
    repeats = steps(again) == losses[SAVED:]
    repeats &= all(torch.equal(weight, weights[name]) for name, weight in trained(again).items())
    again.engine.destroy()
    return Trained(losses, weights, repeats, float(exported.abs().max()))


def trainer_of(output: Path, tuning: str, method: str, stage: str, resume: str) -> Trainer:
    model = made(tuning, method)
    groups = parameter_groups(model, 1e-3, 1e-2, 0.1, model.is_new_parameter)
    optimizer = torch.optim.SGD(groups, momentum=0.9)  # Adam would divide tiny gradients by themselves
    config = train_config(output, stage, epochs=2, batch_size=4, resume=resume, save_every=100)
    return Trainer(model, optimizer, Pairs(model), config)


def steps(trainer: Trainer) -> list[float]:
    """Losses up to the last step; the checkpoint is written on the way."""
    losses = []
    for batch in trainer.batches():
        losses.append(trainer.update(batch, trainer.engine.module.loss))
        if trainer.step == SAVED:
            trainer.save()
        if trainer.step == STEPS:
            break
    return losses


def trained(trainer: Trainer) -> dict[str, Tensor]:
    names = {name for name, weight in trainer.engine.module.named_parameters() if weight.requires_grad}
    return {name: weight.clone() for name, weight in trainer.full_state_dict().items() if name in names}
