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
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import IO, Any

import av
import numpy as np

from tempme_vl.data.packets import Units
from tempme_vl.data.pictures import DecodeError, Fit, Pictures, TooLarge, check_memory
from tempme_vl.data.seeking import Cut, Listed, Place, Unsure, frames_at

# Real files promise some frames more than they hold (a header rounded up, a dropped last group of B frames).
# Up to this share, or one frame, is taken as it is; a larger loss is damage.
MISSING_FRAMES_ALLOWED = 0.05

# What the libraries take for themselves, whatever the video.
LIBRARIES = 64 * 2**20

# Titles and the like that are not UTF-8 are no reason to refuse a video; from PyAV 19 on they never are.
_LENIENT: dict[str, Any] = {"metadata_errors": "ignore"} if int(av.__version__.partition(".")[0]) < 19 else {}
# What a handler returns: some JSON and an array.
Answer = tuple[dict[str, Any], np.ndarray]


class ShortStream(DecodeError):
    """Packets without a frame of their own: decoding ended without an error before the last indexed frame, or gave
    another frame in the place of one."""


def index(path: str, exact: bool = False, memory: int | None = None) -> Answer:
    """Lists the frames of a file by its packets, without decoding them, or with `exact` by decoding them.

    Returns `{"fps": float, "decord_doubt": str}` and the rows of a `Listed`, (4, n) float64. `decord_doubt` says why
    decord could return other pixels than PyAV ("": it does not). The stream is the one that FFmpeg calls best.

    `memory`: bytes that may be taken; raises TooLarge for a header that speaks of frames beyond it.
    """
    shown: list[tuple[int | None, int | None, bool]] = []  # pts, dts, whether it is a cut
    found = 0
    try:
        with av.open(path, **_LENIENT) as container:
            stream = _video_stream(container)
            codec = stream.codec_context
            check_memory(codec.width, codec.height, 0, memory)
            promised = _promised_frames(stream)
            fps = float(stream.average_rate or stream.guessed_rate or 0)
            step = float(stream.time_base or 0)
            if exact:
                codec.thread_count = 1
                shown = [(frame.pts, None, False) for frame in container.decode(stream)]
                found, doubt = len(shown), "its packets are not its frames"
            else:
                doubt = _stream_doubt(container, codec)
                latest_key = None
                units = Units.of(codec.name, codec.extradata or b"")
                for packet in container.demux(stream):  # not kept: together they are as large as the file
                    if not packet.size:
                        continue
                    found += 1
                    if found == 1 and not packet.is_keyframe:  # what refers to a picture before it gives no frame
                        return index(path, True, memory)
                    # Discarded packets lie before an edit list's start: decoded, but never shown.
                    if not packet.is_discard:
                        cut = packet.is_keyframe and found > 1 and units.is_cut(memoryview(packet))
                        shown.append((packet.pts, packet.dts, cut))
                    if packet.is_keyframe or found == 1:
                        latest_key = packet.pts
                    doubt = doubt or _packet_doubt(units, packet, latest_key)
    except (av.FFmpegError, OSError) as error:
        raise _typed(error, memory) from error
    if not shown:
        raise DecodeError("no frame in its video stream")
    if promised - found > max(1, MISSING_FRAMES_ALLOWED * promised):
        raise DecodeError(f"only {found} of the {promised} frames that its header promises are there")
    listed = _listed(shown, step, fps)
    if exact:
        listed = listed._replace(cuts=np.full(len(shown), np.nan))
    if fps <= 0:
        fps = (len(shown) - 1) / listed.times[-1] if len(shown) > 1 else 1.0
    return {"fps": fps, "decord_doubt": doubt}, np.stack(listed)


def _promised_frames(stream: Any) -> int:
    """The header's frame count; less where an edit list shortens the stream; 0 where there is no count."""
    if not stream.duration or not stream.average_rate:
        return stream.frames
    return min(stream.frames, int(stream.duration * stream.time_base * stream.average_rate))


def _stream_doubt(container: Any, codec: Any) -> str:
    """Found by comparing thousands of frames: what passes here and below comes out of both alike, bit for bit."""
    if codec.pix_fmt in ("yuv420p", "yuvj420p"):
        # swscale's exact converter needs an even height, and rotation may make it the width.
        if codec.width % 2 or codec.height % 2:
            return "it is 4:2:0 of an odd size"
    elif codec.pix_fmt not in ("yuv444p", "yuvj444p", "gray"):
        return f"its pixel format is {codec.pix_fmt}"
    if len(container.streams.video) > 1:
        return "it holds several video streams, of which decord may choose another"
    # The rest is about seeking: decord takes a key frame's place in the file for its place in time, and loses
    # frames at the end of streams that it cannot cut there.
    if not {"mov", "matroska", "avi"} & set(container.format.name.split(",")):
        return f"its container is {container.format.name}"
    return ""


def _packet_doubt(units: Units, packet: av.Packet, latest_key: int | None) -> str:
    """`latest_key`: when the last key frame up to this packet is shown."""
    if packet.pts is None or latest_key is None:
        return "it lacks timestamps"
    if packet.is_discard:
        return "an edit list hides frames, which decord counts"
    # H.264 and HEVC have key frames that are no clean cut, and units without lengths are not decord's
    clean = units.codec not in ("h264", "hevc") or (units.length_size > 0 and units.is_idr(memoryview(packet)))
    if packet.is_keyframe and not clean:
        return "it has key frames which later frames reach across"
    if packet.pts < latest_key:
        return "frames are shown before the key frame that they follow"
    return ""


