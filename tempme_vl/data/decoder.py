"""Decoding by PyAV and decord, and the loop of the decoder process.

This file is also run as a script, in a process that can be killed (see `decoder_process`): so it imports only
numpy, PyAV and, when asked for, decord; neither torch nor this package. Everything goes through two handlers:
`index` (what frames are there) and `frames` (their pixels); the choice between frames is made by the caller.
"""

from __future__ import annotations

import json
import os
import queue
import re
import signal
import struct
import sys
import threading
from collections.abc import Callable, Mapping
from typing import IO, Any

import av
import numpy as np
from av.filter import Graph

# Real files promise some frames more than they hold (a header rounded up, a dropped last group of B frames).
# Up to this share, or one frame, is taken as it is; a larger loss is damage.
MISSING_FRAMES_ALLOWED = 0.05


# What a handler returns: some JSON and an array.
Answer = tuple[dict[str, Any], np.ndarray]


class DecodeError(Exception):
    """A video cannot be decoded; the message is the cause, without the path."""


class ShortStream(DecodeError):
    """Decoding ended without an error before the last indexed frame."""


def index(path: str, exact: bool = False) -> Answer:
    """Lists the frames of a file by its packets, without decoding them, or with `exact` by decoding them.

    Returns `{"fps": float, "decord_doubt": str}` and the presentation time of each frame, (n,) float64 in seconds
    after the first one, increasing. `decord_doubt` says why decord could return other pixels than PyAV ("": it
    does not). The stream is the one that FFmpeg calls best.
    """
    try:
        with av.open(path, metadata_errors="ignore") as container:
            stream = _video_stream(container)
            promised = _promised_frames(stream)
            fps = float(stream.average_rate or stream.guessed_rate or 0)
            step = float(stream.time_base or 0)
            if exact:
                stream.codec_context.thread_count = 1
                pts = [frame.pts for frame in container.decode(stream)]
                found, doubt = len(pts), "its packets are not its frames"
            else:
                packets = [packet for packet in container.demux(stream) if packet.size]
                # Discarded packets lie before an edit list's start: decoded, but never shown.
                pts = [packet.pts for packet in packets if not packet.is_discard]
                found, doubt = len(packets), _decord_doubt(container, stream.codec_context, packets) if pts else ""
    except (av.FFmpegError, OSError) as error:
        raise DecodeError(_cause(error)) from error
    if not pts:
        raise DecodeError("no frame in its video stream")
    if promised - found > max(1, MISSING_FRAMES_ALLOWED * promised):
        raise DecodeError(f"only {found} of the {promised} frames that its header promises are there")
    times = _times(pts, step, fps)
    if fps <= 0:
        fps = (len(times) - 1) / times[-1] if len(times) > 1 else 1.0
    return {"fps": fps, "decord_doubt": doubt}, times


def _promised_frames(stream: Any) -> int:
    """The header's frame count; less where an edit list shortens the stream; 0 where there is no count."""
    if not stream.duration or not stream.average_rate:
        return stream.frames
    return min(stream.frames, int(stream.duration * stream.time_base * stream.average_rate))


def _decord_doubt(container: Any, codec: Any, packets: list[av.Packet]) -> str:
    """Found by comparing thousands of frames: what passes here comes out of both alike, bit for bit."""
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
    if any(packet.pts is None for packet in packets):
        return "it lacks timestamps"
    if any(packet.is_discard for packet in packets):
        return "an edit list hides frames, which decord counts"
    latest_key = packets[0].pts
    for packet in packets:
        assert packet.pts is not None and latest_key is not None
        if packet.is_keyframe:
            latest_key = packet.pts
            if not _is_clean_cut(codec, bytes(packet)):
                return "it has key frames which later frames reach across"
        elif packet.pts < latest_key:
            return "frames are shown before the key frame that they follow"
    return ""


def _is_clean_cut(codec: Any, packet: bytes) -> bool:
    """Whether a key frame of H.264 or HEVC is an IDR picture. (Key frames of most other codecs are clean cuts.)"""
    header = codec.extradata or b""
    if codec.name not in ("h264", "hevc"):
        return True
    h264 = codec.name == "h264"
    length_byte = 4 if h264 else 21
    if len(header) <= length_byte or header[0] != 1:
        return False  # no avcC or hvcC header: units without lengths, not read here
    length_size = (header[length_byte] & 3) + 1
    position = 0
    while position + length_size < len(packet):
        length = int.from_bytes(packet[position : position + length_size], "big")
        position += length_size
        kind = packet[position] & 31 if h264 else packet[position] >> 1 & 63
        if 1 <= kind <= 5 if h264 else kind < 32:
            return kind == 5 if h264 else kind in (19, 20)
        position += length
    return False


