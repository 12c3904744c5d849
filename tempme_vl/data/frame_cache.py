"""Frames kept from one epoch to the next: files that processes share, each checked when it is read back."""

from __future__ import annotations

import contextlib
import fcntl
import io
import logging
import mmap
import os
import shutil
import tempfile
import threading
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from tempme_vl.data.frame_files import JPEG, RAW, SUFFIXES, Entry, pack, unpack

logger = logging.getLogger(__name__)

PREFIX = "tempme-frames-"
PARTIAL = ".partial"
MOST_MAPPED = 20_000  # Linux allows a process 65,530 mappings


class FrameCache:
    """Frames and their times by key, a file each, in a folder that any number of processes use at once.

    A damaged file is removed and made anew, a file that cannot be written is not kept: both are warnings that name
    the file, and never end a run. Nothing is thrown out of a full cache, since every video of an epoch is as likely to
    be wanted again as any other.

    Args:
        folder: made when it is needed.
        limit: bytes that all files may take together; None: no limit.
        quality: of JPEG, in which frames are kept; None: raw. What was kept in either form is found.
        mapped: whether files stay mapped once they were checked, so that processes share the memory of what they
            read. Not for folders that others can write to: a mapped file must not shrink.
    """

    def __init__(
        self, folder: str | Path, limit: int | None = None, mapped: bool = False, quality: int | None = None
    ) -> None:
        self.folder, self.limit, self.mapped, self.quality = Path(folder), limit, mapped, quality
        self._known: dict[str, Entry] = {}
        self._said: set[str] = set()
        self._owner: Any = None

    def __getstate__(self) -> dict[str, Any]:  # a spawned worker uses the folder but does not own it
        return {**self.__dict__, "_known": {}, "_owner": None}

    def get(self, key: str, shape: tuple[int, ...]) -> Entry | None:
        """Pixels of that shape (F, H, W, 3) uint8 and times (F,) float64, or None. They are not to be changed."""
        if key in self._known:
            return self._known[key]
        return next(filter(None, (self._read(key, shape, suffix) for suffix in SUFFIXES)), None)

    def _read(self, key: str, shape: tuple[int, ...], suffix: str) -> Entry | None:
        file, mapped = self.folder / f"{key}{suffix}", self.mapped and suffix == RAW
        try:
            with file.open("rb", buffering=0) as stream:
                size = os.fstat(stream.fileno()).st_size
                if mapped and size:
                    data = np.frombuffer(mmap.mmap(stream.fileno(), size, access=mmap.ACCESS_COPY), np.uint8)
                else:
                    data = np.empty(size, np.uint8)
                    data = data[: stream.readinto(data.data)]
        except FileNotFoundError:
            return None
        except OSError as error:
            self._warn("cannot be read", f"{file} cannot be read, its video is decoded instead: {error}")
            return None
        entry = unpack(data, shape, suffix)
        if entry is not None and suffix == JPEG:
            self._warn("JPEG", f"{self.folder} holds frames as JPEG: they are not the very pixels of the videos")
        if entry is not None and mapped and len(self._known) < MOST_MAPPED:
            self._known[key] = entry
        if entry is None:
            logger.warning("%s is damaged: it is removed, and its video decoded again", file)
            with contextlib.suppress(OSError):
                file.unlink()
        return entry

    def put(self, key: str, pixels: np.ndarray, times: np.ndarray) -> bool:
        """Keeps pixels (F, H, W, 3) uint8 and times (F,) float64, if there is room. Whether they are there now."""
        file = self.folder / f"{key}{RAW if self.quality is None else JPEG}"
        partial = file.with_suffix(f".{os.getpid()}.{threading.get_ident()}{PARTIAL}")
        data = pack(pixels, times, self.quality)
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            if file.exists():
                return True
            if not self._reserve(len(data)):
                return False
            try:
                with partial.open("wb") as stream:
                    with contextlib.suppress(OSError):  # by its lock `tidy` knows that it is being written
                        fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    stream.write(data)
                    stream.flush()
                    partial.replace(file)
            finally:
                partial.unlink(missing_ok=True)
        except OSError as error:
            self._warn("cannot be kept", f"{file} cannot be written, videos are decoded each time instead: {error}")
            return False
        return True

    def tidy(self) -> None:
        """Removes what killed processes left half written, and counts anew, for the limit, the bytes that are there."""
        for partial in self.folder.glob(f"*{PARTIAL}"):
            with contextlib.suppress(OSError):  # it is locked
                _locked(partial).close()
                partial.unlink()
        if self.limit is not None:
            self.folder.mkdir(parents=True, exist_ok=True)
            with self._counter() as stream:
                self._count(stream, self.size())

    def size(self) -> int:
        """Bytes of all frames that are kept."""
        return sum(file.stat().st_size for suffix in SUFFIXES for file in self.folder.glob(f"*{suffix}"))

    @contextlib.contextmanager
    def alone(self, key: str) -> Iterator[None]:
        """While one process reads the frames of a key, others that want them wait to find them here."""
        with contextlib.ExitStack() as stack:
            with contextlib.suppress(OSError):  # no folder to write to, or one without locks: each reads by itself
                locks = self.folder / "locks"
                locks.mkdir(parents=True, exist_ok=True)
                stream = stack.enter_context((locks / key[:2]).open("ab"))  # few files; two keys seldom share one
                fcntl.flock(stream, fcntl.LOCK_EX)
            yield

    def _reserve(self, size: int) -> bool:
        """Whether there is room for so many bytes more; counts them in a file that all processes add to in turn."""
        if self.limit is None:
            return True
        with self._counter() as stream:
            stream.seek(0)
            total = int(stream.read() or b"0") + size
            if total > self.limit:
                full = f"the frame cache {self.folder} is full with {self.limit / 2**30:.3g} GiB"
                self._warn("full", f"{full}: further videos are decoded each time. Allow more, or another folder")
                return False
            self._count(stream, total)
        return True

    @contextlib.contextmanager
    def _counter(self) -> Iterator[BinaryIO]:
        with (self.folder / "size").open("a+b") as stream:
            fcntl.flock(stream, fcntl.LOCK_EX)
            yield stream

    def _count(self, stream: BinaryIO, total: int) -> None:
        stream.truncate(0)
        stream.write(str(total).encode())

    def _warn(self, kind: str, message: str) -> None:
        """Once a process for each kind: one full disk concerns every video."""
        if kind not in self._said:
            self._said.add(kind)
            logger.warning(message)


