"""The frame cache of a folder of videos or of a data set, built ahead by several processes."""

from __future__ import annotations

import logging
import tempfile
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from tempme_vl.command import above_zero, at_least
from tempme_vl.data.broken import broken_videos
from tempme_vl.data.datasets import Source
from tempme_vl.data.frame_cache import FrameCache
from tempme_vl.data.reader import Outcome, VideoReader
from tempme_vl.data.splits import Video, videos_below
from tempme_vl.data.transforms import Preprocess, VideoTransform
from tempme_vl.recipes.names import BROKEN_VIDEOS
from tempme_vl.recipes.options.cache import CacheOptions

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Kept(Dataset[Outcome]):
    """What became of each video's frames."""

    videos: list[Video]
    reader: VideoReader

    def __len__(self) -> int:
        return len(self.videos)

    def __getitem__(self, place: int) -> Outcome:
        return self.reader.keep(self.videos[place])


def main(options: CacheOptions) -> None:
    videos, usual_frames = videos_of(options)
    start = time.perf_counter()
    num_frames = usual_frames if options.num_frames is None else options.num_frames
    counts = build(videos, reader_of(options, num_frames), options.workers)
    print(report(options, counts, time.perf_counter() - start))


def videos_of(options: CacheOptions) -> tuple[list[Video], int]:
    """The videos, each once, and how many frames of each are usual.

    Raises:
        ValueError: neither a folder nor a data set or both, a folder without videos, and see `Source`.
    """
    if (options.videos is None) == (options.dataset is None):
        raise ValueError("expected --videos FOLDER or --dataset NAME, one of them")
    if options.videos is not None:
        return videos_below(options.videos), 12
    source = Source(str(options.dataset), options.data_root, options.video_root, options.annotations)
    record = source.record
    part = options.texts or ("questions" if record.captions is None else "captions")
    splits = source.all_captions() if part == "captions" else source.all_questions()
    found = [video for split in splits if split is not None for video in split.videos]
    return list(dict.fromkeys(found)), record.num_frames


def reader_of(options: CacheOptions, num_frames: int) -> VideoReader:
    """What reads the videos and keeps their frames.

    Raises:
        ValueError: numbers that are too small.
    """
    at_least(0, workers=options.workers)
    at_least(1, num_frames=num_frames, image_size=options.image_size)
    above_zero(most_gib=options.most_gib, decode_timeout=options.decode_timeout, clip_memory=options.clip_memory)
    if not 1 <= options.quality <= 100:
        raise ValueError(f"--quality must be from 1 to 100; got {options.quality}")
    limit = None if options.most_gib is None else int(options.most_gib * 2**30)
    quality = options.quality if options.form == "jpeg" else None
    return VideoReader(
        num_frames,
        VideoTransform(Preprocess(options.image_size, resize=options.resize, interpolation=options.interpolation)),
        sampling=options.sampling,
        timeout=options.decode_timeout,
        backend=options.decoder,
        memory_gib=options.clip_memory,
        broken_log=options.frame_cache / BROKEN_VIDEOS,
        cache=FrameCache(options.frame_cache, limit, quality=quality),
    )


def build(videos: list[Video], reader: VideoReader, workers: int) -> Counter[Outcome]:
    """Keeps the frames of all videos until there is no room, and counts what became of them.

    Raises:
        ValueError: the folder of the cache cannot be written to.
    """
    assert isinstance(reader.cache, FrameCache)
    reader.cache.tidy()
    loader = DataLoader(Kept(videos, reader), batch_size=None, num_workers=workers)
    counts: Counter[Outcome] = Counter()
    for outcome in tqdm(loader, desc="videos", disable=None, mininterval=2):
        if outcome == "left out":
            check_writable(reader.cache.folder)
            counts[outcome] = len(videos) - counts.total()
            break
        counts[outcome] += 1
    return counts


def check_writable(folder: Path) -> None:
    """Raises ValueError where no file can be made in a folder, which may have to be made itself."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise ValueError(f"--frame-cache: expected a folder to write to; got {folder}: {error.strerror}") from error


def report(options: CacheOptions, counts: Counter[Outcome], seconds: float) -> str:
    """What was done, in a few lines."""
    said: dict[Outcome, str] = {
        "made": "decoded and kept",
        "there": "there already",
        "left out": "left out, since there is no room",
        "broken": "unreadable",
    }
    told = ", ".join(f"{counts[outcome]} {words}" for outcome, words in said.items() if counts[outcome])
    size = FrameCache(options.frame_cache).size() / 2**30
    lines = [f"{counts.total()} videos in {seconds:.1f} s: {told}", f"{options.frame_cache}: {size:.3g} GiB"]
    log = options.frame_cache / BROKEN_VIDEOS
    lines += [f"could not read {name}: {cause}" for name, cause in broken_videos(log).items()]
    return "\n".join(lines)
