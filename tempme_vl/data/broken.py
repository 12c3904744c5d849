"""Videos that cannot be read: those that are missing before a run starts, and the account of those met in it."""

from __future__ import annotations

import errno
import json
import logging
import os
from collections.abc import Iterable
from pathlib import Path
from typing import IO, Any

from tempme_vl.data.splits import Video
from tempme_vl.messages import few

logger = logging.getLogger(__name__)


class MissingVideosError(ValueError):
    """Too many videos are missing. `paths` are all of them."""

    def __init__(self, message: str, paths: tuple[Path, ...] = ()) -> None:
        super().__init__(message, paths)
        self.paths = paths

    def __str__(self) -> str:
        return str(self.args[0])


def check_videos(videos: Iterable[Video], most_missing: float = 0.0) -> list[Path]:
    """The videos that are not there, each path once, in order. Only looks for the files: no video is opened.

    Args:
        most_missing: the share of the videos (0 to 1) that may be missing.

    Raises:
        MissingVideosError: more are missing; it counts them and names the first, and `paths` holds all.
        ValueError: a share outside 0 to 1.
    """
    if not 0 <= most_missing <= 1:
        raise ValueError(f"most_missing is a share from 0 to 1; got {most_missing}")
    paths = list(dict.fromkeys(video.path for video in videos))
    missing = [path for path in paths if not path.is_file()]
    if len(missing) > most_missing * len(paths):
        raise MissingVideosError(
            f"{len(missing)} of {len(paths)} videos are missing, more than the share of {most_missing:g} that may be: "
            f"{few(missing)}",
            tuple(missing),
        )
    return missing


class BrokenLog:
    """JSON lines about videos that could not be read, and about those that could be again, by any number of processes.

    A process writes one line when it first meets a broken video. When any later reads it, as after its file was
    repaired, a line with "repaired" takes it off the list.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._written: set[str] = set()
        self._listed: dict[str, str] = {}
        self._size = 0

    def add(self, video: Video, cause: str) -> None:
        """Raises OSError that names the log when it cannot be written: it is part of the results."""
        self._refresh()
        if video.video_id not in self._written or video.video_id not in self._listed:
            self._written.add(video.video_id)
            self._write({"video_id": video.video_id, "path": str(video.path), "cause": cause})

    def remove(self, video: Video) -> None:
        """Takes a video that was read off the list; costs one look at the size of the file."""
        self._refresh()
        if video.video_id in self._listed:
            self._write({"video_id": video.video_id, "path": str(video.path), "repaired": True})

    def _refresh(self) -> None:
        try:
            size = self.path.stat().st_size
        except FileNotFoundError:
            size = 0
        if size != self._size:
            self._listed, self._size = _listed(self.path, warn=False), size

    def _write(self, entry: dict[str, Any]) -> None:
        line = json.dumps(entry).encode() + b"\n"
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.path.open("a+b", buffering=0) as stream:
                if stream.seek(0, os.SEEK_END) and not _ends_a_line(stream):
                    line = b"\n" + line
                if stream.write(line) != len(line):
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        except OSError as error:
            raise OSError(error.errno, f"{error.strerror} while listing {entry['path']}", str(self.path)) from error


def broken_videos(log: Path) -> dict[str, str]:
    """What a broken log lists: video id -> cause, each video once whichever processes met it.

    Lines that are cut off, as by a full disk or a killed process, are left out with a warning.
    """
    return _listed(log, warn=True)


def _listed(log: Path, warn: bool) -> dict[str, str]:
    if not log.is_file():
        return {}
    listed: dict[str, str] = {}
    for number, line in enumerate(log.read_bytes().split(b"\n"), start=1):
        if not line.strip():
            continue
        try:
            entry = json.loads(line)
            if entry.get("repaired"):
                listed.pop(entry["video_id"], None)
            else:
                listed[entry["video_id"]] = entry["cause"]
        except (ValueError, KeyError, TypeError, AttributeError):
            if warn:
                logger.warning("%s, line %d is cut off or damaged and left out: %r", log, number, line[:80])
    return listed


def _ends_a_line(stream: IO[bytes]) -> bool:
    stream.seek(-1, os.SEEK_END)
    return stream.read(1) == b"\n"
