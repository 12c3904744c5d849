"""Anybody's own videos, with captions or questions about them in a JSON-lines file: the data set "jsonl"."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

from tempme_vl.data.dataset import DataSet, Place, SplitNames, Texts
from tempme_vl.data.jsonl import jsonl_names, jsonl_splits, read_caption_lines
from tempme_vl.data.splits import RetrievalSplit, noted
from tempme_vl.data.videoqa import QASplit, read_question_lines

S = TypeVar("S", bound=Any)


def captions(place: Place, split: str | None) -> RetrievalSplit:
    """The lines of a split; None for all. Where no line has a split, "train" and "test" mean all, which is noted."""
    return _lines(read_caption_lines, place, split)


def questions(place: Place, split: str | None) -> QASplit:
    """As `captions`."""
    return _lines(read_question_lines, place, split)


def _lines(read: Callable[..., S], place: Place, split: str | None) -> S:
    file = place.annotations
    assert file is not None
    if split not in ("train", "test") or jsonl_splits(file):
        return read(file, place.video_root, split)
    everything = read(file, place.video_root)
    return noted(everything, f"all videos of {file}, which has no splits: perhaps they were trained on")


def _named(place: Place, names: SplitNames) -> SplitNames:
    assert place.annotations is not None
    return jsonl_names(place.annotations, names)


DATASET = DataSet(
    title="your own videos",
    files="a JSON-lines file: file, caption(s) or question and answer(s), optional start, end, split, id, options",
    captions=Texts(captions, (), SplitNames(), _named),
    questions=Texts(questions, (), SplitNames(), _named),
    needs=("annotations", "video_root"),
)
