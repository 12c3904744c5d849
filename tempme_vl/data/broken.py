"""Videos that cannot be read: those that are missing before a run starts, and the account of those met in it."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from tempme_vl.data.files import few
from tempme_vl.data.splits import Clip


class MissingVideosError(ValueError):
    """Too many videos are missing. `paths` are all of them."""

    def __init__(self, message: str, paths: tuple[Path, ...] = ()) -> None:
        super().__init__(message, paths)
        self.paths = paths

    def __str__(self) -> str:
        return str(self.args[0])


def check_videos(clips: Iterable[Clip], most_missing: float = 0.0) -> list[Path]:
    """The videos that are not there, each path once, in order. Only looks for the files: no video is opened.

    Args:
        most_missing: the share of the videos (0 to 1) that may be missing.

    Raises:
        MissingVideosError: more are missing; it counts them and names the first, and `paths` holds all.
        ValueError: a share outside 0 to 1.
    """
    if not 0 <= most_missing <= 1:
        raise ValueError(f"most_missing is a share from 0 to 1; got {most_missing}")
    paths = list(dict.fromkeys(clip.path for clip in clips))
    missing = [path for path in paths if not path.is_file()]
    if len(missing) > most_missing * len(paths):
        raise MissingVideosError(
            f"{len(missing)} of {len(paths)} videos are missing, more than the share of {most_missing:g} that may be: "
            f"{few(missing)}",
            tuple(missing),
        )
    return missing
