"""MSR-VTT (Xu et al., CVPR 2016): 10,000 videos with 20 captions each, in the layout of CLIP4Clip's files."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tempme_vl.data.dataset import DataSet, Place, SplitNames, Texts
from tempme_vl.data.files import (
    AnnotationError,
    as_file_id,
    as_text,
    check_distinct,
    csv_rows,
    each_object,
    errors_at,
    load_json,
)
from tempme_vl.data.splits import RetrievalSplit, find_annotations, make_split
from tempme_vl.messages import few, shown

ALL_CAPTIONS = "MSRVTT_data.json"
TRAIN_LISTS = {"train_9k": "MSRVTT_train.9k.csv", "train_7k": "MSRVTT_train.7k.csv"}
TEST_1K = "MSRVTT_JSFUSION_test.csv"
SPLITS = (*TRAIN_LISTS, "test_1k", "test_full")

ANNOTATION_FOLDERS = ("msrvtt_data", "MSRVTT", "csv")
VIDEO_FOLDERS = ("MSRVTT_Videos", "all", "TrainValVideo")


def read_split(place: Place, split: str) -> RetrievalSplit:
    """Reads a split. Needs MSRVTT_data.json (but for "test_1k") and the csv file of the split, under `root`.

    "train_9k", "train_7k": 9,000 and 7,010 videos with all their captions. "test_1k": the 1k-A test, one caption
    per video (995 of them unique). "test_full": the 2,990 videos marked "test" with 20 captions each. There is no
    validation split: hold one out with `splits.holdout_validation`. ValueError names what is missing.
    """
    if split == "test_1k":
        (source,) = find_annotations(place.root, [TEST_1K], ANNOTATION_FOLDERS)
        captions = {row["video_id"]: [row["sentence"]] for row in _rows(source, ("video_id", "sentence"))}
        return make_split(f"msrvtt/{split}", source, captions, place, VIDEO_FOLDERS)
    lists = [TRAIN_LISTS[split]] if split in TRAIN_LISTS else []
    path, *list_paths = find_annotations(place.root, [ALL_CAPTIONS, *lists], ANNOTATION_FOLDERS)
    source, *_ = *list_paths, path
    captions_of, marks = _all_captions(path)
    if list_paths:
        ids = [row["video_id"] for row in _rows(source, ("video_id",))]
    else:
        ids = _marked_test(path, marks)
    captions = {video_id: captions_of.get(video_id, []) for video_id in ids}
    return make_split(f"msrvtt/{split}", source, captions, place, VIDEO_FOLDERS)


def _rows(path: Path, columns: tuple[str, ...]) -> Iterator[dict[str, str]]:
    """The rows of a csv file with these columns, each of another video."""
    seen = set()
    for place, row in csv_rows(path, columns):
        with errors_at(place):
            video_id = as_file_id(row["video_id"])
            if video_id in seen:
                raise ValueError(f"{video_id} again; expected one row per video")
            for column in columns:
                as_text(column, row[column])
        seen.add(video_id)
        yield row


def _all_captions(path: Path) -> tuple[dict[str, list[str]], dict[str, object]]:
    """The captions of every video of ALL_CAPTIONS, and the split that it is marked with, by id."""
    data = load_json(path)
    if not isinstance(data, dict) or not {"videos", "sentences"} <= set(data):
        raise AnnotationError(f'{path}: expected {{"videos": [...], "sentences": [...]}}')

    def video(entry: dict[str, Any]) -> tuple[str, object]:
        return as_file_id(entry.get("video_id")), entry.get("split")

    marks = dict(each_object(f"{path}, videos", data["videos"], video))
    check_distinct(f"{path}, videos", "video_id", data["videos"])
    captions: dict[str, list[str]] = {video_id: [] for video_id in marks}

    def sentence(entry: dict[str, Any]) -> None:
        video_id = entry.get("video_id")
        texts = captions.get(video_id) if isinstance(video_id, str) else None
        if texts is None:
            raise ValueError(f"{shown(video_id)} is none of the {len(captions)} videos")
        texts.append(as_text("caption", entry.get("caption")))

    for _ in each_object(f"{path}, sentences", data["sentences"], sentence):
        pass
    check_distinct(f"{path}, sentences", "sen_id", data["sentences"])
    return captions, marks


def _marked_test(path: Path, marks: dict[str, object]) -> list[str]:
    if odd := [video_id for video_id, mark in marks.items() if mark not in ("train", "validate", "test")]:
        raise AnnotationError(
            f"{path}, videos: expected the splits train, validate and test; {len(odd)} have another or none: {few(odd)}"
        )
    return [video_id for video_id, mark in marks.items() if mark == "test"]


DATASET = DataSet(
    title="MSR-VTT (Xu et al., CVPR 2016)",
    files=f"{ALL_CAPTIONS}, {', '.join(TRAIN_LISTS.values())}, {TEST_1K}",
    captions=Texts(read_split, SPLITS, SplitNames("train_9k", None, "test_1k", holdout=500)),
)
