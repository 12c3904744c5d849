"""Runs functions in processes of their own, one a rank. They are forked from one process that has imported everything
once, because importing torch and DeepSpeed takes longer than the work of a test.
"""

from __future__ import annotations

import io
import multiprocessing
import os
import socket
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing import forkserver
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any

import torch

TESTS = Path(__file__).resolve().parents[1]
ROOT = TESTS.parent
RECIPES = ROOT / "recipes"
SCRIPTS = {  # by the name of the command
    "train retrieval": "recipes/full_ft_msrvtt.py",
    "train peft": "recipes/peft_msrvtt.py",
    "train videoqa": "recipes/videoqa.py",
    "train videollm": "recipes/videollm_lora.py",
    "train pretraining": "recipes/pretrain.py",
    "eval retrieval": "eval/retrieval.py",
    "eval videoqa": "eval/videoqa.py",
    "compare": "eval/compare.py",
    "videollm-compare": "eval/videollm_compare.py",
    "efficiency": "eval/efficiency.py",
    "demo": "recipes/motion_demo.py",
}
SERVER = multiprocessing.get_context("forkserver")
LIMIT = 400.0  # seconds, of which a run needs some ten where nothing else runs
PRELOAD = ["training.preload"]
_HELD: list[socket.socket] = []


def run(function: Callable[..., Any], *args: Any, world: int = 1) -> list[Any]:
    """What `function(*args)` returns on each rank, in rank order; an exception of any rank is raised here."""
    receivers, processes = [], []
    for env in _environments(world):
        receiver, sender = SERVER.Pipe(duplex=False)
        receivers.append(receiver)
        processes.append(_start(_answer, sender, env, function, args))
        sender.close()
    answers = [_received(receiver) if receiver.poll(LIMIT) else (False, "a rank is late") for receiver in receivers]
    for process in processes:
        process.join(10)
        process.kill()
    failed = [value for done, value in answers if not done]
    if failed:
        raise RuntimeError("\n".join(failed))
    return [value for _, value in answers]


def start(function: Callable[..., Any], *args: Any, log: Path, world: int = 1) -> list[ForkServerProcess]:
    """Processes that may end in any way; their output goes to `log`."""
    return [_start(_into_log, log, env, function, args) for env in _environments(world)]


def exit_codes(processes: list[ForkServerProcess]) -> list[int | None]:
    """Waits for processes; None for one that did not end in time, which is then killed."""
    limit = time.monotonic() + LIMIT
    for process in processes:
        process.join(max(0.0, limit - time.monotonic()))
    codes = [process.exitcode for process in processes]
    for process in processes:
        process.kill()
    return codes


def free_port() -> int:
    """A port that nobody else gets while this process lives.

    A socket that is bound and does not listen keeps it: the system gives the port to nobody who asks for any, and lets
    a server that names it in, as both set SO_REUSEADDR.
    """
    held = socket.socket()
    held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    held.bind(("", 0))
    _HELD.append(held)
    return held.getsockname()[1]


def _environments(world: int) -> list[dict[str, str]]:
    """What the deepspeed launcher tells each rank."""
    port = str(free_port())
    return [
        {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world)}
        | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        for rank in range(world)
    ]


def _start(target: Callable[..., Any], *args: Any) -> ForkServerProcess:
    with _python_path():  # the server reads it once, when the first process starts it
        SERVER.set_forkserver_preload(PRELOAD)
        forkserver.ensure_running()
    process = SERVER.Process(target=target, args=args)
    process.start()
    return process


@contextmanager
def _python_path() -> Iterator[None]:
    before = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = os.pathsep.join([str(TESTS), str(RECIPES), *([before] if before else [])])
    try:
        yield
    finally:
        if before is None:
            del os.environ["PYTHONPATH"]
        else:
            os.environ["PYTHONPATH"] = before


def _become_rank(env: dict[str, str]) -> None:
    os.environ.update(env)
    multiprocessing.set_start_method("fork", force=True)  # data loaders start as they do in a plain process
    cores = sorted(os.sched_getaffinity(0))
    # one core and one thread: threads that wait for each other are slow where other work goes on; another first core
    # for each of the processes that share out the tests
    first = int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw"))
    os.sched_setaffinity(0, {cores[(first + int(env["RANK"])) % len(cores)]})
    torch.set_num_threads(1)


def _received(receiver: Any) -> tuple[bool, Any]:
    return torch.load(io.BytesIO(receiver.recv_bytes()), weights_only=False)


def _answer(sender: Any, env: dict[str, str], function: Callable[..., Any], args: tuple[Any, ...]) -> None:
    _become_rank(env)
    try:
        answer = (True, function(*args))
    except BaseException:
        answer = (False, traceback.format_exc())
    buffer = io.BytesIO()
    torch.save(answer, buffer)  # whole tensors, where pickle would send handles that end with this process
    sender.send_bytes(buffer.getvalue())
    sender.close()
    # a rank that failed leaves others waiting for it: end without their help
    os._exit(0)


def _into_log(log: Path, env: dict[str, str], function: Callable[..., Any], args: tuple[Any, ...]) -> None:
    _become_rank(env)
    with log.open("a") as stream:
        os.dup2(stream.fileno(), 1)
        os.dup2(stream.fileno(), 2)
    sys.stdout.reconfigure(line_buffering=True)
    function(*args)
