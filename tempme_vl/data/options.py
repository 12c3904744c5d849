"""Where a data set lies, as options of commands."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

EMBEDDED = "motion"  # the data set of a first try
MOTION_ROOT = Path("runs/motion-data")  # where the embedded data set is rendered unless one says otherwise


@dataclass(frozen=True, kw_only=True)
class DataOptions:
    """Where the data set lies."""

    data_root: Path | None = None
    """Folder of the annotation files (and videos) in their public layout; for motion, where to render it."""
    video_root: Path | None = None
    """Folder of the videos, if it is not below --data-root."""
    annotations: Path | None = None
    """The JSON-lines file of --dataset jsonl."""
