"""The video files of a folder: names below it, what the system says of them, and that they lie inside."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path, PurePosixPath

from tempme_vl.data.splits import VIDEO_EXTENSIONS


@dataclass(frozen=True)
class VideoFile:
    """A file below the folder.

    Attributes:
        path: relative to the folder, with "/".
        size: bytes.
        modified: nanoseconds since 1970.
    """

    path: str
    size: int
    modified: int


@dataclass(frozen=True)
class Problem:
    """A file that is not in the index, and why."""

    path: str
    reason: str


@dataclass(frozen=True)
class Found:
    """What lies in a folder.

    Attributes:
        files: videos by their names' endings, by path.
        problems: what cannot be taken.
        others: how many files have other endings.
        unlisted: folders that cannot be looked into, whose files may be there.
    """

    files: tuple[VideoFile, ...]
    problems: tuple[Problem, ...]
    others: int
    unlisted: tuple[str, ...] = ()

    def vanished(self, path: str) -> bool:
        """Whether a file that was here is not any more."""
        return not any(path.startswith(f"{folder}/") for folder in self.unlisted) and path not in self._names

    @cached_property
    def _names(self) -> frozenset[str]:
        return frozenset(file.path for file in self.files)


def find_videos(root: Path, without: Path) -> Found:
    """The videos of a folder and all folders below it. Links to folders are not followed, and links to files outside
    are refused.

    Args:
        without: a folder that is left out, such as the index.

    Raises:
        ValueError: no such folder.
    """
    if not root.is_dir():
        raise ValueError(f"expected a folder of videos; {root} is {'a file' if root.exists() else 'not there'}")
    files, problems, others = [], [], 0
    unlisted: list[OSError] = []
    for path in _below(root, without.resolve(), unlisted):
        name = path.relative_to(root).as_posix()
        if not name.lower().endswith(VIDEO_EXTENSIONS):
            others += 1
            continue
        try:
            files.append(_file(root, path, name))
        except (OSError, ValueError) as error:
            problems.append(Problem(_shown(name), getattr(error, "strerror", None) or str(error)))
    closed = {Path(error.filename).relative_to(root).as_posix(): str(error.strerror) for error in unlisted}
    problems += [Problem(_shown(name), f"the folder cannot be listed: {reason}") for name, reason in closed.items()]
    return Found(tuple(files), tuple(problems), others, tuple(closed))


def inside(root: Path, name: str) -> Path:
    """The file of a relative name.

    Raises:
        ValueError: the name, or the link that it is, leads out of the folder.
    """
    pure = PurePosixPath(name)
    if pure.is_absolute() or ".." in pure.parts or "\0" in name or not name:
        raise ValueError(f"expected the name of a file below the folder; got {name!r}")
    path = root / pure
    if not path.resolve().is_relative_to(root.resolve()):
        raise ValueError("a link that leads out of the folder; copy the file into it, or index where it lies")
    return path


def _file(root: Path, path: Path, name: str) -> VideoFile:
    try:
        name.encode()
    except UnicodeEncodeError:
        raise ValueError("its name is not UTF-8; rename it") from None
    facts = inside(root, name).stat()
    if not stat.S_ISREG(facts.st_mode):
        raise ValueError("no regular file")
    return VideoFile(name, facts.st_size, facts.st_mtime_ns)


def _below(root: Path, without: Path, unlisted: list[OSError]) -> Iterator[Path]:
    """All files, folder by folder, in order of their names."""
    for folder, folders, names in os.walk(root, onerror=unlisted.append):
        place = Path(folder)
        folders[:] = sorted(name for name in folders if (place / name).resolve() != without)
        yield from (place / name for name in sorted(names))


def _shown(name: str) -> str:
    """A name as text that can be written."""
    return name.encode(errors="backslashreplace").decode()
