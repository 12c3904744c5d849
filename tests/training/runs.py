"""What a process does in the tests of the training engine. Each function runs in processes of its own."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from torch import Tensor
from training.models import Line, Numbers, line_trainer, train_config

from tempme_vl.training import checkpoint, distributed
from tempme_vl.training.engine import NonFiniteLossError, Trainer


def mean(features: dict[str, Tensor], batch: dict[str, Any]) -> Tensor:
    return features["y"].mean()


def finish(output: Path, stage: str = "zero0", stop: int = 9, **changes: Any) -> tuple[int, dict[str, Tensor]]:
    """Trains to step `stop` of 9 and saves; gives the step and the weights."""
    trainer = line_trainer(output, stage, batch_size=4, **changes)
    for batch in trainer.batches():
        if trainer.step == stop:
            break
        trainer.update(batch, mean)
    trainer.save()
    return trainer.step, {name: weight.clone() for name, weight in trainer.full_state_dict().items()}


def tampered(output: Path, part: int = 1) -> list[tuple[str, str, str]]:
    """Damages every file of a run's checkpoint in many ways, and goes on from it.

    Args:
        part: every so manieth way alone.

    Returns:
        file, damage, and what becomes of it: the error, or "same" or "other" weights and step.
    """
    trainer = line_trainer(output, batch_size=4)
    for batch in trainer.batches():
        trainer.update(batch, mean)
        if trainer.step == 2:
            break
    trainer.save()
    wanted, found, ways = trainer.full_state_dict(), [], []
    for file in sorted(path for path in (output / "checkpoints").rglob("*") if path.is_file()):
        data = file.read_bytes()
        middle = len(data) // 2
        flipped = bytes([data[middle] ^ 1])
        ways += [(file, "missing", None), (file, "cut", data[:middle]), (file, "empty", b"")]
        ways += [(file, "zeros", bytes(len(data))), (file, "flipped", data[:middle] + flipped + data[middle + 1 :])]
    damaged = output.with_name("damaged")
    for file, damage, data in ways[::part]:
        shutil.rmtree(damaged, ignore_errors=True)
        shutil.copytree(output, damaged)
        target = damaged / file.relative_to(output)
        target.unlink() if data is None else target.write_bytes(data)
        try:
            again = line_trainer(damaged, batch_size=4, resume="auto")
            state = again.full_state_dict()
            same = again.step == 2 and all(torch.equal(state[name], value) for name, value in wanted.items())
            said = "same" if same else "other"
        except Exception as error:
            said = f"{type(error).__name__}: {error}"
        found.append((file.relative_to(output / "checkpoints").as_posix(), damage, said))
    return found


def tied_state(output: Path, stage: str) -> dict[str, Tensor]:
    """The whole state of a line whose slope has a second name, after a step."""
    distributed.initialize()
    model = Line()
    model.again = model.w
    model.register_buffer("unit", torch.ones(1))
    trainer = Trainer(model, torch.optim.SGD(model.parameters(), lr=0.1), Numbers(), train_config(output, stage))
    trainer.update(next(trainer.batches()), mean)
    return trainer.full_state_dict()


def refused(output: Path, stage: str = "zero0", **changes: Any) -> str:
    """The message of the ValueError with which a trainer on this folder is refused."""
    with pytest.raises(ValueError) as caught:
        line_trainer(output, stage, **{"batch_size": 4, "resume": "auto", **changes})
    return str(caught.value)


class _BreakGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient * float("nan")


def break_loss(loss: Tensor) -> Tensor:
    return loss * float("nan")


def break_gradient(loss: Tensor) -> Tensor:
    return _BreakGradient.apply(loss)


def go_wrong(
    output: Path, stage: str, how: Callable[[Tensor], Tensor], chunks: int, bad_rank: int
) -> tuple[str, list[str]]:
    """The error when step 4 goes wrong on one rank, the last checkpoint being of step 3; and that batch's names."""
    trainer = line_trainer(output, stage, batch_size=4, save_every=3, chunks=chunks)
    names: list[str] = []

    def loss_fn(features: dict[str, Tensor], batch: dict[str, Any]) -> Tensor:
        loss = mean(features, batch)
        return how(loss) if trainer.step == 4 and distributed.rank() == bad_rank else loss

    with pytest.raises(NonFiniteLossError) as caught:
        for batch in trainer.batches():
            names = batch["name"]
            trainer.update(batch, loss_fn)
    return str(caught.value), names


def die_while_saving(output: Path, place: str) -> None:
    """Trains with a checkpoint at step 3 and is killed while it writes the one of step 6.

    Args:
        place: "_random_states", before all files are there, or "_replace", between the two renames.
    """
    trainer = line_trainer(output, batch_size=4, save_every=3)
    original = getattr(checkpoint, place)

    def deadly(*args: Any) -> Any:
        if trainer.step == 6:
            os.kill(os.getpid(), signal.SIGKILL)
        return original(*args)

    setattr(checkpoint, place, deadly)
    for batch in trainer.batches():
        trainer.update(batch, mean)


def saved_states(root: Path) -> list[str]:
    """Saves five fake checkpoints beside stale newer ones, and one twice; gives the folders left."""

    saved = 0

    def tensors(step: int) -> Iterator[tuple[str, Tensor]]:
        nonlocal saved
        saved += 1
        yield "weight/w", torch.full((3,), float(step))

    distributed.initialize()
    for stale in ("step-00000030", "step-00000040", "step-00000003.partial"):
        (root / stale).mkdir(parents=True)
    for step in (1, 2, 3, 4, 5, 5):
        folder = checkpoint.save_checkpoint(tensors(step), root, step, {"step": step})
        assert checkpoint.latest_checkpoint(root) == folder
        assert checkpoint.read_state(folder) == {"step": step}
        assert float(checkpoint.Tensors(folder)["weight/w"].sum()) == 3 * step
    assert saved == 5
    shutil.rmtree(root / "step-00000030")
    return sorted(path.name for path in root.iterdir())


def terminate(output: Path, workers: int) -> None:
    """The last rank gets SIGTERM during step 4, as do its loader processes, from a process that is none of them."""
    trainer = line_trainer(output, batch_size=4, workers=workers)
    for batch in trainer.batches():
        trainer.update(batch, mean)
        if trainer.step == 4 and distributed.rank() == distributed.world_size() - 1:
            everyone = [psutil.Process(), *psutil.Process().children(recursive=True)]
            assert len(everyone) == 1 + workers
            subprocess.run(["kill", "-TERM", *(str(process.pid) for process in everyone)], check=True)
            time.sleep(0.2)
