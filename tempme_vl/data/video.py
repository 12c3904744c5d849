"""Reading some frames of a video file: exact, with a time limit, and with an error that names the file."""

from __future__ import annotations

import os
import stat
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from tempme_vl.data import decoder
from tempme_vl.data.decoder_process import DecoderProcess, DecoderTimeout
from tempme_vl.data.pictures import DecodeError, Fit, TooLarge, check_memory
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
    _check_file(path)
    deadline = None
    if timeout is not None:
        _start_decoder(path)
        deadline = time.monotonic() + timeout

    memory = None if memory_gib is None else int(memory_gib * 2**30)
    # absolute: FFmpeg takes what stands before a colon for a protocol
    common = {"path": os.path.abspath(path), "memory": memory}

    def read(exact: bool) -> Frames:
        info, rows = _call("index", deadline, exact=exact, **common)
        listed = Listed(*rows)
        times = listed.times
        first, last = _frame_range(times, info["fps"], start, end)
        indices = first + SAMPLING[sampling](last - first, info["fps"], num_frames, rng)
        unique, inverse = np.unique(indices, return_inverse=True)
        doubts = {"decord": info["decord_doubt"]}
        wanted = unique.tolist()
        arguments = {"indices": wanted, "places": listed.places(wanted)}
        arguments |= {"num_raw": len(times), "fit": fit, **common}
        used, pixels = _decode(BACKENDS[backend], doubts, deadline, arguments)
        if len(unique) < num_frames:
            check_memory(0, 0, num_frames * pixels[0].nbytes, memory)
            pixels = pixels[inverse]
        return Frames(pixels, indices, times[indices], info["fps"], used)

    try:
        try:
            return read(exact=False)
        except decoder.ShortStream:
            # Some packets hold no frame of their own (field pictures, hidden references, a header that promises
            # a little too much): count the frames by decoding them.
            return read(exact=True)
    except DecoderTimeout as error:
        raise VideoError(path, f"decoding did not finish within {timeout:g} s") from error
    except DecodeError as error:
        raise VideoError(path, str(error)) from error


def _decode(
    backends: tuple[str, ...], doubts: dict[str, str], deadline: float | None, arguments: dict[str, Any]
) -> tuple[str, np.ndarray]:
    """The name of the first backend that succeeds, and its pixels. The last one's error names all causes."""
    causes: list[str] = []
    for backend in backends:
        last = backend == backends[-1]
        share = deadline if deadline is None or last else (time.monotonic() + deadline) / 2
        try:
            if doubts.get(backend):
                raise DecodeError(f"not exact, since {doubts[backend]}")
            return backend, _call("frames", share, backend=backend, **arguments)[1]
        except (TooLarge, decoder.ShortStream):
            raise  # not this backend's fault
        except DecodeError as error:
            causes.append(f"{backend}: {error}")
            if last:
                raise type(error)("; ".join(causes)) from error
    raise AssertionError("no backend")


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


def _start_decoder(path: str | Path) -> None:
    """Before the clock starts: a fresh interpreter's imports are not the video's fault."""
    try:
        _decoder_process.start()
    except DecodeError as error:
        raise VideoError(path, str(error)) from error


def _call(name: str, deadline: float | None, **arguments: Any) -> decoder.Answer:
    """One handler of decoder.py, in this process or, with a deadline (monotonic seconds), in the decoder's."""
    if deadline is None:
        return decoder.HANDLERS[name](**arguments)
    return _decoder_process.call(name, max(deadline - time.monotonic(), 0.001), **arguments)


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
