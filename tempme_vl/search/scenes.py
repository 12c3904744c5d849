"""Where the scene of a video changes: two neighbouring frames differ, and the frames around them do not."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import TypeAlias

import numpy as np

from tempme_vl.data.parts import FrameParts, Part, Plan
from tempme_vl.data.pictures import Fit
from tempme_vl.data.video import Frames

FramesOf: TypeAlias = Callable[[int, Plan, str, Fit], Iterator[FrameParts]]
"""`read_parts` of one file: (frames a part, plan, sampling, fit)."""

_FIT = Fit(64, "squash", "bilinear")
_SPAN, _SAMPLES = 8.0, 16  # seconds of a part, and its frames: two a second
_FAR = 20.0  # of 255: the mean difference of two such frames below which no scene has changed between them
_CUT, _ALONE = 25.0, 2.5  # of two neighbouring frames, and how many times that of all others near them
_NEAR, _FEWEST, _MOST = 0.25, 4, 32  # seconds on both sides, or so many frames where they are few; the most read
_SHORTEST = 1.0  # seconds of a scene


def find_cuts(frames_of: FramesOf) -> list[float]:
    """The first moments of all scenes of a file but its first, in seconds after its first frame.

    Two frames a second are compared; where two of them differ, all frames between them are. A cut is one jump among
    frames that are alike: a flash is two jumps, and what moves fast is many. Dissolves and fades are no cuts, and no
    scene is shorter than a second. Differences are means over pixels and colours.

    Raises:
        VideoError: as `read_parts`.
    """
    places = _candidates(frames_of)
    if not places:
        return []
    cuts: list[float] = []
    for near in frames_of(_MOST, lambda duration: [_around(*place, duration) for place in places], "uniform", _FIT):
        for frames in near.frames:
            cut = _cut_in(frames)
            if cut is not None and (cuts[-1] if cuts else 0.0) + _SHORTEST <= cut <= near.duration - _SHORTEST:
                cuts.append(cut)
    return cuts


def _candidates(frames_of: FramesOf) -> list[tuple[float, float, float]]:
    """(time of a frame, time of the next that was looked at, frames a second) where both are far apart."""
    found: list[tuple[float, float, float]] = []
    before: Frames | None = None
    for some in frames_of(_SAMPLES, _spans, "strided", _FIT):
        for frames in some.frames:
            times, pixels = frames.times, frames.pixels
            if before is not None:
                times, pixels = np.append(before.times[-1:], times), np.concatenate([before.pixels[-1:], pixels])
            far = np.flatnonzero(_differences(pixels) >= _FAR)
            found += [(float(times[at]), float(times[at + 1]), frames.fps) for at in far]
            before = frames
    return found


def _spans(duration: float) -> list[Part]:
    number = max(1, math.ceil(duration / _SPAN))
    return [Part(at * _SPAN, min((at + 1) * _SPAN, duration)) for at in range(number)]


def _around(start: float, end: float, fps: float, duration: float) -> Part:
    near = max(_NEAR, _FEWEST / fps)
    return Part(max(start - near, 0.0), min(end + near, duration))


def _cut_in(frames: Frames) -> float | None:
    """When the one jump among these frames is."""
    _, first = np.unique(frames.indices, return_index=True)
    jumps = _differences(frames.pixels[first])
    if len(jumps) < 2:
        return None
    second, most = np.sort(jumps)[-2:]
    if most < max(_CUT, _ALONE * second):
        return None
    return float(frames.times[first][jumps.argmax() + 1])


def _differences(pixels: np.ndarray) -> np.ndarray:
    """(F, H, W, 3) uint8 -> (F - 1,): the mean difference of each frame to the next, 0 to 255."""
    wide = pixels.astype(np.int16)
    return np.abs(wide[1:] - wide[:-1]).mean((1, 2, 3))
