"""What a tracer alone runs. Imported while one does: the decorator loads torch's whole compiler, 1.2 s of CPU time."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch

T = TypeVar("T")


@torch.compiler.assume_constant_result
def constant(read: Callable[[], T]) -> T:
    """What `read` gives while a tower is traced, as a constant of the compiled tower."""
    return read()
