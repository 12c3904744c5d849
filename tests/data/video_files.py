"""Small video files made for the tests."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
from torch import Tensor


def different(videos: Iterable[Tensor]) -> int:
    """How many different videos there are among these."""
    return len({video.numpy().tobytes() for video in videos})


def picture(number: int, height: int, width: int) -> np.ndarray:
    """(H, W, 3) uint8: coloured gradients and a bar of its own for each number."""
    y, x = np.mgrid[:height, :width]
    frame = np.stack([x * 255 // width, y * 255 // height, (x + y + 9 * number) % 256], -1).astype(np.uint8)
    frame[:, (number * 5) % width :][:, :4] = (255, 40 * (number % 6), 0)
    return frame


def write_video(
    path: Path,
    num_frames: int = 20,
    *,
    height: int = 64,
    width: int = 96,
    fps: int = 10,
    codec: str = "libx264",
    pixel_format: str = "yuv420p",
    times: Sequence[int] | None = None,
    rotation: int = 0,
    shift: int = 0,
    options: dict[str, str] | None = None,
) -> Path:
    """Writes `picture(0)`, `picture(1)`, ...

    `times`: presentation times in frames (variable rate). `shift`: moves all timestamps by so many frames; what
    comes before 0 is hidden by an edit list. `rotation`: degrees clockwise, in the display matrix of an mp4.
    """
    with av.open(str(path), "w", options={"avoid_negative_ts": "disabled"} if shift else {}) as container:
        stream = container.add_stream(codec, rate=fps, options=options or {})
        stream.width, stream.height, stream.pix_fmt = width, height, pixel_format
        stream.codec_context.time_base = Fraction(1, fps)
        stream.codec_context.thread_count = 1
        for number in range(num_frames):
            frame = av.VideoFrame.from_ndarray(picture(number, height, width), format="rgb24")
            frame.pts = times[number] if times is not None else number
            frame.time_base = Fraction(1, fps)
            _mux(container, stream.encode(frame), shift)
        _mux(container, stream.encode(), shift)
    if rotation:
        _rotate(path, rotation)
    return path


def _mux(container: av.container.OutputContainer, packets: list[av.Packet], shift: int) -> None:
    for packet in packets:
        assert packet.pts is not None and packet.dts is not None
        packet.pts += shift
        packet.dts += shift
        container.mux(packet)


def _rotate(path: Path, degrees: int) -> None:
    """Overwrites the matrix of the first track header: 40 bytes after the start of a version 0 box's content."""
    cos, sin = {90: (0, 1), 180: (-1, 0), 270: (0, -1)}[degrees]
    matrix = [cos << 16, sin << 16, 0, -sin << 16, cos << 16, 0, 0, 0, 1 << 30]
    data = bytearray(path.read_bytes())
    place = data.index(b"tkhd") + 4
    assert data[place] == 0
    data[place + 40 : place + 76] = b"".join(value.to_bytes(4, "big", signed=True) for value in matrix)
    path.write_bytes(bytes(data))
