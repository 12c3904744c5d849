"""What a process does in the tests of faults, each function in processes of its own."""

from __future__ import annotations

import os
import resource
import shutil
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import torch
from torch.utils.data import Dataset
from training.models import Line, Numbers, line_trainer, train_config
from training.runs import mean

from tempme_vl import together
from tempme_vl.training import checkpoint, distributed, folder
from tempme_vl.training.engine import Trainer


def script(function: Callable[..., Any], *args: Any) -> None:
    """A function as the main module of an interpreter: an error that nobody catches reaches `sys.excepthook`."""
    try:
        function(*args)
    except SystemExit:
        raise
    except BaseException:
        sys.excepthook(*sys.exc_info())
        sys.exit(1)


class Damaged(Numbers):
    """Number 7 cannot be read on one rank."""

    def __init__(self, rank: int):
        super().__init__()
        self.rank = rank

    def __getitem__(self, key: tuple[int, int]) -> dict[str, Any]:
        if int(os.environ["RANK"]) == self.rank:
            raise OSError("number 7 is damaged")
        return super().__getitem__(key)


def train(output: Path, dataset: Dataset, **changes: Any) -> None:
    trainer = start(output, dataset, **changes)
    for batch in trainer.batches():
        trainer.update(batch, mean)


def start(output: Path, dataset: Dataset, **changes: Any) -> Trainer:
    distributed.initialize()
    model = Line()
    rule = torch.optim.AdamW(model.parameters(), lr=0.1)
    return Trainer(model, rule, dataset, train_config(output, **{"batch_size": 4, **changes}))


def damaged_worker(output: Path, rank: int) -> None:
    """A loader worker of one rank raises, the other ranks' do not."""
    train(output, Damaged(rank), workers=1)


def not_finite(output: Path) -> None:
    """Every rank raises at step 2."""
    trainer = start(output, Numbers(), workers=1, save_every=2)
    for batch in trainer.batches():
        trainer.update(batch, lambda y, b: mean(y, b) * (float("nan") if trainer.step == 2 else 1.0))


def killed(rank: int) -> None:
    """One rank is killed while the other is busy with something that waits for nobody."""
    distributed.initialize()
    together.PATIENCE = 2.0
    distributed.barrier()
    if distributed.rank() == rank:
        os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(300)


def launch(output: Path, pid: Path) -> None:
    """A launcher that starts one rank and is killed when that has trained three steps."""
    os.environ["CROSS_SIZE"] = "1"
    child = os.fork()
    if child == 0:
        train_slowly(output, 400)
        os._exit(0)
    pid.write_text(str(child))
    wait_for(lambda: steps(output) >= 3)
    os.kill(os.getpid(), signal.SIGKILL)


def train_slowly(output: Path, epochs: int) -> None:
    trainer = line_trainer(output, batch_size=4, epochs=epochs, save_every=10**6)
    for batch in trainer.batches():
        trainer.update(batch, mean)
        time.sleep(0.05)


def steps(output: Path) -> int:
    log = output / "metrics.jsonl"
    return len(log.read_text().splitlines()) if log.is_file() else 0


def wait_for(condition: Callable[[], bool]) -> None:
    limit = time.monotonic() + 80
    while not condition():
        assert time.monotonic() < limit
        time.sleep(0.05)


def hold(output: Path, go: Path) -> None:
    """Uses a run folder until `go` is there."""
    trainer = line_trainer(output)  # has the lock as long as it lives
    (output / "held").touch()
    wait_for(go.exists)
    assert trainer.step == 0


def claimed(output: Path, apart: bool) -> str:
    """What claiming a folder says on this rank, "" where it works; `apart`: each rank has its own disk."""
    distributed.initialize()
    folder.SEEING = 0.3
    try:
        folder.claim(output / str(distributed.rank()) if apart else output)
    except ValueError as error:
        return str(error)
    return ""


def interrupted(output: Path, times: int) -> None:
    """Ctrl-C during step 4, in the process and its workers."""
    trainer = line_trainer(output, batch_size=4, workers=2)
    for batch in trainer.batches():
        trainer.update(batch, mean)
        if trainer.step == 4:
            everyone = [*psutil.Process().children(recursive=True), psutil.Process()]
            for _ in range(times):
                for process in everyone:
                    process.send_signal(signal.SIGINT)
            time.sleep(0.2)


def epochs(output: Path, seen: Path, die_in: int = -1, resume: str = "auto") -> tuple[float, int, int]:
    """Trains three epochs of three steps; the end of an epoch notes the checkpoint that it finds, and may be killed.

    Returns:
        best_score, best_step, step.
    """
    trainer = line_trainer(output, batch_size=4, resume=resume, save_every=100)

    def end_epoch() -> None:
        with seen.open("a") as file:
            latest = checkpoint.latest_checkpoint(output / "checkpoints")
            file.write(f"{trainer.epoch} {None if latest is None else latest.name}\n")
        trainer.log(score=trainer.epoch)
        if trainer.epoch == die_in:
            os.kill(os.getpid(), signal.SIGKILL)
        trainer.is_best({1: 5.0, 2: 7.0, 3: 7.0}[trainer.epoch])

    for batch in trainer.batches(end_epoch):
        trainer.update(batch, mean)
    return trainer.best_score, trainer.best_step, trainer.step


def export_and_die(target: Path, step: int, place: str) -> None:
    """Exports "old" at step 5, then "new" at `step`, and is killed before, in or after a function of the second."""

    def write(text: str) -> Callable[[Path], None]:
        def into(directory: Path) -> None:
            directory.mkdir()
            (directory / "first").write_text(text)
            if place == "writing" and text == "new":
                os.kill(os.getpid(), signal.SIGKILL)
            (directory / "second").write_text(text)

        return into

    checkpoint.replace_export(target, 5, write("old"))
    name, _, when = place.partition(" ")
    owner = {"replace": os, "rmtree": shutil, "rename": Path}.get(name)
    if owner is not None:
        original = getattr(owner, name)

        def deadly(*args: Any, **options: Any) -> Any:
            if when == "after":
                original(*args, **options)
            os.kill(os.getpid(), signal.SIGKILL)

        setattr(owner, name, deadly)
    checkpoint.replace_export(target, step, write("new"))
    os.kill(os.getpid(), signal.SIGKILL)


def full_disk(output: Path) -> str:
    """What saving says after a good checkpoint when no file may grow beyond a few bytes."""
    trainer = line_trainer(output, batch_size=4, save_every=100)
    for batch in trainer.batches():
        trainer.update(batch, mean)
        if trainer.step == 2:
            trainer.save()
        if trainer.step == 4:
            break
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (600, 600))
    try:
        trainer.save()
    except OSError as error:
        return f"{type(error).__name__}: {error}"
    return "saved"


def exported(output: Path, stage: str) -> tuple[list[str], list[str]]:
    """Names that a run gathers for an export of a line that saves its slope alone, and what is written."""
    trainer = line_trainer(output, stage, batch_size=4)
    gathered = sorted(checkpoint.full_state_dict(trainer.engine, everywhere=False))
    trainer.engine.module.is_saved = lambda name: name == "w"

    def write(directory: Path, state: dict[str, torch.Tensor]) -> None:
        directory.mkdir()
        (directory / "names").write_text(" ".join(sorted(state)))

    trainer.export(output / "best", write)
    return gathered, (output / "best" / "names").read_text().split()
