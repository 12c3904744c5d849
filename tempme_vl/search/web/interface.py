"""What the server needs of an index: `Served` has it, and tests have small ones."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Literal, Protocol, TypeAlias

from tempme_vl.search.hits import Hit, Hits

if TYPE_CHECKING:
    from PIL import Image

    from tempme_vl.search.locate import Location

Fine = Literal["none", "maxsim", "matching"]
Query: TypeAlias = "str | Image.Image | Path"


class Index(Protocol):
    """A folder's videos, as they are searched; methods as `tempme_vl.search.SearchIndex` has them."""

    @property
    def root(self) -> Path:
        """The folder of the videos."""

    @property
    def version(self) -> int:
        """Another one whenever rows have changed."""

    @property
    def paths(self) -> Collection[str]:
        """The files, relative to the folder, in their order."""

    @property
    def has_tokens(self) -> bool:
        """Whether single tokens are there, for "maxsim" and for `locate`."""

    @property
    def has_fusion(self) -> bool:
        """Whether "matching" is there, too: tokens as the model's fusion layers take them."""

    def facts(self) -> Mapping[str, str | int | float]:
        """Rows, model and versions, to be shown."""

    def search(self, query: Query, k: int, where: str | None, fine: Fine) -> Hits:
        """The best segments."""

    def locate(self, query: Query, hit: Hit, top: int) -> Location:
        """Where the tokens of a segment that are nearest to a query come from."""
