"""The data sets that have a reader, by name. A new one is a module with `read_split` and one line here."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from tempme_vl.data import activitynet, didemo, lsmdc, msrvtt, msvd
from tempme_vl.data.splits import RetrievalSplit

# (root, split, video_root) -> RetrievalSplit
DATASETS: dict[str, Callable[[str | Path, str, str | Path | None], RetrievalSplit]] = {
    "msrvtt": msrvtt.read_split,
    "msvd": msvd.read_split,
    "activitynet": activitynet.read_split,
    "didemo": didemo.read_split,
    "lsmdc": lsmdc.read_split,
}


def load_split(dataset: str, root: str | Path, split: str, video_root: str | Path | None = None) -> RetrievalSplit:
    """Reads one split of a data set from its public annotation files under `root`.

    Videos are looked for in `video_root`, or else in the usual folders under `root`; they need not be there.
    ValueError for an unknown data set or split (lists the known ones) and for a wrong folder (lists the files
    expected and found).
    """
    if dataset not in DATASETS:
        raise ValueError(f"unknown data set {dataset!r}; known: {', '.join(DATASETS)}")
    return DATASETS[dataset](root, split, video_root)
