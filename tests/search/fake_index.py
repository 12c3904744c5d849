"""A small folder of videos and an index of it without a model: scores are told by the words of a query."""

from __future__ import annotations

import threading
import time
import zlib
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from PIL import Image

from tempme_vl.data.rendered import write_video
from tempme_vl.search.hits import Hit, Hits
from tempme_vl.search.locate import Location

WIDTH, HEIGHT, SECONDS = 96, 64, 6  # at 8 frames a second
COLORS = {"red.mp4": (220, 30, 30), "more/green leaf.mp4": (30, 180, 40), "more/blue.mp4": (40, 60, 220)}


def write_videos(root: Path) -> None:
    """One colour a file, and white from its fourth second on."""
    for name, color in COLORS.items():
        frames = np.full((8 * SECONDS, HEIGHT, WIDTH, 3), color, np.uint8)
        frames[8 * 4 :] = 255
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        write_video(root / name, frames)


@dataclass
class FakeIndex:
    """As `tempme_vl.search.web.interface.Index` has it. A segment every two seconds.

    Attributes:
        more: paths that are listed besides.
        running: requests that are in it at the moment, `most` at any.
    """

    root: Path
    more: tuple[str, ...] = ()
    has_tokens: bool = True
    has_fusion: bool = False
    version: int = 1
    searched: list[object] = field(default_factory=list)
    running: int = 0
    most: int = 0
    lock: threading.Lock = field(default_factory=threading.Lock)

    @property
    def paths(self) -> tuple[str, ...]:
        return (*sorted(COLORS), *self.more)

    def facts(self) -> dict[str, str | int | float]:
        return {"segments": 9, "model": "a/model"}

    def search(self, query: object, k: int, where: str | None, fine: str) -> Hits:
        with self.lock:
            self.running += 1
            self.most = max(self.most, self.running)
        time.sleep(0.002)
        self.searched.append(query)
        try:
            return self._search(query, k, where, fine)
        finally:
            with self.lock:
                self.running -= 1

    def _search(self, query: object, k: int, where: str | None, fine: str) -> Hits:
        if where is not None and not where.startswith("path"):
            raise ValueError(f"the filter {where!r} cannot be used")
        name = query if isinstance(query, str) else _color(query) if isinstance(query, Image.Image) else "a video"
        hits = [
            Hit(path, start, start + 2, _score(name, path, start), 0.1, int(start // 2), float(SECONDS), 1000)
            for path in sorted(COLORS)
            for start in (0.0, 2.0, 4.0)
            if where is None or path in where
        ]
        seconds = {"embed": 0.02, "coarse": 0.003} | ({"fine": 0.01} if fine != "none" else {})
        return Hits(sorted(hits, key=lambda hit: -hit.score)[:k], seconds)

    def locate(self, query: object, hit: Hit, top: int) -> Location:
        """The upper left patch of the first frame of two, and with more than one token its lower right one."""
        patches = np.zeros((top, 2, 4, 4), bool)
        patches[0, 0, 0, 0] = True
        patches[1:, 0, 3, 3] = True
        scores = np.linspace(0.9, 0.5, top).astype(np.float32)
        times = np.array([hit.segment * 2, hit.segment * 2 + 1], np.float32)
        return Location(np.arange(top), scores, times, patches.any(axis=(2, 3)), patches, "shortest")


@dataclass(frozen=True)
class Said:
    """An answer and its score."""

    text: str
    score: float


class FakeQA:
    """Says which part of which file it was asked about."""

    def best_answers(self, videos, questions):
        pairs = zip(videos, questions, strict=True)
        return [[Said(f"{q} {video.path.name} {video.start:g} {video.end:g}", 0.75)] for video, q in pairs]


def _score(name: str, path: str, start: float) -> float:
    best = any(color in path for color in name.split())
    return round((0.5 if best else 0.0) + zlib.crc32(f"{name} {path} {start}".encode()) % 1000 / 4000, 4)


def _color(image: Image.Image) -> str:
    """The name of the strongest channel."""
    return ("red", "green", "blue")[int(np.asarray(image).reshape(-1, 3).mean(0).argmax())]
