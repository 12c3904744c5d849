"""Data sets in their places: splits by the names that records give, and the names of those that have captions or
questions. The records themselves are `tempme_vl.DATASETS`."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from tempme_vl.data.dataset import DataSet, Place, SplitNames, Texts
from tempme_vl.data.splits import RetrievalSplit, holdout_validation, known_split, noted, trained_on
from tempme_vl.data.videoqa import QASplit
from tempme_vl.registries import DATASETS

Part = Literal["captions", "questions"]
_NEEDS = {
    "data_root": "--data-root, the folder of its annotation files",
    "annotations": "--annotations FILE",
    "video_root": "--video-root FOLDER",
}


class Names:
    """The data sets that have captions, or questions: those registered meanwhile included."""

    def __init__(self, part: Part):
        self.part = part

    def __iter__(self) -> Iterator[str]:
        return (name for name in DATASETS if self._has(name))

    def __contains__(self, name: object) -> bool:
        return name in DATASETS and self._has(str(name))

    def _has(self, name: str) -> bool:
        try:
            return getattr(DATASETS[name], self.part) is not None
        except ValueError:  # of a package that cannot be imported, which is said once it is chosen
            return True


CAPTIONED, ASKED = Names("captions"), Names("questions")


@dataclass(frozen=True)
class Source:
    """A data set in its place.

    ValueError for an unknown data set, and where what it needs is not given.
    """

    dataset: str
    data_root: Path | None = None
    video_root: Path | None = None
    annotations: Path | None = None

    def __post_init__(self) -> None:
        needs = self.record.needs
        if any(getattr(self.place, name) is None for name in needs):
            raise ValueError(f"--dataset {self.dataset} needs {' and '.join(_NEEDS[name] for name in needs)}")

    @property
    def record(self) -> DataSet:
        return DATASETS[self.dataset]

    @property
    def place(self) -> Place:
        return Place(self.data_root or self.record.root, self.video_root, self.annotations)

    def captions(self, split: str | None = None) -> RetrievalSplit:
        """Videos with captions: a split by name, or by a usual synonym; None for the one that is usually tested on.

        Where no line of a JSON-lines file has a split, the usual names stand for all lines; the note says so.
        ValueError for a name that is not there, which lists those that are, and see `Texts.read`.
        """
        return self._read("captions", split)

    def questions(self, split: str | None = None) -> QASplit:
        """The questions of a split; as `captions`."""
        return self._read("questions", split)

    def all_captions(
        self, names: SplitNames | None = None, seed: int = 0
    ) -> tuple[RetrievalSplit, RetrievalSplit | None, RetrievalSplit]:
        """Training, validation and test split.

        Where no line of a JSON-lines file has a split, all lines train; without its usual test split training is
        tested. A video that is trained on and validated or tested makes that split's note, which is logged too.

        Args:
            names: default: the usual ones.
            seed: of what is held out of training.

        Raises:
            ValueError: names that are not there and not the usual ones; lists those that are.
        """
        return self._read_all("captions", names, seed)

    def all_questions(self) -> tuple[QASplit, QASplit | None, QASplit]:
        """Training, validation and test questions; as `all_captions`."""
        return self._read_all("questions", None, 0)

    def _read(self, part: Part, split: str | None) -> Any:
        return self._named(part, split or texts_of(self.dataset, part).usual.test)

    def _named(self, part: Part, split: str | None) -> Any:
        texts = texts_of(self.dataset, part)
        if split is not None and texts.splits:
            split = known_split(self.dataset, split, texts.splits)  # before anything is read or rendered
        found = texts.read(self.place, split)
        if isinstance(found, RetrievalSplit):
            return replace(found, max_words=self.record.max_words, num_frames=self.record.num_frames)
        return found

    def _read_all(self, part: Part, names: SplitNames | None, seed: int) -> Any:
        texts = texts_of(self.dataset, part)
        names = texts.named(self.place, names or texts.usual)
        train = self._named(part, names.train)
        test = train if names.test is None else self._named(part, names.test)
        val = None if names.val is None else self._named(part, names.val)
        if val is None and names.holdout:
            train, val = holdout_validation(train, names.holdout, seed)
        if val is not None:
            val = noted(val, trained_on(train.videos, val.videos))
        return train, val, noted(test, trained_on(train.videos, test.videos))


def texts_of(dataset: str, part: Part) -> Texts[Any]:
    """The captions or the questions of a data set by name.

    Raises:
        ValueError: an unknown data set, or one that has none.
    """
    texts = getattr(DATASETS[dataset], part)
    if texts is None:
        raise ValueError(f"the data set {dataset!r} has no {part}; expected one of {', '.join(Names(part))}")
    return texts


def load_split(dataset: str, root: str | Path, split: str, video_root: str | Path | None = None) -> RetrievalSplit:
    """Reads one split of a data set from its public annotation files under `root`; "motion" is rendered there first.

    Videos are looked for in `video_root`, or else in the usual folders under `root`; they need not be there.
    ValueError as `Source.captions`.
    """
    return Source(dataset, Path(root), None if video_root is None else Path(video_root)).captions(split)


def load_questions(dataset: str, root: str | Path, split: str, video_root: str | Path | None = None) -> QASplit:
    """As `load_split`, the questions. Their videos have the ids of the retrieval readers, and so the same files."""
    return Source(dataset, Path(root), None if video_root is None else Path(video_root)).questions(split)


def overview() -> str:
    """A Markdown table of all data sets, which docs/datasets.md has."""
    columns = ("`--dataset`", "what", "annotation files", "captions", "questions", "words", "frames")
    lines = [f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
    for name, record in DATASETS.items():
        splits = (_splits(texts) for texts in (record.captions, record.questions))
        cells = (f"`{name}`", record.title, record.files, *splits, record.max_words, record.num_frames)
        lines.append(f"| {' | '.join(map(str, cells))} |")
    return "\n".join(lines)


def _splits(texts: Texts[Any] | None) -> str:
    """What is trained, chosen and tested on, and what else there is."""
    if texts is None:
        return "-"
    usual = texts.usual
    val = usual.val or (f"{usual.holdout} videos held out" if usual.holdout else "-")
    others = [name for name in texts.splits if name not in (usual.train, usual.val, usual.test)]
    return f"{usual.train} / {val} / {usual.test}" + (f" (also {', '.join(others)})" if others else "")
