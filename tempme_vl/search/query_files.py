"""Files as queries: videos by the ending of their names, all others as pictures."""

from __future__ import annotations

from pathlib import Path

from PIL import Image, UnidentifiedImageError

from tempme_vl.data.splits import VIDEO_EXTENSIONS


def query_of_file(file: Path) -> Path | Image.Image:
    """A video by the ending of its name, else a picture. Raises ValueError for one that cannot be read."""
    return file if file.name.lower().endswith(VIDEO_EXTENSIONS) else read_picture(file)


def read_picture(file: Path) -> Image.Image:
    """A picture. Raises ValueError that names the file."""
    try:
        with Image.open(file) as picture:
            return picture.convert("RGB")
    except (UnidentifiedImageError, OSError, Image.DecompressionBombError) as error:
        raise ValueError(f"{file} cannot be read as a picture: {error}") from error
