"""From decoded segments to rows: batches of segments for the model, and whole files for the store."""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch

from tempme_vl.data.parts import Part
from tempme_vl.data.video import Frames
from tempme_vl.search.decoding import Decoded
from tempme_vl.search.embed import Embedded, Embedder
from tempme_vl.search.files import VideoFile
from tempme_vl.search.store import IndexSettings, Row, Store
from tempme_vl.search.tokens import pack_attention, pack_source, pack_tokens

COMMIT_SECONDS, COMMIT_ROWS = 5.0, 512  # what is embedded is written at the latest then, whole files at a time


@dataclass(frozen=True)
class Waiting:
    """Some segments of a file that wait for the model; `last`: no more of the file come."""

    file: VideoFile
    parts: tuple[Part, ...]
    first: int
    frames: tuple[Frames, ...]
    duration: float
    last: bool
    error: str = ""


@dataclass(frozen=True)
class Made:
    """Their rows, the first of which is segment `first`."""

    file: VideoFile
    rows: tuple[Row, ...]
    first: int
    last: bool
    error: str = ""


@dataclass
class Writing:
    """Rows on their way: those of a file wait until all are there, and are written with others'.

    Attributes:
        replaced: paths that have rows already.
        rows: of files that are not whole yet.
        whole: of files that are, to be written.
    """

    store: Store
    replaced: set[str]
    rows: dict[str, list[Row]] = field(default_factory=dict)
    whole: list[Row] = field(default_factory=list)
    written: list[str] = field(default_factory=list)
    broken: dict[VideoFile, str] = field(default_factory=dict)
    since: float = field(default_factory=time.monotonic)

    def take(self, made: Made) -> None:
        """The next rows of a file. Of one that breaks behind its first segments nothing is kept."""
        rows = self.rows.setdefault(made.file.path, [])
        rows += made.rows
        if not made.last:
            return
        del self.rows[made.file.path]
        if made.error:
            self.broken[made.file] = made.error
            return
        self.whole += rows
        if len(self.whole) >= COMMIT_ROWS or time.monotonic() - self.since >= COMMIT_SECONDS:
            self.commit()

    def commit(self) -> None:
        """Writes the files that are whole."""
        if self.whole:
            paths = list(dict.fromkeys(row.file.path for row in self.whole))
            self.store.put(self.whole, [path for path in paths if path in self.replaced])
            self.written += paths
            self.whole = []
            self.store.tidy()
        self.since = time.monotonic()


def in_batches(decoded: Iterator[Decoded], size: int) -> Iterator[list[Waiting]]:
    """Of segments of one file or several, so many at once; what cannot be read comes along."""
    waiting: list[Waiting] = []
    for piece in in_pieces(decoded, size):
        if waiting and sum(len(other.parts) for other in waiting) + len(piece.parts) > size:
            yield waiting
            waiting = []
        waiting.append(piece)
    if waiting:
        yield waiting


def in_pieces(decoded: Iterable[Decoded], size: int) -> Iterator[Waiting]:
    """At most `size` segments of one file each; those of a file in their order."""
    numbers: dict[str, int] = {}  # of segments that have come
    for one in decoded:
        done = numbers.get(one.file.path, 0)
        if one.parts is None:
            yield Waiting(one.file, (), done, (), 0.0, True, one.error)
            continue
        parts, frames, duration, last = one.parts
        for at in range(0, max(1, len(parts)), size):
            ends = at + size >= len(parts)
            yield Waiting(one.file, parts[at : at + size], done + at, frames[at : at + size], duration, last and ends)
        numbers[one.file.path] = done + len(parts)


def make_rows(some: Sequence[Waiting], settings: IndexSettings, embedder: Embedder) -> list[Made]:
    """The rows of each."""
    frames = [frames for one in some for frames in one.frames]
    rows: Iterator[Row] = iter(())
    if frames:
        rows = _rows(some, settings, embedder.videos(torch.stack([embedder.transform(each.pixels) for each in frames])))
    return [
        Made(one.file, tuple(itertools.islice(rows, len(one.parts))), one.first, one.last, one.error) for one in some
    ]


def _rows(some: Sequence[Waiting], settings: IndexSettings, embedded: Embedded) -> Iterator[Row]:
    segments = ((one, at) for one in some for at in range(len(one.parts)))
    keeps = settings.tokens != "none"
    every = embedded.tokens if settings.fusion_width is None else embedded.fusion
    for number, (one, at) in enumerate(segments):
        tokens = b"" if every is None else pack_tokens(every[number], settings.tokens)
        attention = None if embedded.attention is None else embedded.attention[number]
        yield Row(
            file=one.file,
            segment=one.first + at,
            start=one.parts[at].start,
            end=one.parts[at].end,
            duration=one.duration,
            vector=embedded.vectors[number],
            tokens=tokens,
            source=pack_source(embedded.source[number]) if keeps else b"",
            attention=pack_attention(attention) if keeps else b"",
            times=one.frames[at].times.astype(np.float32),
        )
