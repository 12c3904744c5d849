"""From a video to the encoder's input: decode, cache, transform, and account for what cannot be read."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from tempme_vl.data.broken import BrokenLog, broken_videos
from tempme_vl.data.frame_cache import FrameCache, memory_cache
from tempme_vl.data.frame_files import Entry
from tempme_vl.data.sampling import RANDOM
from tempme_vl.data.splits import Video
from tempme_vl.data.stills import is_still, read_still
from tempme_vl.data.transforms import VideoTransform
from tempme_vl.data.video import BACKENDS, VideoError, read_frames

__all__ = ["VideoInput", "VideoReader", "broken_videos"]


# What became of a video's frames: in the cache before, put there, no room for them, or no frames.
Outcome = Literal["there", "made", "left out", "broken"]


class VideoInput(NamedTuple):
    """What a reader gives.

    Attributes:
        video: (F, 3, S, S) float32, or uint8 as the reader's transform has it.
        valid: whether the frames are real; zeros stand for a video that could not be read.
        times: (F,) float32, seconds after the video's start (`Video.start`, or the file's first frame), never falling.
            A frame that began before the start and is still shown there has time 0. Invalid frames are 1 s apart.
    """

    video: Tensor
    valid: bool
    times: Tensor


@dataclass
class VideoReader:
    """Reads videos as input of a `VisualFrontend`.

    Args:
        num_frames: F.
        transform: pixels to input.
        sampling: a name in `tempme_vl.data.sampling.SAMPLING`.
        timeout: seconds a decoder may take before it is ended; None decodes in this process without a limit.
        backend: "auto", "pyav" or "decord", see `read_frames`.
        memory_gib: GiB that reading one video may take, see `read_frames`; None: no limit.
        on_broken: "raise" a VideoError, or "record" it in `broken_log` and give invalid frames of zeros.
        broken_log: JSON lines, one for each broken video that a process meets; see `BrokenLog`.
        cache: "memory", a folder, or None: keeps the resized frames of videos that are sampled the same every time.
            It is the main speed-up of training: decoding costs far more than everything else here. "memory" is shared
            with the workers of this process; a folder, which may lie in /dev/shm, with all that are given it. Or a
            `FrameCache` with settings of its own.
        cache_gib: GiB that "memory" may take; further videos are decoded each time.
        pictures: pixels to input of files that are pictures, whose frames are all the same; default: as of videos.

    Raises:
        ValueError: on_broken is neither, "record" without a broken_log, or limits that are not positive.
    """

    num_frames: int
    transform: VideoTransform
    sampling: str = "fps1"
    timeout: float | None = 60.0
    backend: str = "auto"
    on_broken: str = "record"
    broken_log: Path | None = None
    cache: str | Path | FrameCache | None = None
    cache_gib: float = 4.0
    memory_gib: float | None = 2.0
    pictures: VideoTransform | None = None
    # copies by dataclasses.replace share these
    _kept: FrameCache | None = field(default=None, repr=False)
    _log: BrokenLog | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        if self.on_broken not in ("raise", "record"):
            raise ValueError(f"on_broken must be 'raise' or 'record'; got {self.on_broken!r}")
        if self.on_broken == "record" and self.broken_log is None:
            raise ValueError("on_broken='record' needs a broken_log file to write to")
        if self.backend not in BACKENDS:
            raise ValueError(f"unknown backend {self.backend!r}; known: {', '.join(BACKENDS)}")
        if self.cache_gib <= 0 or (self.memory_gib is not None and self.memory_gib <= 0):
            raise ValueError(f"cache_gib and memory_gib must be positive; got {self.cache_gib} and {self.memory_gib}")
        if self.cache is None or isinstance(self.cache, FrameCache):
            self._kept = self.cache
        elif self.cache != "memory":
            self._kept = FrameCache(self.cache)
        elif self._kept is None or self._kept.limit != int(self.cache_gib * 2**30):
            self._kept = memory_cache(int(self.cache_gib * 2**30))

    def __call__(self, video: Video, rng: np.random.Generator | None = None) -> VideoInput:
        """The video's frames (F, 3, S, S) float32 or uint8, whether they are real, and `.times` (F,) in seconds.

        Args:
            rng: draws random sampling and augmentation; None for evaluation.

        Raises:
            VideoError: an unreadable video, with on_broken="raise".
            OSError: the broken_log cannot be written.
        """
        try:
            pixels, times = self._pixels(video, rng)
        except VideoError as error:
            if self.on_broken == "raise":
                raise
            self._broken().add(video, error.cause)
            return VideoInput(self.transform.blank(self.num_frames), False, torch.arange(self.num_frames).float())
        if self.on_broken == "record":
            self._broken().remove(video)
        return VideoInput(self._transform(video)(pixels, rng), True, torch.from_numpy(times).float())

    def keep(self, video: Video) -> Outcome:
        """Puts the frames that evaluation reads of a video into the cache, unless they are there undamaged.

        Raises:
            OSError: the broken_log cannot be written.
            VideoError: an unreadable video, with on_broken="raise".
        """
        assert self._kept is not None
        try:
            return self._from_cache(video, self._kept)[1]
        except VideoError as error:
            if self.on_broken == "raise":
                raise
            self._broken().add(video, error.cause)
            return "broken"

    def _pixels(self, video: Video, rng: np.random.Generator | None) -> Entry:
        """Frames (F, H, W, 3) uint8 and their times (F,) float64, from the cache where they are there."""
        random_frames = rng is not None and self.sampling in RANDOM
        if self._kept is None or random_frames or not self._transform(video).keeps_frames:
            return self._decode(video, rng)
        return self._from_cache(video, self._kept)[0]

    def _from_cache(self, video: Video, cache: FrameCache) -> tuple[Entry, Outcome]:
        key, size = self._key(video), self.transform.preprocess.image_size
        shape = (self.num_frames, size, size, 3)
        if (entry := cache.get(key, shape)) is not None:
            return entry, "there"
        with cache.alone(key):
            if (entry := cache.get(key, shape)) is not None:
                return entry, "there"
            entry = self._decode(video, None)
            return entry, "made" if cache.put(key, *entry) else "left out"

    def _decode(self, video: Video, rng: np.random.Generator | None) -> Entry:
        fit = self._transform(video).fit
        if is_still(video.path):
            return read_still(video.path, self.num_frames, fit, self.memory_gib)
        frames = read_frames(
            video.path,
            self.num_frames,
            sampling=self.sampling,
            start=video.start,
            end=video.end,
            backend=self.backend,
            timeout=self.timeout,
            memory_gib=self.memory_gib,
            fit=fit,
            rng=rng,
        )
        return frames.pixels, np.maximum(frames.times - (video.start or 0.0), 0.0)

    def _transform(self, video: Video) -> VideoTransform:
        return self.pictures if self.pictures is not None and is_still(video.path) else self.transform

    def _key(self, video: Video) -> str:
        """Everything the cached pixels depend on; a file that changes gets another key."""
        try:
            stat = video.path.stat()
        except OSError as error:
            raise VideoError(video.path, str(error)) from error
        preprocess = self.transform.preprocess
        parts = (video.path.resolve(), stat.st_size, stat.st_mtime_ns, video.start, video.end, self.num_frames)
        how = (self.sampling, preprocess.image_size, preprocess.resize, preprocess.interpolation)
        return hashlib.blake2b(repr(("pixels and times", parts, how)).encode(), digest_size=16).hexdigest()

    def _broken(self) -> BrokenLog:
        assert self.broken_log is not None
        if self._log is None or self._log.path != self.broken_log:
            self._log = BrokenLog(self.broken_log)
        return self._log
