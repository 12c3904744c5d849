"""Clips a second that training's loader gives: decoded, and from a warm frame cache; and whether a GPU would wait.

python eval/loader_speed.py --videos /data/videos --workers 2
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch.utils.data import DataLoader, Dataset

from tempme_vl.command import above_zero, at_least, run
from tempme_vl.command_line import Command
from tempme_vl.data.frame_cache import FrameCache
from tempme_vl.data.reader import VideoReader
from tempme_vl.data.splits import Video, videos_below
from tempme_vl.data.transforms import Preprocess, VideoTransform
from tempme_vl.processes import become_worker
from tempme_vl.recipes.cache import build
from tempme_vl.reports import finish, format_columns


@dataclass(frozen=True)
class Options:
    """Time loading clips as training does, uint8, without a model."""

    videos: Path
    """A folder; its videos are read over and over."""
    frames: int = 12
    image_size: int = 224
    batch_size: int = 32
    workers: tuple[int, ...] = (2,)
    """Loader processes; several numbers are measured one after the other."""
    forms: tuple[Literal["raw", "jpeg"], ...] = ("raw", "jpeg")
    passes: int = 20
    """Over the cached videos."""
    rate: float = 500.0
    """Clips a second of the model that is imitated by sleeping."""
    json: Path | None = None
    """Also write all numbers to this file."""


@dataclass(frozen=True)
class Row:
    """What a loader gave.

    Attributes:
        clips: a second of wall-clock time, the start of the workers in it.
        waited: the share of its time that a model of `rate` waits for the next batch; None where it was not measured.
    """

    source: str
    workers: int
    clips: float
    waited: float | None = None


class Clips(Dataset[torch.Tensor]):
    """(F, 3, S, S) uint8 of each video in turn."""

    def __init__(self, videos: list[Video], reader: VideoReader, passes: int):
        self.videos, self.reader, self.passes = videos, reader, passes

    def __len__(self) -> int:
        return len(self.videos) * self.passes

    def __getitem__(self, index: int) -> torch.Tensor:
        return self.reader(self.videos[index % len(self.videos)]).video


def main(options: Options) -> None:
    at_least(1, frames=options.frames, batch_size=options.batch_size, passes=options.passes)
    at_least(0, workers=min(options.workers, default=-1))
    above_zero(rate=options.rate)
    transform = VideoTransform(Preprocess(image_size=options.image_size), normalize=False)
    with tempfile.TemporaryDirectory() as folder:
        caches = {"raw": FrameCache(Path(folder) / "raw"), "jpeg": FrameCache(Path(folder) / "jpeg", quality=95)}

        def reader(form: str | None) -> VideoReader:
            cache = None if form is None else caches[form]
            return VideoReader(options.frames, transform, on_broken="raise", cache=cache)

        videos = videos_below(options.videos)
        rows = [
            Row("decoded", workers, clips_a_second(Clips(videos, reader(None), 1), options, workers))
            for workers in options.workers
        ]
        for form in options.forms:
            build(videos, reader(form), max(options.workers))
            clips = Clips(videos, reader(form), options.passes)
            rows += [
                Row(f"cache, {form}", workers, clips_a_second(clips, options, workers), waited(clips, options, workers))
                for workers in options.workers
            ]
    setting = (
        f"{len(videos)} videos, {options.frames} frames of {options.image_size} px, {options.batch_size} at a time"
    )
    report = {"setting": setting, "rows": [asdict(row) for row in rows]}
    finish(f"{setting}\n{shown(rows, options.rate)}", report, options.json)


def batches(clips: Clips, options: Options, workers: int) -> Iterator[torch.Tensor]:
    pin = torch.cuda.is_available()
    loader: DataLoader[Any] = DataLoader(
        clips, options.batch_size, num_workers=workers, pin_memory=pin, worker_init_fn=become_worker
    )
    return iter(loader)


def clips_a_second(clips: Clips, options: Options, workers: int) -> float:
    start = time.perf_counter()
    count = sum(len(batch) for batch in batches(clips, options, workers))
    return count / (time.perf_counter() - start)


def waited(clips: Clips, options: Options, workers: int) -> float:
    given, waiting = batches(clips, options, workers), 0.0
    batch = next(given, None)  # workers have started
    start = time.perf_counter()
    while batch is not None:
        time.sleep(len(batch) / options.rate)
        batch = None  # so that giving its memory back is not taken for waiting
        asked = time.perf_counter()
        batch = next(given, None)
        waiting += time.perf_counter() - asked
    return waiting / (time.perf_counter() - start)


def shown(rows: list[Row], rate: float) -> str:
    return format_columns(
        [
            {
                "": row.source,
                "workers": str(row.workers),
                "clips a second": f"{row.clips:.0f}",
                f"waiting at {rate:.0f} a second": "-" if row.waited is None else f"{row.waited:.3f}",
            }
            for row in rows
        ]
    )


if __name__ == "__main__":
    run(Command("", Options, main))
