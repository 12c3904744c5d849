"""Pictures of a video brought to their size, one after the other, within a limit of memory."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import av
import numpy as np
from av.filter import Graph
from av.video.reformatter import VideoReformatter
from PIL import Image

# What a picture takes while it is read, in bytes a pixel: 3 as RGB, 4 in Pillow, 1.5 in each of the some four that the
# codec holds.
WORKING_BYTES = 13

# From PyAV 17 on pictures are scaled by as many threads as there are cores, which PyAV 19 keeps: a forked process, such
# as a loader's worker, would wait for them for ever.
_ONE_THREAD: dict[str, Any] = {"threads": 1} if int(av.__version__.partition(".")[0]) >= 17 else {}


# Degrees of a frame's rotation -> the directions of FFmpeg's filter "transpose".
TURNS = {90: ["2"], -90: ["1"], 180: ["1", "1"], -180: ["1", "1"]}


class DecodeError(Exception):
    """A video cannot be decoded; the message is the cause, without the path."""


class TooLarge(DecodeError):
    """Reading it would take more memory than is allowed."""


class Fit(NamedTuple):
    """Which size pictures are brought to: (size, size), with `resize` and `interpolation` as in `Preprocess`."""

    size: int
    resize: str
    interpolation: str


def fit_picture(picture: np.ndarray, fit: Fit) -> np.ndarray:
    """(H, W, 3) uint8 -> (size, size, 3) uint8, bit for bit as open_clip's transform of a Pillow image.

    "shortest" scales the shorter side and crops the centre; "squash" scales both sides.
    """
    height, width = picture.shape[:2]
    size = fit.size
    if (height, width) == (size, size):
        return picture
    image = Image.fromarray(picture)
    filters = {"bicubic": Image.Resampling.BICUBIC, "bilinear": Image.Resampling.BILINEAR}
    if fit.resize == "squash":
        return np.asarray(image.resize((size, size), filters[fit.interpolation]))
    short = min(height, width)
    height, width = size * height // short, size * width // short
    left, top = round((width - size) / 2), round((height - size) / 2)
    return np.asarray(
        image.resize((width, height), filters[fit.interpolation]).crop((left, top, left + size, top + size))
    )


def check_memory(width: int, height: int, kept: int, memory: int | None) -> None:
    """Raises TooLarge where one picture at work and `kept` bytes beside it do not go into `memory` bytes."""
    needed = kept + WORKING_BYTES * width * height
    if memory is not None and needed > memory:
        raise TooLarge(
            f"its frames of {width} x {height} pixels would take {needed / 2**30:.3g} GiB of memory to read, "
            f"and {memory / 2**30:.3g} are allowed"
        )


class Pictures:
    """Takes pictures one after the other into the array that is answered, each as often as `counts` says."""

    def __init__(self, counts: Sequence[int], fit: Fit | None, memory: int | None) -> None:
        self.counts, self.fit, self.memory = counts, fit, memory
        self._total = sum(counts)
        self.array: np.ndarray | None = None
        self.shape: tuple[int, ...] = ()  # of the first picture, as it was decoded
        self._taken = self._filled = 0
        self._colors = Colors()

    def check(self, width: int, height: int) -> None:
        """Raises TooLarge."""
        each = width * height if self.fit is None else self.fit.size**2
        check_memory(width, height, 3 * self._total * each, self.memory)

    def append(self, picture: np.ndarray) -> None:
        if self.array is None:
            self.shape = picture.shape
        if self.fit is not None:
            picture = fit_picture(picture, self.fit)
        if self.array is None:
            self.array = np.empty((self._total, *picture.shape), np.uint8)
        end = self._filled + self.counts[self._taken]
        self.array[self._filled : end] = picture
        self._taken, self._filled = self._taken + 1, end

    def take(self, frame: av.VideoFrame) -> None:
        """The size changes inside some streams: all frames get the first one's."""
        self.check(frame.width, frame.height)
        self.append(self._colors.rgb(frame, *(self.shape[:2] or (None, None))))

    def clear(self) -> None:
        self.array, self.shape, self._taken, self._filled = None, (), 0, 0


class Colors:
    """Makes decoded frames RGB. What FFmpeg prepares for that is kept, since it may take longer than a frame."""

    def __init__(self) -> None:
        self._reformatter = VideoReformatter()
        self._turning: dict[tuple[int, int, str, int], Graph] = {}

    def rgb(self, frame: av.VideoFrame, height: int | None, width: int | None) -> np.ndarray:
        """(H, W, 3) uint8. Turned before the colour conversion, as decord does it: at odd sizes the order shows."""
        if frame.rotation in TURNS:
            graph = self._graph(frame)
            graph.vpush(frame)
            frame = graph.vpull()
        scaled = self._reformatter.reformat(frame, width, height, "rgb24", interpolation="BILINEAR", **_ONE_THREAD)
        return scaled.to_ndarray()

    def _graph(self, frame: av.VideoFrame) -> Graph:
        kind = (frame.width, frame.height, frame.format.name, frame.rotation)
        if kind not in self._turning:
            self._turning[kind] = graph = Graph()
            width, height, form, step = frame.width, frame.height, frame.format, frame.time_base
            nodes = [graph.add_buffer(width=width, height=height, format=form, time_base=step)]
            nodes += [graph.add("transpose", direction) for direction in TURNS[frame.rotation]]
            graph.link_nodes(*nodes, graph.add("buffersink")).configure()
        return self._turning[kind]
