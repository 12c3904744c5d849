"""MSR-VTT (Xu et al., CVPR 2016): 10,000 clips with 20 captions each, in the layout of CLIP4Clip's files."""

from __future__ import annotations

import csv
import json
from pathlib import Path

from tempme_vl.data.splits import RetrievalSplit, check_split_name, find_annotations, make_split

ALL_CAPTIONS = "MSRVTT_data.json"
TRAIN_LISTS = {"train_9k": "MSRVTT_train.9k.csv", "train_7k": "MSRVTT_train.7k.csv"}
TEST_1K = "MSRVTT_JSFUSION_test.csv"
SPLITS = (*TRAIN_LISTS, "test_1k", "test_full")

ANNOTATION_FOLDERS = ("msrvtt_data", "MSRVTT", "csv")
VIDEO_FOLDERS = ("MSRVTT_Videos", "all", "TrainValVideo")


def read_split(root: str | Path, split: str, video_root: str | Path | None = None) -> RetrievalSplit:
    """Reads a split. Needs MSRVTT_data.json (but for "test_1k") and the csv file of the split, under `root`.

    "train_9k", "train_7k": 9,000 and 7,010 clips with all their captions. "test_1k": the 1k-A test, one caption
    per clip (995 of them unique). "test_full": the 2,990 clips marked "test" with 20 captions each. There is no
    validation split: hold one out with `splits.holdout_validation`. ValueError names what is missing.
    """
    check_split_name("msrvtt", split, SPLITS)
    if split == "test_1k":
        (path,) = find_annotations(root, [TEST_1K], ANNOTATION_FOLDERS)
        rows = _rows(path, ("video_id", "sentence"))
        captions: dict[str, list[str]] = {}
        for number, row in enumerate(rows, start=2):
            if row["video_id"] in captions:
                raise ValueError(f"{path}, line {number}: {row['video_id']} again; expected one caption per clip")
            captions[row["video_id"]] = [row["sentence"]]
        return make_split("msrvtt/test_1k", captions, root, video_root, VIDEO_FOLDERS)

    lists = [TRAIN_LISTS[split]] if split in TRAIN_LISTS else []
    path, *list_paths = find_annotations(root, [ALL_CAPTIONS, *lists], ANNOTATION_FOLDERS)
    data = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(data, dict) or not {"videos", "sentences"} <= set(data):
        raise ValueError(f'{path}: expected {{"videos": [...], "sentences": [...]}}')
    if list_paths:
        ids = [row["video_id"] for row in _rows(list_paths[0], ("video_id",))]
    else:
        ids = [video["video_id"] for video in data["videos"] if video.get("split") == "test"]
    captions = {video_id: [] for video_id in ids}
    for sentence in data["sentences"]:
        if sentence["video_id"] in captions:
            captions[sentence["video_id"]].append(sentence["caption"])
    return make_split(f"msrvtt/{split}", captions, root, video_root, VIDEO_FOLDERS)


def _rows(path: Path, columns: tuple[str, ...]) -> list[dict[str, str]]:
    with path.open(newline="", encoding="utf-8") as file:
        reader = csv.DictReader(file)
        if not set(columns) <= set(reader.fieldnames or ()):
            raise ValueError(f"{path}: expected the columns {', '.join(columns)}; found {reader.fieldnames}")
        return list(reader)