def frames(
    path: str,
    indices: list[int],
    num_raw: int,
    backend: str,
    fit: Fit | None = None,
    memory: int | None = None,
    places: Sequence[Place] | None = None,
) -> Answer:
    """Pixels of the frames at `indices` (sorted, unique) in presentation order, rotated as the file asks.

    `num_raw` is what `index` counted, and `places` what it says of these frames: with it PyAV decodes no more than it
    must, unless half are wanted, and where the stream does not keep the promise, all from the start. Returns
    `{"backend": backend}` and (len(indices), H, W, 3) uint8 RGB; alpha and the sample aspect ratio are ignored. With
    `fit` H and W are its size, and only one picture of full size is held at a time. Raises TooLarge, before it decodes
    where the header says so, when more than `memory` bytes would be taken.
    """
    assert indices == sorted(set(indices)) and indices[0] >= 0 and indices[-1] < num_raw
    pictures = Pictures(len(indices), None if fit is None else Fit(*fit), memory)
    if backend == "decord":
        _decord_frames(path, indices, num_raw, pictures)
    elif places is None or 2 * len(indices) > indices[-1] or not _sparse_frames(path, places, pictures):
        _pyav_frames(path, indices, num_raw, pictures, None if places is None else [pts for pts, _ in places])
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
        raise _typed(error, pictures.memory) from error
    except Exception as error:  # DECORDError, RuntimeError, AssertionError, ...: all mean that it failed
        first_line = (str(error).strip() or repr(error)).splitlines()[0]
        raise DecodeError(re.sub(r"\[[\d:]+\] \S+:\d+: ", "", first_line)) from error


def _sparse_frames(path: str, places: Sequence[Place], pictures: Pictures) -> bool:
    """Whether the stream keeps what its packets promise."""
    places = [Place(pts, None if cut is None else Cut(*cut)) for pts, cut in places]
    try:
        with av.open(path, **_LENIENT) as container:
            stream = _video_stream(container)
            pictures.check(stream.codec_context.width, stream.codec_context.height)
            stream.codec_context.thread_count = 1
            stream.codec_context.options = {"err_detect": "explode"}  # no pictures in place of damaged ones
            for frame in frames_at(container, stream, places):
                pictures.take(frame)
    except (Unsure, av.FFmpegError, OSError):
        pictures.clear()
        return False
    return True


def _pyav_frames(
    path: str, indices: list[int], num_raw: int, pictures: Pictures, promised: Sequence[int | None] | None = None
) -> None:
    """`promised`: when packets say that these frames are shown. A frame lost before one moves it from its place."""
    wanted = dict(zip(indices, promised or [None] * len(indices), strict=True))
    position = -1
    try:
        with av.open(path, **_LENIENT) as container:
            stream = _video_stream(container)
            pictures.check(stream.codec_context.width, stream.codec_context.height)
            stream.codec_context.thread_count = 1
            for position, frame in enumerate(container.decode(stream)):
                if position in wanted:
                    if frame.pts is not None and wanted[position] not in (None, frame.pts):
                        raise ShortStream(f"frame {position} of {num_raw} is not the one that its packets promise")
                    pictures.take(frame)
                if position == indices[-1]:
                    return
    except (av.FFmpegError, OSError) as error:
        raise _typed(error, pictures.memory, f" after {position + 1} of {num_raw} frames") from error
    raise ShortStream(f"only {position + 1} of {num_raw} frames can be decoded")


def _video_stream(container: Any) -> Any:
    stream = container.streams.best("video")
    if stream is None:
        raise DecodeError("no video stream in it")
    if stream.codec_context is None:
        raise DecodeError("no decoder for the codec of its video stream")
    return stream


def _listed(shown: list[tuple[int | None, int | None, bool]], step: float, fps: float) -> Listed:
    """From timestamps where all are there and differ; else times are those of the frame rate, and nothing is known of
    places."""
    stamps = [(pts, pts if dts is None else dts, cut) for pts, dts, cut in shown if pts is not None]
    if step <= 0 or len({pts for pts, _, _ in stamps}) < len(shown):
        unknown = np.full((3, len(shown)), np.nan)
        return Listed(np.arange(len(shown)) / (fps if fps > 0 else 1.0), *unknown)
    pts, dts, cut = np.array(sorted(stamps), np.float64).T
    cuts = np.maximum.accumulate(np.where(cut, np.arange(len(cut)), -1.0))
    return Listed((pts - pts[0]) * step, pts, dts, cuts)


def _typed(error: Exception, memory: int | None, where: str = "") -> DecodeError:
    """The error of a library with its cause alone; its message may hold the path."""
    if isinstance(error, MemoryError) and memory is not None:
        return TooLarge(f"it takes more than the {memory / 2**30:.3g} GiB of memory that are allowed")
    return DecodeError((getattr(error, "strerror", None) or str(error) or repr(error)) + where)


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


def serve(handlers: Handlers = HANDLERS) -> None:
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
            meta = {"error": str(_typed(error, memory)), "kind": TooLarge.__name__}
        except Exception as error:
            meta = {"error": repr(error), "kind": DecodeError.__name__}
        write_message(answers, {"meta": meta, "shape": array.shape, "dtype": str(array.dtype)})
        answers.write(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)
        answers.flush()


if __name__ == "__main__":
    serve()
