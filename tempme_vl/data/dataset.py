"""What this package knows of a data set: a record, of which readers, command lines, recipes and docs/datasets.md are
made. See docs/add_a_dataset.md."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic, TypeVar

if TYPE_CHECKING:
    from tempme_vl.data.splits import RetrievalSplit
    from tempme_vl.data.videoqa import QASplit

S = TypeVar("S", bound=Any)  # RetrievalSplit or QASplit


@dataclass(frozen=True)
class Place:
    """Where a data set lies, as --data-root, --video-root and --annotations say.

    Attributes:
        data_root: folder of its annotation files.
        video_root: folder of its videos; None: the usual one below `data_root`.
        annotations: a file of one's own.
    """

    data_root: str | Path | None = None
    video_root: str | Path | None = None
    annotations: str | Path | None = None

    @property
    def root(self) -> Path:
        """`data_root`, of a data set that needs it."""
        assert self.data_root is not None
        return Path(self.data_root)


@dataclass(frozen=True)
class SplitNames:
    """Which splits are trained, chosen and tested on.

    Attributes:
        train: None for all of a file whose lines have no splits.
        val: None for none.
        test: None for the training split, where there is no other.
        holdout: videos taken out of `train` to choose checkpoints by, where there is no `val`.
    """

    train: str | None = "train"
    val: str | None = None
    test: str | None = "test"
    holdout: int = 0


@dataclass(frozen=True)
class Texts(Generic[S]):
    """What a data set says of its videos: captions, or questions.

    Attributes:
        read: (place, name of a split) -> the split. The videos need not be there. Raises ValueError that lists the
            files expected and found for a wrong folder, and AnnotationError for files that are not as expected.
        splits: the names that `read` knows; none where they are those of a file, which may have none: then `read` gets
            None.
        usual: what is trained, chosen and tested on unless one says otherwise.
        named: (place, names) -> the names by which the splits of a file are read.
    """

    read: Callable[[Place, Any], S]
    splits: tuple[str, ...] = ("train", "val", "test")
    usual: SplitNames = SplitNames(val="val")
    named: Callable[[Place, SplitNames], SplitNames] = lambda place, names: names


@dataclass(frozen=True, kw_only=True)
class DataSet:
    """A data set.

    Attributes:
        title: its name and where it is from.
        files: its annotation files, in words.
        captions, questions: what it has of both; one at least.
        max_words, num_frames: how many words of a caption and frames of a video are usual.
        needs: what of a `Place` must be given.
        root: where it lies unless one says otherwise.
        rendered: whether this package makes it, videos included: small, for tiny models, and its files are trusted.
        options: values of the recipes' options that differ from their defaults.
        question_kind: a question's kind, by which reports give accuracies.

    Raises:
        ValueError: neither captions nor questions, questions with `holdout`, or a need that a place does not have.
    """

    title: str
    files: str
    captions: Texts[RetrievalSplit] | None = None
    questions: Texts[QASplit] | None = None
    max_words: int = 32
    num_frames: int = 12
    needs: tuple[str, ...] = ("data_root",)
    root: Path | None = None
    rendered: bool = False
    options: Mapping[str, Any] = field(default_factory=dict)
    question_kind: Callable[[str], str] | None = None

    def __post_init__(self) -> None:
        if self.captions is None and self.questions is None:
            raise ValueError(f"{self.title}: a data set has captions, questions or both")
        if self.questions is not None and self.questions.usual.holdout:
            raise ValueError(f"{self.title}: only videos with captions can be held out; name a split of the questions")
        if unknown := set(self.needs) - set(Place.__dataclass_fields__):
            raise ValueError(f"{self.title}: a place has no {', '.join(sorted(unknown))}")
