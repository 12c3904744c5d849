"""All weights train."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from tempme_vl.tuning.base import Tuning


@dataclass(frozen=True)
class Full(Tuning):
    """Trains everything at the rate of pretrained weights, new modules at theirs."""

    name: ClassVar[str] = "full"