def frames(path: str, indices: list[int], num_raw: int, backend: str) -> Answer:
    """Pixels of the frames at `indices` (sorted, unique) in presentation order, rotated as the file asks.

    `num_raw` is what `index` counted. Returns `{"backend": backend}` and (len(indices), H, W, 3) uint8 RGB; alpha
    and the sample aspect ratio are ignored.
    """
    assert indices == sorted(set(indices)) and indices[0] >= 0 and indices[-1] < num_raw
    read = {"decord": _decord_frames, "pyav": _pyav_frames}[backend]
    return {"backend": backend}, read(path, indices, num_raw)


def _decord_frames(path: str, indices: list[int], num_raw: int) -> np.ndarray:
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
        return reader.get_batch(indices).asnumpy()
    except DecodeError:
        raise
    except Exception as error:  # DECORDError, RuntimeError, AssertionError, ...: all mean that it failed
        first_line = (str(error).strip() or repr(error)).splitlines()[0]
        raise DecodeError(re.sub(r"\[[\d:]+\] \S+:\d+: ", "", first_line)) from error


def _pyav_frames(path: str, indices: list[int], num_raw: int) -> np.ndarray:
    wanted = set(indices)
    pictures: list[np.ndarray] = []
    position = -1
    try:
        with av.open(path, metadata_errors="ignore") as container:
            stream = _video_stream(container)
            stream.codec_context.thread_count = 1
            for position, frame in enumerate(container.decode(stream)):
                if position in wanted:
                    pictures.append(_rgb(frame, *(pictures[0].shape[:2] if pictures else (None, None))))
                if position == indices[-1]:
                    return np.stack(pictures)
    except (av.FFmpegError, OSError) as error:
        raise DecodeError(f"{_cause(error)} after {position + 1} of {num_raw} frames") from error
    raise ShortStream(f"only {position + 1} of {num_raw} frames can be decoded")


def _video_stream(container: Any) -> Any:
    stream = container.streams.best("video")
    if stream is None:
        raise DecodeError("no video stream in it")
    if stream.codec_context is None:
        raise DecodeError("no decoder for the codec of its video stream")
    return stream


def _rgb(frame: av.VideoFrame, height: int | None, width: int | None) -> np.ndarray:
    """(H, W, 3) uint8. Turned before the colour conversion, as decord does it: at odd sizes the order shows."""
    turns = {90: ["2"], -90: ["1"], 180: ["1", "1"], -180: ["1", "1"]}.get(frame.rotation, [])
    if turns:
        graph = Graph()
        nodes = [
            graph.add_buffer(width=frame.width, height=frame.height, format=frame.format, time_base=frame.time_base)
        ]
        nodes += [graph.add("transpose", direction) for direction in turns]
        nodes += [graph.add("buffersink")]
        graph.link_nodes(*nodes).configure()
        graph.push(frame)
        frame = graph.pull()  # type: ignore[assignment]
    # The size changes inside some streams; all frames get the first one's.
    return frame.reformat(width=width, height=height, format="rgb24", interpolation="BILINEAR").to_ndarray()


def _times(pts: list[int | None], step: float, fps: float) -> np.ndarray:
    """Seconds after the first frame, from timestamps where all are there and differ, else from the frame rate."""
    known = sorted(value for value in pts if value is not None)
    if step > 0 and len(set(known)) == len(pts):
        return (np.array(known) - known[0]) * step
    return np.arange(len(pts)) / (fps if fps > 0 else 1.0)


def _cause(error: Exception) -> str:
    return getattr(error, "strerror", None) or str(error) or repr(error)


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


def serve(handlers: Handlers = HANDLERS) -> None:
    """Answers requests from stdin on stdout until stdin closes."""
    # launchers send SIGTERM to whole process trees; this process ends with its parent, which may still need it
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
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
        try:
            meta, array = handlers[request["call"]](**request["arguments"])
        except DecodeError as error:
            meta = {"error": str(error), "short": isinstance(error, ShortStream)}
        except Exception as error:
            meta = {"error": repr(error), "short": False}
        write_message(answers, {"meta": meta, "shape": array.shape, "dtype": str(array.dtype), "bytes": array.nbytes})
        answers.write(array.tobytes())
        answers.flush()


if __name__ == "__main__":
    serve()
