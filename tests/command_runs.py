"""A command whose `main` fails in the way that it is asked to; for processes of its own."""

from __future__ import annotations

import logging
import os
import signal
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch.utils.data import DataLoader, Dataset

from tempme_vl import command, reports
from tempme_vl.command_line import Command
from tempme_vl.data.video import VideoError


@dataclass(frozen=True)
class Options:
    """What this command is for."""

    kind: str
    """How it ends."""
    workers: int = 2
    """Loader processes."""


class OneBroken(Dataset):
    """Its fourth item cannot be read, and others take long."""

    def __len__(self) -> int:
        return 8

    def __getitem__(self, index: int) -> int:
        if index == 3:
            raise VideoError("/clips/b.mp4", "cut off")
        time.sleep(0 if index < 3 else 300)
        return index


def ignore_sigterm(worker: int) -> None:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)


def main(options: Options) -> None:
    kind = options.kind
    logging.getLogger("tempme_vl.tasks").info("a message of the package")
    if kind == "value":
        raise ValueError("expected one thing,\n   got another")
    if kind == "file":
        Path("/no/such/folder/file").read_text()
    if kind == "package":
        raise type("OwnError", (RuntimeError,), {"__module__": "tempme_vl.some.part"})("its own error")
    if kind == "bug":
        _ = {}["a key"]
    if kind == "interrupt":
        raise KeyboardInterrupt
    if kind == "exit":
        raise SystemExit(143)
    if kind == "worker":
        for _ in DataLoader(OneBroken(), num_workers=options.workers, worker_init_fn=ignore_sigterm):
            pass
    if kind.startswith("ranks"):
        dist.init_process_group("gloo")
        dist.barrier()  # else the first ends before the other has come
        if kind == "ranks: all" or dist.get_rank() == 1:
            raise ValueError(f"a mistake on {kind}")
        time.sleep(command.FIRST_RANK_SECONDS + 2)
    reports.show("a result")


def start(arguments: list[str], defaults: Any = None, seconds: float = 60, traceback: str = "") -> None:
    sys.argv = ["some_command.py", *arguments]
    command.FIRST_RANK_SECONDS = seconds
    os.environ[command.TRACEBACK] = traceback
    command.run(Command("some", Options, main, defaults=defaults or (lambda arguments: {})))


def own_defaults(arguments: Sequence[str]) -> dict[str, Any]:
    print("a warning of the parser", file=sys.stderr)
    raise ValueError("options that miss each other")
