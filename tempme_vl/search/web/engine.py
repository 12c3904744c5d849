"""The models behind a server: one thread runs them, request after request, and times each stage.

Models and torch's threads gain nothing from requests that run at once, and take more memory; so requests wait in a
line, in order, while the server itself goes on to answer what needs no model.
"""

from __future__ import annotations

import asyncio
import time
from collections import OrderedDict
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol, TypeVar

from tempme_vl.data.splits import Video
from tempme_vl.search.hits import Hit, Hits
from tempme_vl.search.web.interface import Fine, Index, Query

if TYPE_CHECKING:
    from tempme_vl.search.locate import Location

T = TypeVar("T")
WAITING = 256  # requests; more are refused
KEPT = 64  # answers
Times = dict[str, float]


class Busy(RuntimeError):
    """More requests wait than may."""


class Asker(Protocol):
    """Answers questions about videos, as `tempme_vl.pipeline.VideoQA` does."""

    def best_answers(
        self, videos: Sequence[str | Path | Video], questions: Sequence[str]
    ) -> Sequence[Sequence[ScoredText]]:
        """The best answers to each question."""


class ScoredText(Protocol):
    """An answer and its score."""

    @property
    def text(self) -> str:
        """In words."""

    @property
    def score(self) -> float:
        """0 to 1."""


@dataclass(frozen=True)
class Search:
    """A query and how it is searched for; `key` names the query, which itself may be a picture."""

    key: str
    k: int
    where: str | None
    fine: Fine


class Engine:
    """Runs an index, and a question answering model if there is one.

    Args:
        asker: None: questions are not answered.
    """

    def __init__(self, index: Index, asker: Asker | None = None) -> None:
        self.index, self.asker = index, asker
        self._thread = ThreadPoolExecutor(1, "tempme_vl-model")
        self._waiting = 0
        self._kept: OrderedDict[tuple[int, Search], Hits] = OrderedDict()

    async def search(self, query: Query, how: Search) -> tuple[Hits, Times, bool]:
        """The hits, the times of each stage, and whether both were kept from before.

        The last searches are kept, since a page asks again when one of its hits is opened.

        Raises:
            ValueError: see `SearchIndex.search`.
            Busy: too many requests.
        """

        def work() -> tuple[Hits, bool]:
            key = self.index.version, how
            if kept := key in self._kept:
                self._kept.move_to_end(key)
            else:
                self._kept[key] = self.index.search(query, how.k, how.where, how.fine)
                while len(self._kept) > KEPT:
                    self._kept.popitem(last=False)
            return self._kept[key], kept

        (hits, kept), times = await self._run(work)
        return hits, times | {name: 1e3 * seconds for name, seconds in hits.seconds.items()}, kept

    async def locate(self, query: Query, hit: Hit, top: int) -> tuple[Location, Times]:
        """Where the nearest tokens of a segment come from; raises as `search`."""
        return await self._run(lambda: self.index.locate(query, hit, top), "locate")

    async def ask(self, question: str, videos: Sequence[Video]) -> tuple[list[ScoredText], Times]:
        """The best answer about each of the videos; raises VideoError too."""
        asker = self.asker
        assert asker is not None
        answers, times = await self._run(lambda: asker.best_answers(videos, [question] * len(videos)), "answering")
        return [best for best, *_ in answers], times

    def close(self) -> None:
        """Ends the thread; what waits is not answered."""
        self._thread.shutdown(wait=True, cancel_futures=True)

    async def _run(self, work: Callable[[], T], stage: str = "") -> tuple[T, Times]:
        if self._waiting >= WAITING:
            raise Busy(f"{WAITING} requests wait already; try again later")
        self._waiting += 1
        came = time.perf_counter()

        def timed() -> tuple[T, Times]:
            begun = time.perf_counter()
            done = work()
            times = {"waiting": 1e3 * (begun - came)}
            return done, times | ({stage: 1e3 * (time.perf_counter() - begun)} if stage else {})

        try:
            return await asyncio.get_running_loop().run_in_executor(self._thread, timed)
        finally:
            self._waiting -= 1
