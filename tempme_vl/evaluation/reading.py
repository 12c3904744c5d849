"""What the evaluations of checkpoints share: how their videos are read, and which could not be."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tempme_vl.command import above_zero, at_least
from tempme_vl.evaluation.options import RetrievalOptions, VideoLLMCompareOptions, VideoQAOptions
from tempme_vl.registries import DATASETS

Options = RetrievalOptions | VideoQAOptions | VideoLLMCompareOptions


def check_reading(options: Options) -> None:
    """Raises:
    ValueError: a number that an option cannot have.
    """
    at_least(0, workers=options.workers)
    at_least(1, batch_size=options.batch_size)
    above_zero(decode_timeout=options.decode_timeout)


def decode_timeout(options: Options) -> float | None:
    """Seconds; videos that we rendered ourselves need no guard."""
    rendered = options.dataset is not None and DATASETS[options.dataset].rendered
    return None if rendered else options.decode_timeout


@contextmanager
def own_log() -> Iterator[Path]:
    """A rank's own file for broken videos; what it holds goes into the report."""
    with tempfile.TemporaryDirectory() as folder:
        yield Path(folder) / "broken.jsonl"


def all_broken(log: Path) -> dict[str, str]:
    """The broken videos of all ranks, each with its cause."""
    from tempme_vl.data.reader import broken_videos  # which needs torch, and predictions are scored without
    from tempme_vl.training import distributed

    return {name: cause for found in distributed.gather_objects(broken_videos(log)) for name, cause in found.items()}


def unreadable(report: Mapping[str, Any]) -> list[str]:
    """A line for each broken video of a report."""
    return [f"could not read {name}: {cause}" for name, cause in report.get("broken_videos", {}).items()]
