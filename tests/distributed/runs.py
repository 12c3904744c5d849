"""What a rank does in the tests of several ranks. Each function runs in processes of its own."""

from __future__ import annotations

import io
from contextlib import redirect_stdout
from itertools import chain
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from training.models import small_trainer

from tempme_vl.tasks.losses import contrastive_loss, gather_rows
from tempme_vl.training import distributed

STEPS = 3  # two make an epoch


def train_cases(cases: dict[str, dict[str, Any]], output: Path) -> dict[str, tuple[list[float], dict[str, Tensor]]]:
    """Name -> (losses, full weights) after STEPS steps of each case, one trainer after another."""
    return {name: train(output / name, **case) for name, case in cases.items()}


def train_in_used_memory(
    cases: dict[str, dict[str, Any]], output: Path
) -> dict[str, tuple[list[float], dict[str, Tensor]]]:
    """`train_cases` where what is allocated holds NaN until it is written."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    assert torch.utils.deterministic.fill_uninitialized_memory and torch.empty(1).isnan()
    return train_cases(cases, output)


def train(output: Path, stage: str, **case: Any) -> tuple[list[float], dict[str, Tensor]]:
    trainer = small_trainer(output, stage, **case)
    losses = []
    for batch in trainer.batches():
        losses.append(trainer.update(batch, trainer.engine.module.loss))
        if trainer.step == STEPS:
            break
    weights = {name: weight.clone() for name, weight in trainer.full_state_dict().items()}
    trainer.engine.destroy()
    return losses, weights


def save_and_go_on(cases: dict[str, dict[str, Any]], output: Path) -> dict[str, list[tuple[list[str], float]]]:
    """Name -> (names of the whole batch, loss) of steps 4 to 6 of each case, after a checkpoint of step 3."""
    return {name: _last_steps(output / name, 3, **case) for name, case in cases.items()}


def go_on(
    cases: dict[str, dict[str, Any]], output: Path, chunks: int
) -> tuple[dict[str, list[tuple[list[str], float]]], str]:
    """The same from that checkpoint, and what is printed."""
    with redirect_stdout(io.StringIO()) as said:
        changes = {"resume": "auto", "chunks": chunks}
        steps = {name: _last_steps(output / name, 0, **{**case, **changes}) for name, case in cases.items()}
    return steps, said.getvalue()


def _last_steps(output: Path, save_at: int, stage: str, **case: Any) -> list[tuple[list[str], float]]:
    trainer = small_trainer(output, stage, save_every=100, **case)
    seen = []
    for batch in trainer.batches():
        loss = trainer.update(batch, trainer.engine.module.loss)
        if trainer.step == save_at:
            trainer.save()
        if trainer.step > 3:
            seen.append((list(chain.from_iterable(distributed.gather_objects(list(batch["name"])))), loss))
        if trainer.step == 6:
            break
    trainer.engine.destroy()
    return seen


def contrastive_gradient(shared: bool) -> dict[str, Tensor]:
    """Loss and gradient of projections W, V and a scale, averaged over ranks as DeepSpeed averages them, float64.

    Args:
        shared: with videos and captions that occur twice, also on other ranks, and two pairs that are not valid.
    """
    distributed.initialize()
    made = torch.Generator().manual_seed(0)
    x, y, W, V = (torch.randn(shape, generator=made, dtype=torch.float64) for shape in ((8, 5), (8, 5), (5, 4), (5, 4)))
    scale = torch.tensor(2.0, dtype=torch.float64)
    parameters = [parameter.requires_grad_() for parameter in (W, V, scale)]
    ids = torch.arange(8)
    video_ids = torch.tensor([0, 1, 0, 3, 4, 1, 6, 7]) if shared else ids
    text_ids = torch.tensor([0, 1, 2, 3, 2, 5, 5, 7]) if shared else ids
    valid = torch.tensor([1, 1, 1, 0, 1, 1, 0, 1]) if shared else torch.ones_like(ids)

    local = 8 // distributed.world_size()
    mine = slice(distributed.rank() * local, (distributed.rank() + 1) * local)
    rows = [F.normalize(x[mine] @ W, dim=-1), F.normalize(y[mine] @ V, dim=-1)]
    rows += [video_ids[mine], text_ids[mine], valid[mine]]
    video, text, *keys, there = (gather_rows(part) for part in rows)
    loss = contrastive_loss(video, text, scale.exp(), *keys, there.bool())
    loss.backward()
    result = {"loss": loss.detach()}
    for name, parameter in zip(("W", "V", "scale"), parameters, strict=True):
        gradient = parameter.grad
        if distributed.world_size() > 1:
            torch.distributed.all_reduce(gradient)
        result[name] = gradient / distributed.world_size()
    return result


def different_rows() -> Tensor:
    """What each rank gets back for its own gathered rows: the gradient of a sum that weighs every row differently."""
    distributed.initialize()
    rows = torch.full((2, 3), float(distributed.rank()), requires_grad=True)
    gathered = gather_rows(rows)
    (gathered * torch.arange(gathered.numel()).view_as(gathered)).sum().backward()
    assert torch.equal(gathered[:, 0], torch.arange(distributed.world_size()).repeat_interleave(2).float())
    assert rows.grad is not None
    return rows.grad


def exchanges_of_a_step(output: Path) -> list[str]:
    """What a rank exchanges with others in the second update and the check for signals behind it: the name of the
    function, and how many numbers. DeepSpeed's own calls, which name their arguments, are not among it."""
    trainer = small_trainer(output, "zero0", optimizer="sgd")
    seen: list[str] = []
    functions = {name: getattr(torch.distributed, name) for name in ("all_reduce", "all_gather")}

    def counted(name: str) -> Any:
        def call(*tensors: Any, **options: Any) -> Any:
            seen.extend(f"{name} {sent.numel()}" for sent in tensors[-1:])
            return functions[name](*tensors, **options)

        return call

    for batch in trainer.batches():
        if trainer.step == 2:
            break
        seen.clear()
        for name in functions:
            setattr(torch.distributed, name, counted(name))
        trainer.update(batch, trainer.engine.module.loss)
    for name, function in functions.items():
        setattr(torch.distributed, name, function)
    trainer.engine.destroy()
    return seen
