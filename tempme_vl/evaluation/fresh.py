"""A function called in a process that has done nothing else: memory that is freed may stay with a process."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from typing import TypeVar

import torch
from typing_extensions import ParamSpec

P = ParamSpec("P")
T = TypeVar("T")


def in_fresh_process(function: Callable[P, T], *args: P.args, **options: P.kwargs) -> T:
    """What it returns, with as many threads as here.

    Where there is a fork server, that imports the function's module once for all calls, which takes longer than most
    measurements.
    """
    forks = "forkserver" in multiprocessing.get_all_start_methods()
    context = multiprocessing.get_context("forkserver" if forks else "spawn")
    if forks:
        context.set_forkserver_preload([function.__module__])
    with ProcessPoolExecutor(1, context, torch.set_num_threads, (torch.get_num_threads(),)) as process:
        return process.submit(function, *args, **options).result()
