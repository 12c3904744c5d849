"""Pictures and videos that visitors search by, kept for a while so that a page about them can be opened again."""

from __future__ import annotations

import secrets
import shutil
import tempfile
import threading
import warnings
from collections import OrderedDict
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from PIL import Image, UnidentifiedImageError

from tempme_vl.data.splits import VIDEO_EXTENSIONS

FORMATS = ("JPEG", "PNG", "WEBP", "BMP")
MOST_PIXELS = 50_000_000
NAME = 80  # characters


class UploadError(ValueError):
    """A file that is no picture that can be read, and not named like a video."""


@dataclass(frozen=True)
class Upload:
    """A file of a visitor.

    Attributes:
        name: as the visitor has it; to show, never to open.
        file: where it lies here.
        image: whether it is a picture, not a video.
    """

    id: str
    name: str
    file: Path
    image: bool

    def picture(self) -> Image.Image:
        """The file, if it is a picture.

        Raises:
            UploadError: it is damaged.
        """
        try:
            with Image.open(self.file, formats=FORMATS) as image:
                return image.convert("RGB")
        except OSError as error:
            raise UploadError(f"{self.name}: {error}") from error


class Uploads:
    """The last files; older ones are deleted, and all of them with `close`."""

    def __init__(self, kept: int = 16) -> None:
        self._kept, self._folder = kept, tempfile.TemporaryDirectory(prefix="tempme_vl-")
        self._files: OrderedDict[str, Upload] = OrderedDict()
        self._lock = threading.Lock()

    def add(self, name: str, content: BinaryIO) -> Upload:
        """Writes a file to the disk under a name of our own.

        Raises:
            UploadError: of another format.
        """
        ending = Path(name).suffix.lower()
        file = Path(self._folder.name) / (secrets.token_hex(16) + (ending if ending in VIDEO_EXTENSIONS else ""))
        with file.open("xb") as target:
            shutil.copyfileobj(content, target)
        try:
            upload = Upload(file.stem, name[-NAME:], file, _is_image(file))
        except UploadError:
            file.unlink()
            raise
        with self._lock:
            self._files[upload.id] = upload
            while len(self._files) > self._kept:
                self._files.popitem(last=False)[1].file.unlink(missing_ok=True)
        return upload

    def get(self, upload_id: str) -> Upload | None:
        """One that is still kept."""
        with self._lock:
            return self._files.get(upload_id)

    def close(self) -> None:
        """Deletes the files."""
        self._folder.cleanup()


def _is_image(file: Path) -> bool:
    """Looks at the first bytes alone, whatever the name is."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # our own limit is below
            with Image.open(file, formats=FORMATS) as image:
                width, height = image.size
    except UnidentifiedImageError:
        if file.suffix:
            return False
        endings = ", ".join(VIDEO_EXTENSIONS)
        raise UploadError(f"expected a picture ({', '.join(FORMATS)}) or a video ({endings})") from None
    except Image.DecompressionBombError as error:
        raise UploadError(str(error)) from error
    if width * height > MOST_PIXELS:
        raise UploadError(f"expected a picture of at most {MOST_PIXELS} pixels; got {width} x {height}")
    return True
