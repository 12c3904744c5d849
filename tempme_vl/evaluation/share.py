"""How much of an encoder's time its merging steps take."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from tempme_vl.merging import TokenMerger


def merging_share(encoder: nn.Module, step: Callable[[], object], device: torch.device, repeats: int = 5) -> float:
    """The median share of a step's time between the beginnings and the ends of matching and merging.

    On a GPU between CUDA events, so that waiting for the host in between counts, too.

    Args:
        encoder: with `TokenMerger`s among its modules; 0 without.
        step: runs it.
        repeats: steps that count; one more before them warms up.
    """
    moments: list[Any] = []
    steps = [
        module for module in encoder.modules() if isinstance(module, TokenMerger) and type(module) is not TokenMerger
    ]
    hooks = [module.register_forward_pre_hook(lambda *_: moments.append(_now(device))) for module in steps]
    hooks += [module.register_forward_hook(lambda *_: moments.append(_now(device))) for module in steps]
    shares = []
    try:
        for turn in range(1 + repeats):
            moments.clear()
            start = _now(device)
            step()
            end = _now(device)
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            merging = sum(_between(*pair) for pair in zip(moments[::2], moments[1::2], strict=True))
            if turn:
                shares.append(merging / _between(start, end))
    finally:
        for hook in hooks:
            hook.remove()
    return statistics.median(shares)


def _now(device: torch.device) -> Any:
    if device.type != "cuda":
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def _between(start: Any, end: Any) -> float:
    return start.elapsed_time(end) if isinstance(start, torch.cuda.Event) else end - start
