"""Frames of a long video, spread over all of it, read as training and search read them: by seeking.

An hour is rendered first where the file is not there (some minutes), then 96 frames of it are read:
    python eval/long_video.py --file runs/hour.mp4
    python eval/long_video.py --file yours.mkv --frames 32
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import numpy as np

from tempme_vl.command import above_zero, at_least, run
from tempme_vl.command_line import Command
from tempme_vl.data.video import read_frames
from tempme_vl.reports import finish, format_columns

PICTURES = 80


@dataclass(frozen=True)
class Options:
    """Seconds of reading some frames of a long video."""

    file: Path
    """A video; rendered where there is none: MP4 of H.264, 320 x 240, 25 frames a second, x264's own key frames."""
    seconds: int = 3600
    """Of a video that is rendered."""
    frames: int = 96
    sampling: str = "uniform"
    repeats: int = 3
    """Times that they are read; the least and the most are shown."""
    json: Path | None = None
    """Also write the numbers to this file."""


def main(options: Options) -> None:
    at_least(1, seconds=options.seconds, frames=options.frames, repeats=options.repeats)
    above_zero(seconds=float(options.seconds))
    if not options.file.exists():
        render(options.file, options.seconds)
    rows = [read(options) for _ in range(options.repeats)]
    shown = [{name: f"{value:.2f}" for name, value in row.items()} for row in rows]
    finish(f"{options.frames} frames of {options.file}\n{format_columns(shown)}", {"rows": rows}, options.json)


def read(options: Options) -> dict[str, float]:
    """Seconds of wall and CPU time, and where in the video the first and the last frame are."""
    wall, cpu = time.perf_counter(), time.process_time()
    found = read_frames(options.file, options.frames, sampling=options.sampling, timeout=None, fit=None)
    assert len(found.pixels) == options.frames
    return {
        "wall s": time.perf_counter() - wall,
        "CPU s": time.process_time() - cpu,
        "first frame at": float(found.times[0]),
        "last frame at": float(found.times[-1]),
    }


def render(file: Path, seconds: int, rate: int = 25) -> None:
    """A pattern that moves; few pictures over and over, so that it is written in minutes."""
    import av

    tiles = np.random.default_rng(0).integers(0, 256, (15, 20, 3), dtype=np.uint8).repeat(16, 0).repeat(16, 1)
    pictures = [
        av.VideoFrame.from_ndarray(np.roll(tiles, 4 * n, 1), format="rgb24").reformat(format="yuv420p")
        for n in range(PICTURES)
    ]
    file.parent.mkdir(parents=True, exist_ok=True)
    partial = file.with_name(f"{file.stem}.partial{file.suffix}")
    with av.open(str(partial), "w") as container:
        stream = container.add_stream("libx264", rate=rate, options={"preset": "ultrafast"})
        stream.width, stream.height, stream.pix_fmt = tiles.shape[1], tiles.shape[0], "yuv420p"
        for number in range(seconds * rate):
            picture = pictures[number % PICTURES]
            picture.pts, picture.time_base = number, Fraction(1, rate)
            container.mux(stream.encode(picture))
        container.mux(stream.encode())
    partial.replace(file)


if __name__ == "__main__":
    run(Command("", Options, main))
