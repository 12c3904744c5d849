"""DiDeMo (Hendricks et al., ICCV 2017) as paragraph retrieval: the first 31 seconds and all descriptions."""

from __future__ import annotations

import csv
import json
from pathlib import Path

from tempme_vl.data.splits import RetrievalSplit, check_split_name, find_annotations, make_split

SPLITS = ("train", "val", "test")
END_SECONDS = 31.0


def read_split(root: str | Path, split: str, video_root: str | Path | None = None) -> RetrievalSplit:
    """Reads the paragraphs of didemo_{split}_label.tmass.csv, or else {split}_data.json with single descriptions.

    csv: columns `video_path` and `text`; 8,362 / 1,062 / 1,004 paragraphs. JSON: the descriptions of one video
    (1,065 and 1,004 videos in val and test), joined by a space in the file's order. Videos are known by their name
    without extension, since one video occurs with several. 64 words, 64 frames.
    """
    check_split_name("didemo", split, SPLITS)
    names = (f"didemo_{split}_label.tmass.csv", f"{split}_data.json")
    try:
        (path,) = find_annotations(root, names[:1], ("didemo_data",))
    except ValueError as error:
        try:
            (path,) = find_annotations(root, names[1:], ("didemo_data",))
        except ValueError:
            raise ValueError(f"{error} (the original {names[1]} would do as well)") from None
    descriptions: dict[str, list[str]] = {}
    if path.suffix == ".csv":
        with path.open(newline="", encoding="utf-8") as file:
            reader = csv.DictReader(file)
            if not {"video_path", "text"} <= set(reader.fieldnames or ()):
                raise ValueError(f"{path}: expected the columns video_path, text; found {reader.fieldnames}")
            for row in reader:
                descriptions.setdefault(_video_id(row["video_path"]), []).append(row["text"])
    else:
        for entry in json.loads(path.read_text(encoding="utf-8")):
            descriptions.setdefault(_video_id(entry["video"]), []).append(entry["description"])
    captions = {i: [" ".join(text.strip() for text in texts)] for i, texts in descriptions.items()}
    times = dict.fromkeys(captions, (0.0, END_SECONDS))
    folders = ("DiDeMo_Videos", "all_videos")
    return make_split(f"didemo/{split}", captions, root, video_root, folders, times, max_words=64, num_frames=64)


def _video_id(path: str) -> str:
    return path.rsplit("/", 1)[-1].partition(".")[0]
