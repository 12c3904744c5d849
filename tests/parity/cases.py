"""Reference outputs by family, from tests/parity/data or the folder of the same layout in TEMPME_GOLDENS."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from safetensors.torch import load_file
from torch import Tensor

DATA = Path(__file__).parent / "data"
FOLDER = Path(os.environ.get("TEMPME_GOLDENS", DATA))


@dataclass(frozen=True)
class Case:
    """One JSON file and the safetensors file of the same name, if there is one."""

    path: Path

    @property
    def config(self) -> dict[str, Any]:
        return json.loads(self.path.read_text())

    @cached_property
    def tensors(self) -> dict[str, Tensor]:
        return load_file(self.path.with_suffix(".safetensors"))

    def group(self, prefix: str) -> dict[str, Tensor]:
        """The tensors whose names start with a prefix, without it."""
        return {k.removeprefix(prefix): v for k, v in self.tensors.items() if k.startswith(prefix)}

    def __str__(self) -> str:
        return self.path.stem


def find(family: str, pattern: str = "*", without: str = "", outside: bool = False, once: bool = False) -> list[Case]:
    """All cases of a family; none is an error, since a test without a case would pass unseen.

    Args:
        without: what their names do not hold.
        outside: the files are too large for the repository: without the environment variable there is none, and what
            they are for is skipped.
        once: one file serves all sets of shapes, and another folder need not hold it: that of tests/parity/data is
            taken then, or what it is for is skipped if it is `outside`.
    """
    paths = sorted((FOLDER / family).glob(f"{pattern}.json"))
    if once and not paths:
        paths = sorted((DATA / family).glob(f"{pattern}.json"))
    cases = [Case(path) for path in paths if not without or without not in path.stem]
    if not cases and not (outside and (once or FOLDER == DATA)):
        raise FileNotFoundError(f"no case {family}/{pattern}.json in {FOLDER}")
    return cases


def assert_close(actual: Tensor, expected: Tensor, what: str, tolerance: float = 1e-5) -> None:
    """Of the same shape, and no value further off than `tolerance`."""
    assert actual.shape == expected.shape, f"{what}: {tuple(actual.shape)} instead of {tuple(expected.shape)}"
    difference = (actual.double() - expected.double()).abs().max().item()
    assert difference <= tolerance, f"{what} differs by {difference:.3g}"
