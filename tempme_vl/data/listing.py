"""Which frames a video file holds: read off its packets, without decoding them, or counted by decoding."""

from __future__ import annotations

from contextlib import ExitStack
from fractions import Fraction
from itertools import accumulate
from typing import Any, NamedTuple, TypeAlias

import av
import numpy as np

from tempme_vl.data.opened import Answer, Kept, Packets, open_container, typed, video_stream
from tempme_vl.data.packets import Units
from tempme_vl.data.pictures import DecodeError, check_memory
from tempme_vl.data.seeking import Listed

# Real files promise some frames more than they hold (a header rounded up, a dropped last group of B frames).
# Up to this share, or one frame, is taken as it is; a larger loss is damage.
MISSING_FRAMES_ALLOWED = 0.05


# Of each frame pts, dts, and whether it is a cut.
_Shown: TypeAlias = list[tuple[int | None, int | None, bool]]


class _Header(NamedTuple):
    """What a file says of its frames before they are read.

    Attributes:
        promised: how many there are; 0: it does not say.
        step: seconds of a unit of time; 0: it does not say.
        fps: frames a second; 0: it does not say.
    """

    promised: int
    step: float
    fps: float

    @classmethod
    def of(cls, stream: Any) -> _Header:
        rate, step = stream.average_rate, stream.time_base  # every look makes a fraction
        fps = float(rate or stream.guessed_rate or 0)
        return cls(_promised_frames(stream, rate, step), float(step or 0), fps)


class _Scan(NamedTuple):
    """What was found in a stream.

    Attributes:
        found: how many frames or packets there are, those that are not shown among them.
        doubt: why decord could return other pixels than PyAV.
    """

    shown: _Shown
    found: int
    doubt: str
    packets: Packets


def index(path: str, exact: bool = False, memory: int | None = None, kept: Kept | None = None) -> Answer:
    """Lists the frames of a file by its packets, without decoding them, or with `exact` by decoding them.

    Returns `{"fps": float, "decord_doubt": str}` and the rows of a `Listed`, (4, n) float64. `decord_doubt` says why
    decord could return other pixels than PyAV ("": it does not). The stream is the one that FFmpeg calls best.

    `memory`: bytes that may be taken; raises TooLarge for a header that speaks of frames beyond it. `kept`: takes what
    `frames` need not read again.
    """
    if kept is not None:
        kept.forget()
    with ExitStack() as opened:
        try:
            container = opened.enter_context(open_container(path))
            stream = video_stream(container)
            codec = stream.codec_context
            check_memory(codec.width, codec.height, 0, memory)
            header = _Header.of(stream)
            scan = _by_decoding(container, stream) if exact else _by_packets(container, stream)
        except (av.FFmpegError, OSError) as error:
            raise typed(error, memory) from error
        if scan is None:
            return index(path, True, memory, kept)
        rows, fps = _listed(header, scan)
        listed = Listed(*rows)
        if exact:
            listed.cuts[:] = np.nan
        elif kept is not None:
            # AVI has no times of its own: FFmpeg numbers packets as they lie in the file, not as they are shown.
            kept.remember(path, listed.pts, "avi" not in _names(container) or not codec.has_b_frames)
            if scan.packets.few:
                kept.hold(stream, scan.packets.all, opened.pop_all().close)
    return {"fps": fps, "decord_doubt": scan.doubt}, rows


def _by_decoding(container: Any, stream: Any) -> _Scan:
    stream.codec_context.thread_count = 1
    shown: _Shown = [(frame.pts, None, False) for frame in container.decode(stream)]
    return _Scan(shown, len(shown), "its packets are not its frames", Packets())


def _by_packets(container: Any, stream: Any) -> _Scan | None:
    """None for a stream that does not begin with a key frame: what refers to a picture before it gives no frame."""
    codec = stream.codec_context
    doubt, latest_key = _stream_doubt(container, codec), None
    units, packets = Units.of(codec.name, codec.extradata or b""), Packets()
    shown: _Shown = []
    found = 0
    for packet in container.demux(stream):
        size = packet.size
        if not size:
            continue
        found += 1
        packets.add(packet, size)
        is_key, pts = packet.is_keyframe, packet.pts
        if is_key:
            latest_key = pts
        elif found == 1:
            return None
        # Discarded packets lie before an edit list's start: decoded, but never shown.
        if not packet.is_discard:
            shown.append((pts, packet.dts, is_key and found > 1 and units.is_cut(memoryview(packet))))
        doubt = doubt or _packet_doubt(units, packet, latest_key)
    return _Scan(shown, found, doubt, packets)


def _listed(header: _Header, scan: _Scan) -> tuple[np.ndarray, float]:
    """The rows of a `Listed`, and how many frames there are a second. Raises DecodeError where many of them lack."""
    shown, fps = scan.shown, header.fps
    if not shown:
        raise DecodeError("no frame in its video stream")
    if header.promised - scan.found > max(1, MISSING_FRAMES_ALLOWED * header.promised):
        raise DecodeError(f"only {scan.found} of the {header.promised} frames that its header promises are there")
    rows = timed(shown, header.step, fps)
    if fps <= 0:
        fps = (len(shown) - 1) / rows[0, -1] if len(shown) > 1 else 1.0
    return rows, fps


def _promised_frames(stream: Any, rate: Fraction | None, step: Fraction | None) -> int:
    """The header's frame count; less where an edit list shortens the stream; 0 where there is no count."""
    frames, duration = stream.frames, stream.duration
    if not frames or not duration or not rate or not step:
        return frames
    return min(frames, int(duration * step * rate))


def timed(shown: _Shown, step: float, fps: float) -> np.ndarray:
    """(4, n) float64, the rows of a `Listed`: from timestamps where all are there and differ; else times are those of
    the frame rate, and nothing is known of places."""
    stamps = sorted((pts, pts if dts is None else dts, cut) for pts, dts, cut in shown if pts is not None)
    rows = np.empty((4, len(shown)))
    if step <= 0 or len({pts for pts, _, _ in stamps}) < len(shown):
        rows[0], rows[1:] = np.arange(len(shown)) / (fps if fps > 0 else 1.0), np.nan
        return rows
    rows[1], rows[2], cuts = zip(*stamps, strict=True)
    rows[3] = list(accumulate((number if cut else -1 for number, cut in enumerate(cuts)), max))
    rows[0] = (rows[1] - rows[1, 0]) * step
    return rows


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
    if not {"mov", "matroska", "avi"} & _names(container):
        return f"its container is {container.format.name}"
    return ""


def _packet_doubt(units: Units, packet: av.Packet, latest_key: int | None) -> str:
    """`latest_key`: when the last key frame up to this packet is shown."""
    if packet.pts is None or latest_key is None:
        return "it lacks timestamps"
    if packet.is_discard:
        return "an edit list hides frames, which decord counts"
    # H.264 and HEVC have key frames that are no clean cut, and units without lengths are not decord's
    clean = not units.known or not packet.is_keyframe
    if not clean and not (units.length_size > 0 and units.is_idr(memoryview(packet))):
        return "it has key frames which later frames reach across"
    if packet.pts < latest_key:
        return "frames are shown before the key frame that they follow"
    return ""


def _names(container: Any) -> set[str]:
    return set(container.format.name.split(","))
