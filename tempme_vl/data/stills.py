"""Pictures in the place of videos: every frame is the picture, as pre-training on images and videos together has it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image

from tempme_vl.data.frame_files import Entry
from tempme_vl.data.pictures import DecodeError, Fit, check_memory, fit_picture
from tempme_vl.data.video import VideoError

# suffixes, and what Pillow may take such a file for: other formats of its could run other programs
STILLS = {".jpg": "JPEG", ".jpeg": "JPEG", ".png": "PNG", ".webp": "WEBP", ".bmp": "BMP"}


def is_still(path: Path) -> bool:
    """Whether a file is a picture, by its name."""
    return path.suffix.lower() in STILLS


def read_still(path: Path, num_frames: int, fit: Fit | None = None, memory_gib: float | None = None) -> Entry:
    """A picture as `num_frames` frames: pixels (F, H, W, 3) uint8, RGB, and their times (F,) float64, all 0.

    Args:
        fit: the size that it is brought to; None: as it is.
        memory_gib: as `tempme_vl.data.video.read_frames`.

    Raises:
        VideoError: it is missing, no picture, broken or too large.
    """
    memory = None if memory_gib is None else int(memory_gib * 2**30)
    try:
        with Image.open(path, formats=sorted(set(STILLS.values()))) as image:
            width, height = image.size
            check_memory(width, height, 3 * num_frames * (width * height if fit is None else fit.size**2), memory)
            picture = np.asarray(image.convert("RGB"))
    except (DecodeError, OSError) as error:
        raise VideoError(path, getattr(error, "strerror", None) or str(error)) from error
    except Exception as error:  # damaged pictures fail in many ways
        raise VideoError(path, f"{type(error).__name__}: {error}") from error
    if fit is not None:
        picture = fit_picture(picture, fit)
    return np.repeat(picture[None], num_frames, axis=0), np.zeros(num_frames)
