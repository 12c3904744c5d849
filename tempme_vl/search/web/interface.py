"""What the server needs of an index; `tempme_vl.search.index` has it, and tests have small ones."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, Protocol, TypeAlias

import numpy as np
from PIL import Image

Fine = Literal["none", "maxsim"]
Query: TypeAlias = "str | Image.Image | Path"


class Found(Protocol):
    """A segment of an indexed video, and how well it fits a query."""

    @property
    def path(self) -> str:
        """Relative to the indexed folder."""

    @property
    def start(self) -> float:
        """Seconds."""

    @property
    def end(self) -> float:
        """Seconds."""

    @property
    def score(self) -> float:
        """The higher the better."""


class BestPatches(Protocol):
    """The patches of one frame that the best tokens of a segment were merged from."""

    @property
    def time(self) -> float:
        """Seconds of the video."""

    @property
    def mask(self) -> np.ndarray:
        """(rows, columns) bool, of the picture that the tower saw."""


class Index(Protocol):
    """A folder's videos, as they are searched."""

    @property
    def paths(self) -> Sequence[str]:
        """The files, relative to the indexed folder."""

    @property
    def has_tokens(self) -> bool:
        """Whether single tokens are there, for "maxsim" and for `regions`."""

    def facts(self) -> Mapping[str, Any]:
        """Rows, model and versions, as JSON has them."""

    def search(
        self, query: Query, k: int, where: str | None, fine: Fine
    ) -> tuple[Sequence[Found], Mapping[str, float]]:
        """The best segments, the best first, and milliseconds by the name of a stage.

        Raises:
            ValueError: a filter or a query that cannot be read.
        """

    def regions(self, query: Query, found: Found, tokens: int) -> Sequence[BestPatches]:
        """Where the best tokens of a segment come from, frames in order.

        Raises:
            ValueError: an index without tokens.
        """

    @property
    def crops(self) -> bool:
        """Whether the tower saw the square in the middle of a frame; else the whole frame."""