def memory_cache(limit: int) -> FrameCache:
    """A cache of at most `limit` bytes that ends with the process that made it, or with its last worker.

    Its files lie in shared memory where that is large enough (containers often have 64 MB of it), else in the
    temporary folder, which the system keeps in memory as far as it can.
    """
    shared = Path("/dev/shm")
    roomy = os.access(shared, os.W_OK) and shutil.disk_usage(shared).free >= limit
    place = shared if roomy else Path(tempfile.gettempdir())
    _remove_left_over(place)
    folder = Path(tempfile.mkdtemp(prefix=PREFIX, dir=place))
    cache = FrameCache(folder, limit, mapped=True)
    lock = _locked(folder / "new")  # held, also by forked workers, as long as the folder is used
    (folder / "new").rename(folder / "owner")
    cache._owner = weakref.finalize(cache, _remove, folder, lock, os.getpid())
    return cache


def _locked(file: Path) -> io.IOBase:
    stream = file.open("ab")
    fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
    return stream


def _remove(folder: Path, lock: io.IOBase, owner: int) -> None:
    if os.getpid() == owner:  # not a forked worker that ends earlier
        shutil.rmtree(folder, ignore_errors=True)
    lock.close()


def _remove_left_over(place: Path) -> None:
    """Folders whose processes were killed: nobody holds their lock."""
    for folder in place.glob(f"{PREFIX}*"):
        if (folder / "owner").exists():
            with contextlib.suppress(OSError):  # it is locked, or another user's
                _locked(folder / "owner").close()
                shutil.rmtree(folder, ignore_errors=True)
