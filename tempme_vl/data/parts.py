"""Reading many parts of one video file: its frames are listed once, and a frame that parts share is decoded once."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple, TypeAlias

import numpy as np

from tempme_vl.data.decoder import ShortStream
from tempme_vl.data.decoder_process import DecoderProcess
from tempme_vl.data.pictures import Fit
from tempme_vl.data.video import FileReading, Frames, Listing, errors_of, open_file

PARTS_AT_ONCE = 16  # whose frames are in memory together
LIMITED_SECONDS = 600.0  # of a file, that the decoder's limit is for


class Part(NamedTuple):
    """Seconds after a file's first frame, [start, end)."""

    start: float
    end: float


Plan: TypeAlias = Callable[[float], Sequence[Part]]
"""(a file's duration in seconds) -> its parts, at least one, by their start."""


class FrameParts(NamedTuple):
    """Some parts of a file, with the frames of each.

    Attributes:
        duration: of the file, in seconds.
        last: none follow.
    """

    parts: tuple[Part, ...]
    frames: tuple[Frames, ...]
    duration: float
    last: bool


def read_parts(
    path: str | Path,
    num_frames: int,
    plan: Plan,
    *,
    sampling: str = "fps1",
    timeout: float | None = 60.0,
    memory_gib: float | None = 2.0,
    fit: Fit | None = None,
    process: DecoderProcess | None = None,
) -> Iterator[FrameParts]:
    """The frames of a file's parts, `PARTS_AT_ONCE` at a time.

    Args:
        num_frames: of each part.
        plan: which parts.
        timeout: seconds that decoding may take for each ten minutes from the file's start to the part's end, since
            some files can only be decoded from their start. None: no limit, and in this process.
        process: the decoder, for a thread that has its own; default: this process' one.
        others: see `tempme_vl.data.video.read_frames`.

    Raises:
        VideoError: as `read_frames`, also after some parts have come.
    """
    with closing(open_file(path, "auto", memory_gib, fit, timeout is not None, process)) as reading:
        with errors_of(path, timeout):
            listing = reading.listing(False, _deadline(timeout))
        parts, done = list(plan(listing.duration)), 0
        while done < len(parts):
            some = parts[done : done + PARTS_AT_ONCE]
            limit = None if timeout is None else timeout * max(1, math.ceil(some[-1].end / LIMITED_SECONDS))
            deadline = _deadline(limit)
            with errors_of(path, limit):
                try:
                    frames = _frames(reading, listing, some, (num_frames, sampling), deadline)
                except ShortStream:  # see `read_frames`; what came before was checked by its timestamps and stays
                    listing = reading.listing(True, deadline)
                    parts = parts[:done] + _within(parts[done:], listing.duration)
                    some = parts[done : done + PARTS_AT_ONCE]
                    frames = _frames(reading, listing, some, (num_frames, sampling), deadline)
            done += len(some)
            yield FrameParts(tuple(some), frames, listing.duration, done >= len(parts))


def _frames(
    reading: FileReading, listing: Listing, parts: Sequence[Part], choice: tuple[int, str], deadline: float | None
) -> tuple[Frames, ...]:
    """Those of each part, of which there may be none; `choice`: how many, and by which sampling."""
    if not parts:
        return ()
    wanted = [listing.sample(*choice, part.start, part.end) for part in parts]
    read = reading.frames(listing, np.unique(np.concatenate(wanted)), deadline)
    places = [np.searchsorted(read.indices, indices) for indices in wanted]
    return tuple(replace(read, pixels=read.pixels[at], indices=read.indices[at], times=read.times[at]) for at in places)


def _within(parts: Sequence[Part], duration: float) -> list[Part]:
    """Parts of a file that turns out to be shorter; one that begins behind its end is left out."""
    least = 1e-6  # seconds; times of both listings differ by rounding
    return [Part(part.start, min(part.end, duration)) for part in parts if part.start < duration - least]


def _deadline(seconds: float | None) -> float | None:
    return None if seconds is None else time.monotonic() + seconds
