"""Files of the indexed folder, as a server gives them away: those that the index lists, and pictures of them."""

from __future__ import annotations

import io
import mimetypes
import threading
from collections import OrderedDict
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from tempme_vl.search.files import inside
from tempme_vl.search.web.interface import Index
from tempme_vl.search.web.stills import read_still

KEPT = 512  # pictures


class NotThere(LookupError):
    """What is asked for is not here, or not for visitors."""


@dataclass(frozen=True)
class Picture:
    """A frame as a JPEG, and the size of the video's frames in pixels."""

    jpeg: bytes
    width: int
    height: int


class Media:
    """Finds files by the paths of an index, and reads single frames of them.

    Args:
        index: whose paths may be given out.
    """

    def __init__(self, index: Index) -> None:
        self._index = index
        self._kept: OrderedDict[tuple[Path, int, float, int], Picture] = OrderedDict()
        self._lock = threading.Lock()

    def file(self, path: str) -> Path:
        """The file, with all links resolved.

        Raises:
            NotThere: the message tells nothing about what is on the disk.
        """
        if path in self._index.paths:
            with suppress(ValueError):  # a link that leads out of the folder
                file = inside(self._index.root, path).resolve()
                if file.is_file():
                    return file
        raise NotThere(f"no video {path!r} in this index")

    def picture(self, file: Path, time: float, width: int) -> Picture:
        """The frame that is shown at a time, scaled to a width; kept in memory, since pages show the same ones again.

        Args:
            file: from `file`, or one of a visitor's own.
            time: seconds after the first frame; behind the last frame, that one is taken.

        Raises:
            VideoError: a file that cannot be read.
        """
        key = file, file.stat().st_mtime_ns, round(time, 3), width
        with self._lock:
            if key in self._kept:
                self._kept.move_to_end(key)
                return self._kept[key]
        picture = _read(file, time, width)
        with self._lock:
            self._kept[key] = picture
            while len(self._kept) > KEPT:
                self._kept.popitem(last=False)
        return picture


def media_type(file: Path) -> str:
    """Of a video; anything else is handed out as bytes, which no browser runs."""
    guessed = mimetypes.guess_type(file.name)[0] or ""
    return guessed if guessed.startswith("video/") else "application/octet-stream"


def as_jpeg(image: Image.Image, width: int) -> bytes:
    """A picture scaled to a width, never to a larger one."""
    width = min(width, image.width)
    height = max(1, round(image.height * width / image.width))
    file = io.BytesIO()
    image.convert("RGB").resize((width, height), Image.Resampling.BICUBIC).save(file, "JPEG", quality=82)
    return file.getvalue()


def _read(file: Path, time: float, width: int) -> Picture:
    image = Image.fromarray(read_still(file, time))
    return Picture(as_jpeg(image, width), image.width, image.height)
