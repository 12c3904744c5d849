"""Reading some frames of a video file: exact, with a time limit, and with an error that names the file."""

from __future__ import annotations

import os
import stat
import time
from collections.abc import Iterator, Mapping
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from tempme_vl.data import decoder
from tempme_vl.data.decoder_process import DecoderProcess, DecoderTimeout
from tempme_vl.data.opened import Kept
from tempme_vl.data.pictures import DecodeError, Fit, TooLarge
from tempme_vl.data.sampling import SAMPLING
from tempme_vl.data.seeking import Listed

BACKENDS = {"auto": ("pyav", "decord"), "decord": ("decord",), "pyav": ("pyav",)}

_decoder_process = DecoderProcess()


class VideoError(ValueError):
    """A video cannot be read. `path` is the file, `cause` says why.

    `cause` may be left out because DataLoader rebuilds a worker's exception from its message alone.
    """

    def __init__(self, path: str | Path, cause: str = "") -> None:
        super().__init__(path, cause)
        self.path = Path(path)
        self.cause = cause

    def __str__(self) -> str:
        return f"{self.args[0]}: {self.cause}" if self.cause else str(self.args[0])


@dataclass(frozen=True)
class Frames:
    """Decoded frames of one video."""

    pixels: np.ndarray  # (F, H, W, 3) uint8 RGB
    indices: np.ndarray  # (F,) int64, sorted: positions in the whole file, in presentation order
    times: np.ndarray  # (F,) float64, sorted: seconds after the file's first frame, from its timestamps
    fps: float  # average raw frames a second
    backend: str  # "decord" or "pyav"


def read_frames(
    path: str | Path,
    num_frames: int,
    *,
    sampling: str = "fps1",
    start: float | None = None,
    end: float | None = None,
    backend: str = "auto",
    timeout: float | None = None,
    memory_gib: float | None = 2.0,
    fit: Fit | None = None,
    rng: np.random.Generator | None = None,
) -> Frames:
    """Reads `num_frames` frames of a video file, exactly those that `sampling` chooses.

    Args:
        sampling: a name in `sampling.SAMPLING`; `rng` selects its random variant, where it has one.
        start, end: seconds after the first frame; only frames shown in [start, end) are sampled. An interval
            between two frames yields the frame shown at its start.
        backend: "pyav" (the newest FFmpeg, reads most formats), "decord" (an FFmpeg of 2018: not for files of
            strangers) or "auto": PyAV, then decord. The frames are the same, bit for bit. Files that decord is known
            to read inexactly are not given to it.
        timeout: seconds after which decoding is stopped. It then runs in a child process that can be killed;
            under "auto" PyAV gets half of the time, so that decord can still answer when PyAV hangs.
        memory_gib: GiB that reading the video may take; None: no limit. With a `timeout` the child process cannot
            grow by more; without, larger frames are refused by their size.
        fit: the size that frames are brought to while they are read (`Preprocess.fit`); None: as they are.

    Of several video streams the one that FFmpeg calls best is read, usually the default one. Rotation by multiples
    of 90 degrees is applied; alpha and the sample aspect ratio are ignored. Short videos repeat frames.

    Raises:
        VideoError: the file is missing, no regular file, broken, too short, too slow or too large.
        ValueError: an argument is wrong.
    """
    _check_arguments(num_frames, sampling, start, end, backend, timeout, memory_gib)
    reading = open_file(path, backend, memory_gib, fit, limited=timeout is not None)
    deadline = None if timeout is None else time.monotonic() + timeout

    def read(exact: bool) -> Frames:
        listing = reading.listing(exact, deadline)
        return reading.frames(listing, listing.sample(num_frames, sampling, start, end, rng), deadline)

    with closing(reading), errors_of(path, timeout):
        try:
            return read(exact=False)
        except decoder.ShortStream:
            # Some packets hold no frame of their own (field pictures, hidden references, a header that promises
            # a little too much): count the frames by decoding them.
            return read(exact=True)


@dataclass(frozen=True)
class Listing:
    """The frames of a file in the order they are shown, found without decoding them unless it says `exact`.

    Attributes:
        fps: average raw frames a second.
        doubts: why a backend could give other pixels than PyAV, by its name; "": it does not.
    """

    frames: Listed
    fps: float
    doubts: Mapping[str, str]

    @property
    def duration(self) -> float:
        """Seconds until the last frame has been shown."""
        return float(self.frames.times[-1]) + 1 / self.fps

    def sample(
        self,
        num_frames: int,
        sampling: str,
        start: float | None = None,
        end: float | None = None,
        rng: np.random.Generator | None = None,
    ) -> np.ndarray:
        """(num_frames,) int64, sorted: the frames that `sampling` chooses among those shown in [start, end) seconds.

        Raises:
            DecodeError: the file ends before `start`.
        """
        first, last = _frame_range(self.frames.times, self.fps, start, end)
        return first + SAMPLING[sampling](last - first, self.fps, num_frames, rng)


