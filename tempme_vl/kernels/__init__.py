"""Fused kernels for a GPU: what the plain functions do in many passes over the tokens, in one each.

The plain form is the reference and the fallback: it serves the CPU, a compiler or an exporter that traces the
encoder, and a GPU on which the kernels do not run.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache

import torch
from torch import Tensor

_log = logging.getLogger(__name__)
_enabled = True


def usable(x: Tensor) -> bool:
    """Whether kernels serve this tensor: on a GPU where they run, outside of `plain`, traced by nobody."""
    if not x.is_cuda or torch.compiler.is_compiling() or torch.jit.is_tracing():
        return False
    return _enabled and _run_on(x.device)


def enabled() -> bool:
    """Whether this is outside of `plain`."""
    return _enabled


@contextmanager
def plain() -> Iterator[None]:
    """Inside, all of the process takes the plain forms: to compare with, or for second derivatives, which kernels lack.

    Where blocks are recomputed (`VisualFrontend.set_grad_checkpointing`), put the backward pass inside, too.
    """
    global _enabled
    before, _enabled = _enabled, False
    try:
        yield
    finally:
        _enabled = before


@cache
def _run_on(device: torch.device) -> bool:
    """Tries the smallest merge: Triton is missing from some installations of torch, and needs a C compiler."""
    try:
        from tempme_vl.kernels import merging

        x = torch.ones(1, 3, 1, device=device)
        base, src, dst = merging.match(x, pairs=1, num_prefix=1, by_position=True)
        merging.weighted_mean(x, x, base, src, dst)
    except torch.OutOfMemoryError:  # says nothing of the kernels
        raise
    except Exception as error:  # Triton, its compiler, the driver: each has errors of its own
        _log.warning(
            "merging runs without its fused kernels on %s, and slower: %s: %s", device, type(error).__name__, error
        )
        return False
    return True
