"""From a clip to the encoder's input: decode, cache, transform, and account for what cannot be read."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tempme_vl.data.splits import Clip
from tempme_vl.data.transforms import ClipTransform, resize
from tempme_vl.data.video import VideoError, read_frames


class VideoInput(tuple[Tensor, bool]):
    """What a reader gives: a pair (video, valid) that also knows when its frames are shown.

    Attributes:
        video: (F, 3, S, S) float32.
        valid: whether the frames are real; black ones stand for a clip that could not be read.
        times: (F,) float32, seconds after the clip's start (`Clip.start`, or the file's first frame), never falling.
            A frame that began before the start and is still shown there has time 0. Invalid frames are 1 s apart.
    """

    times: Tensor

    def __new__(cls, video: Tensor, valid: bool, times: Tensor) -> VideoInput:
        self = super().__new__(cls, (video, valid))
        self.times = times
        return self

    def __getnewargs__(self) -> tuple[Any, ...]:  # to be pickled
        return (*self, self.times)

    @property
    def video(self) -> Tensor:
        return self[0]

    @property
    def valid(self) -> bool:
        return self[1]


@dataclass
class ClipReader:
    """Reads clips as input of a `VisualFrontend`.

    Args:
        num_frames: F.
        transform: pixels to input.
        sampling: a name in `tempme_vl.data.sampling.SAMPLING`.
        timeout: seconds a decoder may take before it is ended; None decodes in this process without a limit.
        on_broken: "raise" a VideoError, or "record" it in `broken_log` and give black, invalid frames.
        broken_log: JSON lines, one for each broken clip that a process meets.
        cache: "memory", a folder, or None: keeps the resized frames of clips that are sampled the same every time.
            It is the main speed-up of training: decoding costs far more than everything else here.

    Raises:
        ValueError: on_broken is neither, or "record" without a broken_log.
    """

    num_frames: int
    transform: ClipTransform
    sampling: str = "fps1"
    timeout: float | None = 60.0
    backend: str = "auto"
    on_broken: str = "record"
    broken_log: Path | None = None
    cache: str | Path | None = None
    _memory: dict[str, tuple[np.ndarray, np.ndarray]] = field(default_factory=dict, repr=False)
    _reported: set[str] = field(default_factory=set, repr=False)

    def __post_init__(self) -> None:
        if self.on_broken not in ("raise", "record"):
            raise ValueError(f"on_broken must be 'raise' or 'record'; got {self.on_broken!r}")
        if self.on_broken == "record" and self.broken_log is None:
            raise ValueError("on_broken='record' needs a broken_log file to write to")

    def __call__(self, clip: Clip, rng: np.random.Generator | None = None) -> VideoInput:
        """The clip's frames (F, 3, S, S) float32, whether they are real, and `.times` (F,) in seconds.

        Args:
            rng: draws random sampling and augmentation; None for evaluation.

        Raises:
            VideoError: an unreadable clip, with on_broken="raise".
        """
        try:
            pixels, times = self._pixels(clip, rng)
            return VideoInput(self.transform(pixels, rng), True, torch.from_numpy(times).float())
        except VideoError as error:
            if self.on_broken == "raise":
                raise
            self._record(clip, error)
            size = self.transform.preprocess.image_size
            return VideoInput(torch.zeros(self.num_frames, 3, size, size), False, torch.arange(self.num_frames).float())

    def _pixels(self, clip: Clip, rng: np.random.Generator | None) -> tuple[np.ndarray, np.ndarray]:
        """Frames (F, H, W, 3) uint8 and their times (F,) float64, from the cache where they are there."""
        random_frames = rng is not None and self.sampling == "segment"
        if self.cache is None or random_frames or self.transform.augment == "crop_flip":
            return self._decode(clip, rng)
        key = self._key(clip)
        if key in self._memory:
            return self._memory[key]
        file = None if self.cache == "memory" else Path(self.cache) / f"{key}.npy"
        if file is not None and file.is_file():
            with file.open("rb") as stream:
                return np.load(stream), np.load(stream)
        pixels, times = self._decode(clip, rng)
        pixels = resize(pixels, self.transform.preprocess)
        if file is None:
            self._memory[key] = pixels, times
        else:
            file.parent.mkdir(parents=True, exist_ok=True)
            partial = file.with_suffix(f".{os.getpid()}.partial")
            with partial.open("wb") as stream:
                np.save(stream, pixels)
                np.save(stream, times)
            partial.replace(file)
        return pixels, times

    def _decode(self, clip: Clip, rng: np.random.Generator | None) -> tuple[np.ndarray, np.ndarray]:
        frames = read_frames(
            clip.path,
            self.num_frames,
            sampling=self.sampling,
            start=clip.start,
            end=clip.end,
            backend=self.backend,
            timeout=self.timeout,
            rng=rng,
        )
        return frames.pixels, np.maximum(frames.times - (clip.start or 0.0), 0.0)

    def _key(self, clip: Clip) -> str:
        """Everything the cached pixels depend on; a file that changes gets another key."""
        try:
            stat = clip.path.stat()
        except OSError as error:
            raise VideoError(clip.path, str(error)) from error
        preprocess = self.transform.preprocess
        parts = (clip.path.resolve(), stat.st_size, stat.st_mtime_ns, clip.start, clip.end, self.num_frames)
        how = (self.sampling, preprocess.image_size, preprocess.resize, preprocess.interpolation)
        return hashlib.blake2b(repr(("pixels and times", parts, how)).encode(), digest_size=16).hexdigest()

    def _record(self, clip: Clip, error: VideoError) -> None:
        if clip.video_id in self._reported:
            return
        self._reported.add(clip.video_id)
        assert self.broken_log is not None
        self.broken_log.parent.mkdir(parents=True, exist_ok=True)
        line = json.dumps({"video_id": clip.video_id, "path": str(clip.path), "cause": error.cause})
        with self.broken_log.open("a") as log:
            log.write(line + "\n")


def broken_clips(log: Path) -> dict[str, str]:
    """What a broken_log holds: video id -> cause, each clip once whichever processes met it."""
    if not log.is_file():
        return {}
    entries: Iterable[dict[str, str]] = (json.loads(line) for line in log.read_text().splitlines())
    return {entry["video_id"]: entry["cause"] for entry in entries}
