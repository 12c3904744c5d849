"""Options of building a frame cache; plain data, read from a command line without importing torch."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from tempme_vl.command_line import Command, Example
from tempme_vl.data.options import DataOptions
from tempme_vl.registries import DATASETS


@dataclass(frozen=True)
class CacheOptions(DataOptions):
    """Build the frame cache that --frame-cache of other commands reads: the frames of videos, decoded and resized.

    Those there already are checked and kept, damaged ones made anew: started again, it goes on. A cache is of one
    --num-frames, --sampling, --image-size, --resize and --interpolation, and of files that have not changed since; one
    folder may hold several. Training that draws frames or crops at random (segment, crop_flip) reads the videos.
    """

    frame_cache: Path
    """Folder of the cache."""
    videos: Path | None = None
    """A folder, of which all videos are taken, or:"""
    dataset: Annotated[str, DATASETS] | None = None
    """a data set, with its training, validation and test videos."""
    texts: Literal["captions", "questions"] | None = None
    """Of a data set with both, whose videos. Default: captions, where it has them."""
    num_frames: int | None = None
    """Of a video. Default: what is usual for the data set, or 12."""
    sampling: Literal["fps1", "uniform", "segment", "strided"] = "fps1"
    """Which frames: one a second (TempMe), evenly, the middles of UMT's segments, as evaluation has it, or TESTA's."""
    image_size: int = 224
    """Side of the frames, as the model's."""
    resize: Literal["shortest", "squash"] = "shortest"
    """shortest: scale the shorter side and crop the centre, as CLIP. squash: scale both sides, as SigLIP and UMT."""
    interpolation: Literal["bicubic", "bilinear"] = "bicubic"
    """As the model's preprocessing."""
    form: Literal["raw", "jpeg"] = "raw"
    """raw: the very pixels. jpeg: fewer bytes, other pixels; docs/files.md says how many and how far."""
    quality: int = 95
    """Of JPEG, 1 to 100, as Pillow counts."""
    most_gib: float | None = None
    """GiB that the folder's frames may take; what has no room is decoded each time. None: no limit."""
    workers: int = 2
    """Processes that decode; 0: this one alone."""
    decoder: Literal["auto", "pyav", "decord"] = "auto"
    """As in training."""
    decode_timeout: float | None = 60.0
    """Seconds after which a decoder is ended; None decodes without a guard."""
    clip_memory: float | None = 2.0
    """GiB that reading one video may take; more makes it a broken one. None: no limit."""


CACHE_BUILD = Command(
    "cache build",
    CacheOptions,
    "tempme_vl.recipes.cache:main",
    (
        Example("a folder of videos", "--videos /data/videos --frame-cache /data/frames"),
        Example(
            "a data set, by 8 processes, in at most 50 GiB",
            "--dataset msrvtt --data-root /data/msrvtt --frame-cache /data/frames --workers 8 --most-gib 50",
        ),
        Example(
            "as JPEG",
            "--dataset activitynet --data-root /data/activitynet --frame-cache /data/frames --form jpeg",
        ),
    ),
)