@dataclass(frozen=True)
class FileReading:
    """A file, and how its frames are read, to be closed. Deadlines are monotonic seconds; None: none, and in this
    process.

    Attributes:
        path: absolute.
        memory: bytes that reading may take.
        process: the decoder that is asked where there is a deadline.
        kept: where there is none, what listing has read and decoding need not read again.
    """

    path: str
    backends: tuple[str, ...]
    memory: int | None
    fit: Fit | None
    process: DecoderProcess
    kept: Kept

    def close(self) -> None:
        self.kept.release()

    def listing(self, exact: bool, deadline: float | None) -> Listing:
        """Raises DecodeError."""
        info, rows = self._call("index", deadline, exact=exact)
        return Listing(Listed(*rows), info["fps"], {"decord": info["decord_doubt"]})

    def frames(self, listing: Listing, indices: np.ndarray, deadline: float | None) -> Frames:
        """The frames at sorted indices, which may repeat. Raises DecodeError."""
        chosen = indices.tolist()
        arguments: dict[str, Any] = {"indices": chosen, "places": listing.frames.places(list(dict.fromkeys(chosen)))}
        arguments |= {"num_raw": len(listing.frames.times), "fit": self.fit}
        used, pixels = self._decode(listing.doubts, deadline, arguments)
        return Frames(pixels, indices, listing.frames.times[indices], listing.fps, used)

    def _decode(
        self, doubts: Mapping[str, str], deadline: float | None, arguments: dict[str, Any]
    ) -> tuple[str, np.ndarray]:
        """The name of the first backend that succeeds, and its pixels. The last one's error names all causes."""
        causes: list[str] = []
        for backend in self.backends:
            last = backend == self.backends[-1]
            share = deadline if deadline is None or last else (time.monotonic() + deadline) / 2
            try:
                if doubts.get(backend):
                    raise DecodeError(f"not exact, since {doubts[backend]}")
                return backend, self._call("frames", share, backend=backend, **arguments)[1]
            except (TooLarge, decoder.ShortStream):
                raise  # not this backend's fault
            except DecodeError as error:
                causes.append(f"{backend}: {error}")
                if last:
                    raise type(error)("; ".join(causes)) from error
        raise AssertionError("no backend")

    def _call(self, name: str, deadline: float | None, **arguments: Any) -> decoder.Answer:
        """One handler of decoder.py, in this process or, with a deadline, in the decoder's."""
        arguments |= {"path": self.path, "memory": self.memory}
        if deadline is None:
            return decoder.HANDLERS[name](**arguments, kept=self.kept)
        return self.process.call(name, max(deadline - time.monotonic(), 0.001), **arguments)


def open_file(
    path: str | Path,
    backend: str,
    memory_gib: float | None,
    fit: Fit | None,
    limited: bool,
    process: DecoderProcess | None = None,
) -> FileReading:
    """What reads a regular file; other arguments as in `read_frames`.

    Args:
        limited: there will be deadlines: starts the decoder before the clock, since a fresh interpreter's imports are
            not the video's fault.
        process: the decoder to ask; default: this process' own.

    Raises:
        VideoError: there is no such file, or the decoder does not start.
    """
    _check_file(path)
    process = process or _decoder_process
    if limited:
        with errors_of(path):
            process.start()
    memory = None if memory_gib is None else int(memory_gib * 2**30)
    # absolute: FFmpeg takes what stands before a colon for a protocol
    return FileReading(os.path.abspath(path), BACKENDS[backend], memory, fit, process, Kept())


@contextmanager
def errors_of(path: str | Path, timeout: float | None = None) -> Iterator[None]:
    """Makes what goes wrong in decoding a VideoError of this file.

    Args:
        timeout: the limit that is named.
    """
    try:
        yield
    except DecoderTimeout as error:
        raise VideoError(path, f"decoding did not finish within {timeout:g} s") from error
    except DecodeError as error:
        raise VideoError(path, str(error)) from error


def _check_file(path: str | Path) -> None:
    """VideoError where there is no regular file: opening a pipe would wait for ever, and FFmpeg opens addresses."""
    kinds = {stat.S_IFDIR: "a folder", stat.S_IFIFO: "a named pipe", stat.S_IFSOCK: "a socket"}
    try:
        kind = stat.S_IFMT(os.stat(path).st_mode)
    except (OSError, ValueError) as error:
        hint = "; download it first" if "://" in str(path) else ""
        raise VideoError(path, (getattr(error, "strerror", None) or str(error)) + hint) from error
    if kind != stat.S_IFREG:
        raise VideoError(path, f"expected a video file; it is {kinds.get(kind, 'a device')}")


def _frame_range(times: np.ndarray, fps: float, start: float | None, end: float | None) -> tuple[int, int]:
    """First and one past the last of the frames shown in [start, end) seconds."""
    if start is not None and start >= times[-1] + 1 / fps:
        raise DecodeError(f"start {start:g} s lies behind its last frame, shown at {times[-1]:g} s")
    tolerance = 1e-6  # timestamps are multiples of a time base and seldom exact decimals
    first = 0 if start is None else int(np.searchsorted(times, start - tolerance))
    last = len(times) if end is None else int(np.searchsorted(times, end - tolerance))
    if last <= first:
        first = max(first - 1, 0)
        last = first + 1
    return first, last


def _check_arguments(
    num_frames: int,
    sampling: str,
    start: float | None,
    end: float | None,
    backend: str,
    timeout: float | None,
    memory_gib: float | None,
) -> None:
    if num_frames < 1:
        raise ValueError(f"num_frames must be at least 1; got {num_frames}")
    if sampling not in SAMPLING:
        raise ValueError(f"unknown sampling {sampling!r}; known: {', '.join(SAMPLING)}")
    if backend not in BACKENDS:
        raise ValueError(f"unknown backend {backend!r}; known: {', '.join(BACKENDS)}")
    if timeout is not None and timeout <= 0:
        raise ValueError(f"timeout must be a positive number of seconds, or None; got {timeout}")
    if memory_gib is not None and memory_gib <= 0:
        raise ValueError(f"memory_gib must be a positive number of GiB, or None; got {memory_gib}")
    begin = 0.0 if start is None else start
    if begin < 0 or (end is not None and end <= begin):
        raise ValueError(f"expected 0 <= start < end in seconds; got start={start}, end={end}")
