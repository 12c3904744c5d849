"""Decoding by PyAV and decord, and the loop of the decoder process.

This file is also run as a script, in a process that can be killed (see `decoder_process`): so it imports only numpy,
Pillow, PyAV, what of this package needs no more, and decord when asked for; not torch. Everything goes through two
handlers: `index` (what frames are there) and `frames` (their pixels); the choice between frames is made by the caller.
"""

from __future__ import annotations

import json
import os
import queue
import re
import resource
import signal
import struct
import sys
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import IO, Any

import av
import numpy as np

from tempme_vl.data.listing import index
from tempme_vl.data.opened import Answer, Kept, open_container, typed, video_stream
from tempme_vl.data.pictures import DecodeError, Fit, Pictures, TooLarge
from tempme_vl.data.seeking import Cut, PacketsFrom, Place, Unsure, all_frames, frames_at, from_file, from_memory

# What the libraries take for themselves, whatever the video.
LIBRARIES = 64 * 2**20


class ShortStream(DecodeError):
    """Packets without a frame of their own: decoding ended without an error before the last indexed frame, or gave
    another frame in the place of one."""


def frames(
    path: str,
    indices: list[int],
    num_raw: int,
    backend: str,
    fit: Fit | None = None,
    memory: int | None = None,
    places: Sequence[Place] | None = None,
    kept: Kept | None = None,
) -> Answer:
    """Pixels of the frames at `indices` (sorted; they may repeat) in presentation order, rotated as the file asks.

    `num_raw` is what `index` counted, `places` what it says of these frames, each once, and `kept` what it left in
    memory: with it PyAV decodes no more than it must, and where the stream does not keep the promise, all from the
    start. Returns `{"backend": backend}` and (len(indices), H, W, 3) uint8 RGB; alpha and the sample aspect ratio are
    ignored. With `fit` H and W are its size, and only one picture of full size is held at a time. Raises TooLarge,
    before it decodes where the header says so, when more than `memory` bytes would be taken.
    """
    counts = Counter(indices)
    wanted = list(counts)
    assert wanted == sorted(wanted) and wanted[0] >= 0 and wanted[-1] < num_raw
    pictures = Pictures(list(counts.values()), None if fit is None else Fit(*fit), memory)
    dense = 2 * len(wanted) > wanted[-1]
    known = kept if kept is not None and kept.path == path else Kept()
    try:
        if backend == "decord":
            _decord_frames(path, wanted, num_raw, pictures)
        elif places is None or not known.in_order or not _sparse_frames(path, places, pictures, known, dense):
            promised = None if places is None else [pts for pts, _ in places]
            _pyav_frames(path, wanted, num_raw, pictures, promised, known)
    finally:
        known.release()
    assert pictures.array is not None
    return {"backend": backend}, pictures.array


def _decord_frames(path: str, indices: list[int], num_raw: int, pictures: Pictures) -> None:
    try:
        import decord
    except ImportError as error:
        raise DecodeError("decord is not installed") from error
    decord.logging.set_level(decord.logging.QUIET)
    try:
        # By default decord repeats a neighbour in place of a frame that it cannot decode: any such frame is
        # an error here. (0 would switch the check off, and the value is parsed without an exponent.)
        reader = decord.VideoReader(path, num_threads=1, fault_tol="0.000000001")
        if len(reader) != num_raw:
            raise DecodeError(f"decord counts {len(reader)} frames where {num_raw} are shown")
        # It seeks by timestamps; where it finds none (H.264 in AVI) it returns wrong frames.
        starts = reader.get_frame_timestamp(range(num_raw))[:, 0]
        if not (np.diff(starts) > 0).all():
            raise DecodeError("decord finds no usable timestamps")
        for position in indices:  # one at a time is as fast as all at once
            picture = reader.get_batch([position]).asnumpy()[0]
            pictures.check(picture.shape[1], picture.shape[0])
            pictures.append(picture)
    except DecodeError:
        raise
    except MemoryError as error:
        raise typed(error, pictures.memory) from error
    except Exception as error:  # DECORDError, RuntimeError, AssertionError, ...: all mean that it failed
        first_line = (str(error).strip() or repr(error)).splitlines()[0]
        raise DecodeError(re.sub(r"\[[\d:]+\] \S+:\d+: ", "", first_line)) from error


@contextmanager
def _ready(path: str, pictures: Pictures, known: Kept) -> Iterator[tuple[av.VideoCodecContext, PacketsFrom]]:
    """A decoder that has not begun, and where its packets come from: memory, once, else the file."""
    with ExitStack() as opened:
        if known.stream is None:
            container = opened.enter_context(open_container(path))
            stream = video_stream(container)
            packets = from_file(container, stream)
        else:
            opened.callback(known.release)
            stream = known.stream
            packets = from_memory(stream, known.packets)
        decoder = stream.codec_context
        pictures.check(decoder.width, decoder.height)
        decoder.thread_count = 1
        yield decoder, packets


