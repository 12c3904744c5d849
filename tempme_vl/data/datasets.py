"""The data sets that have a reader, by name. A new one is a module with `read_split` and a line in each table here."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from tempme_vl.data import activitynet, didemo, lsmdc, motion, msrvtt, msvd
from tempme_vl.data.jsonl import jsonl_names, jsonl_splits, read_caption_lines
from tempme_vl.data.splits import RetrievalSplit, holdout_validation, known_split, noted, trained_on


def _read_motion(root: str | Path, split: str, video_root: str | Path | None) -> RetrievalSplit:
    split = known_split("motion", split, msrvtt.SPLITS)  # before it is rendered
    return msrvtt.read_split(motion.render_motion(root), split, video_root)


# (root, split, video_root) -> RetrievalSplit
DATASETS: dict[str, Callable[[str | Path, str, str | Path | None], RetrievalSplit]] = {
    "motion": _read_motion,
    "msrvtt": msrvtt.read_split,
    "msvd": msvd.read_split,
    "activitynet": activitynet.read_split,
    "didemo": didemo.read_split,
    "lsmdc": lsmdc.read_split,
}


@dataclass(frozen=True)
class SplitNames:
    """Which splits a data set is usually trained, chosen and tested on.

    `holdout`: videos taken out of `train` to choose checkpoints by, where there is no `val`.
    """

    train: str = "train"
    val: str | None = None
    test: str = "test"
    holdout: int = 0


USUAL_SPLITS = {
    "motion": SplitNames("train_9k", None, "test_1k", holdout=96),
    "msrvtt": SplitNames("train_9k", None, "test_1k", holdout=500),
    "msvd": SplitNames(val="val"),
    "activitynet": SplitNames(test="val_1", holdout=500),
    "didemo": SplitNames(val="val"),
    "lsmdc": SplitNames(val="val"),
    "jsonl": SplitNames(),
}


def usual_splits(dataset: str) -> SplitNames:
    """ValueError for an unknown data set."""
    if dataset not in USUAL_SPLITS:
        raise ValueError(f"unknown data set {dataset!r}; expected one of {', '.join(USUAL_SPLITS)}")
    return USUAL_SPLITS[dataset]


def load_split(dataset: str, root: str | Path, split: str, video_root: str | Path | None = None) -> RetrievalSplit:
    """Reads one split of a data set from its public annotation files under `root`; "motion" is rendered there first.

    Videos are looked for in `video_root`, or else in the usual folders under `root`; they need not be there.
    ValueError for an unknown data set or split (lists the known ones) and for a wrong folder (lists the files
    expected and found).
    """
    if dataset not in DATASETS:
        raise ValueError(f"unknown data set {dataset!r}; known: {', '.join(DATASETS)}")
    return DATASETS[dataset](root, split, video_root)


@dataclass(frozen=True)
class Source:
    """Where a data set lies: `root` and `video_root` as in `load_split`, or, for "jsonl", a file and `video_root`.

    ValueError for an unknown data set, and where what it needs is not given.
    """

    dataset: str
    root: Path | None = None
    video_root: Path | None = None
    annotations: Path | None = None

    def __post_init__(self) -> None:
        usual_splits(self.dataset)
        if self.dataset == "jsonl" and (self.annotations is None or self.video_root is None):
            raise ValueError("--dataset jsonl needs --annotations FILE and --video-root FOLDER")
        if self.dataset != "jsonl" and self.root is None:
            raise ValueError(f"--dataset {self.dataset} needs --data-root, the folder of its annotation files")

    def read(self, split: str | None = None) -> RetrievalSplit:
        """A split by name; None for the one that is usually tested on.

        Where no line of a JSON-lines file has a split, the usual names stand for all lines; the note says so.
        ValueError for a name that is not there; lists those that are.
        """
        if self.dataset != "jsonl":
            assert self.root is not None
            return load_split(self.dataset, self.root, split or usual_splits(self.dataset).test, self.video_root)
        assert self.annotations is not None and self.video_root is not None
        if split not in (None, "train", "test") or jsonl_splits(self.annotations):
            return read_caption_lines(self.annotations, self.video_root, split or "test")
        everything = read_caption_lines(self.annotations, self.video_root)
        return noted(everything, f"all videos of {self.annotations}, which has no splits: perhaps they were trained on")

    def read_all(self, names: SplitNames, seed: int) -> tuple[RetrievalSplit, RetrievalSplit | None, RetrievalSplit]:
        """Training, validation and test split; what is held out of training is drawn from `seed`.

        Where no line of a JSON-lines file has a split, all lines train; without its usual test split training is
        tested. A video that is trained on and validated or tested makes that split's note, which is logged too.
        ValueError for other names that are not there; lists those that are.
        """
        if self.dataset != "jsonl":
            train, test = self.read(names.train), self.read(names.test)
            val = None if names.val is None else self.read(names.val)
        else:
            assert self.annotations is not None and self.video_root is not None
            file, videos = self.annotations, self.video_root
            lines = jsonl_names(file, names.train, names.val, names.test)
            train = read_caption_lines(file, videos, lines.train)
            val = None if lines.val is None else read_caption_lines(file, videos, lines.val)
            test = train if lines.test is None else read_caption_lines(file, videos, lines.test)
        if val is None and names.holdout:
            train, val = holdout_validation(train, names.holdout, seed)
        if val is not None:
            val = noted(val, trained_on(train.videos, val.videos))
        return train, val, noted(test, trained_on(train.videos, test.videos))
