"""Processes that end with the one that they serve: loader workers with their trainer, a trainer with its launcher."""

from __future__ import annotations

import atexit
import multiprocessing
import multiprocessing.util  # registers what it does at exit
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Sequence

_POLL = 0.5  # seconds between two looks at the parent


def become_worker(worker: int) -> None:
    """The `worker_init_fn` of every DataLoader here: signals are the main process's to answer, whose end is ours.

    Ctrl-C and schedulers signal whole process trees, while the last checkpoint still needs its loaders. But a worker
    that ignores SIGTERM would outlive an error: what is left of them at exit is killed (`end_workers`).
    """
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)
    when_parent_ends(lambda: os._exit(1))


def when_parent_ends(action: Callable[[], None]) -> None:
    """Calls `action` once, in a thread, soon after the process that started this one has ended."""
    parent = os.getppid()

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(_POLL)
        action()

    threading.Thread(target=watch, daemon=True).start()


def end_workers() -> None:
    """Kills the loader workers that are left. Done at exit, where multiprocessing would ask them to end and wait."""
    left = [process for process in multiprocessing.active_children() if process.daemon]
    if left and threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # torch would take their end for another error
    for process in left:
        process.kill()


atexit.register(end_workers)  # registered after multiprocessing's own, hence called before it


def launcher(ranks: int, gpus: Sequence[int] = ()) -> list[str]:
    """The deepspeed command of this environment, on a port that nothing else uses, so that runs go beside each other.

    Args:
        gpus: of a run, by number; none where there are none, or where it takes the first ones.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    where = ["--include", f"localhost:{','.join(map(str, gpus))}"] if gpus else ["--num_accelerators", str(ranks)]
    return [sys.executable, "-m", "deepspeed.launcher.runner", *where, "--master_port", str(port)]