def _sparse_frames(path: str, places: Sequence[Place], pictures: Pictures, known: Kept, dense: bool) -> bool:
    """Whether the stream keeps what its packets promise.

    `dense`: from the start on, since to begin anew at a key frame may be to decode some frames around it twice.
    """
    places = [Place(pts, None if cut is None or dense else Cut(*cut)) for pts, cut in places]
    try:
        with _ready(path, pictures, known) as (decoder, packets):
            decoder.options = {"err_detect": "explode"}  # no pictures in place of damaged ones
            for frame in frames_at(decoder, packets, places):
                pictures.take(frame)
                del frame  # so that its memory, which the cache holds, is the next one's
    except (Unsure, av.FFmpegError, OSError):
        pictures.clear()
        return False
    return True


def _pyav_frames(
    path: str, indices: list[int], num_raw: int, pictures: Pictures, promised: Sequence[int | None] | None, known: Kept
) -> None:
    """`promised`: when packets say that these frames are shown. A frame lost before one moves it from its place;
    frames that come in another order have the places of this order, if none is lost or added in the whole stream."""
    wanted = dict(zip(indices, [None] * len(indices) if promised is None else promised, strict=True))
    shown: list[int | None] = []
    moved = -1
    try:
        with _ready(path, pictures, known) as (decoder, packets):
            for frame in all_frames(decoder, packets):
                position = len(shown)
                shown.append(frame.pts)
                if position in wanted:
                    pictures.take(frame)
                    if frame.pts is not None and wanted[position] not in (None, frame.pts):
                        moved = position
                        if known.in_order:
                            break
                if position == indices[-1] and (moved < 0 or known.counted):
                    return
    except (av.FFmpegError, OSError) as error:
        raise typed(error, pictures.memory, f" after {len(shown)} of {num_raw} frames") from error
    if moved < 0:
        raise ShortStream(f"only {len(shown)} of {num_raw} frames can be decoded")
    known.counted = np.array_equal(np.sort(np.array(shown, np.float64)), known.times)
    if not known.counted:
        raise ShortStream(f"frame {moved} of {num_raw} is not the one that its packets promise")


# The protocol: 8 bytes of length, then JSON. An answer's JSON is followed by the bytes of its array.

Handlers = Mapping[str, Callable[..., Answer]]
HANDLERS: Handlers = {"index": index, "frames": frames}


def write_message(stream: IO[bytes], message: Any) -> None:
    data = json.dumps(message).encode()
    stream.write(struct.pack(">Q", len(data)) + data)


def read_message(stream: IO[bytes]) -> Any:
    """The next message. EOFError when the other side is gone."""
    (length,) = struct.unpack(">Q", read_exactly(stream, 8))
    return json.loads(read_exactly(stream, length))


def read_exactly(stream: IO[bytes], length: int) -> bytes:
    data = stream.read(length)
    if len(data) < length:
        raise EOFError
    return data


def read_into(stream: IO[bytes], array: np.ndarray) -> None:
    """Fills a contiguous array."""
    left = array.reshape(-1).view(np.uint8).data
    while left:
        count = stream.readinto(left)  # type: ignore[attr-defined]
        if not count:
            raise EOFError
        left = left[count:]


@contextmanager
def _limited_memory(memory: int | None) -> Iterator[None]:
    """Lets this process grow by so many bytes beside the libraries' and no more, whatever a header says.

    Only Linux counts what RLIMIT_DATA is about.
    """
    before = resource.getrlimit(resource.RLIMIT_DATA)
    if memory is not None and sys.platform == "linux":
        with open("/proc/self/statm") as file:
            now = int(file.read().split()[5]) * resource.getpagesize()
        hard, limit = before[1], now + LIBRARIES + memory
        if hard != resource.RLIM_INFINITY:
            limit = min(limit, hard)
        resource.setrlimit(resource.RLIMIT_DATA, (limit, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_DATA, before)


def serve(handlers: Handlers) -> None:
    """Answers requests from stdin on stdout until stdin closes."""
    # Launchers send SIGTERM, and terminals SIGINT, to whole process trees; this process ends with its parent, which
    # may still need it.
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # whatever a library prints must not enter the protocol
    requests: queue.SimpleQueue[dict[str, Any]] = queue.SimpleQueue()

    def receive() -> None:
        # In a thread of its own, so that this process ends with its parent even while a decoder hangs.
        try:
            while True:
                requests.put(read_message(sys.stdin.buffer))
        except EOFError:
            os._exit(0)

    threading.Thread(target=receive, daemon=True).start()
    write_message(answers, "ready")
    answers.flush()
    while True:
        request = requests.get()
        meta: dict[str, Any] = {}
        array = np.empty(0)
        memory = request["arguments"].get("memory")
        try:
            with _limited_memory(memory):
                meta, array = handlers[request["call"]](**request["arguments"])
        except DecodeError as error:
            meta = {"error": str(error), "kind": type(error).__name__}
        except MemoryError as error:
            meta = {"error": str(typed(error, memory)), "kind": TooLarge.__name__}
        except Exception as error:
            meta = {"error": repr(error), "kind": DecodeError.__name__}
        write_message(answers, {"meta": meta, "shape": array.shape, "dtype": str(array.dtype)})
        answers.write(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)
        answers.flush()


if __name__ == "__main__":
    latest = Kept()
    serve({name: partial(handler, kept=latest) for name, handler in HANDLERS.items()})
