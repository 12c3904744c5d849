"""DiDeMo (Hendricks et al., ICCV 2017) as paragraph retrieval: the first 31 seconds and all descriptions."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tempme_vl.data.dataset import DataSet, Place, Texts
from tempme_vl.data.files import (
    as_file_id,
    as_text,
    check_distinct,
    csv_rows,
    each_object,
    errors_at,
    json_lines,
    load_json,
)
from tempme_vl.data.splits import RetrievalSplit, find_either, make_split

END_SECONDS = 31.0


def read_split(place: Place, split: str) -> RetrievalSplit:
    """Reads the paragraphs of didemo_{split}_label.tmass.csv, or else of {split}.jsonl, or else {split}_data.json with
    single descriptions.

    csv: columns `video_path` and `text`; 8,362 / 1,062 / 1,004 paragraphs. JSON lines, as TESTA has them:
    `{"clip_name", "caption"}`; several of one video are all its captions, wherever they stand. JSON: the descriptions
    of one video (1,065 and 1,004 videos in val and test), joined by a space in the file's order. Videos are known by
    their name without extension, since one video occurs with several. 64 words, 64 frames.
    """
    names = (f"didemo_{split}_label.tmass.csv", f"{split}.jsonl", f"{split}_data.json")
    path = find_either(place.root, names, ("didemo_data",))
    captions = READERS[path.suffix](path)
    times = dict.fromkeys(captions, (0.0, END_SECONDS))
    folders = ("DiDeMo_Videos", "all_videos")
    return make_split(f"didemo/{split}", path, captions, place, folders, times)


def _paragraphs(path: Path) -> dict[str, list[str]]:
    paragraphs: dict[str, list[str]] = {}
    for place, row in csv_rows(path, ("video_path", "text")):
        with errors_at(place):
            video_id = _video_id(row["video_path"])
            if video_id in paragraphs:
                raise ValueError(f"{video_id} again; expected one paragraph per video")
            paragraphs[video_id] = [as_text("text", row["text"])]
    return paragraphs


def _descriptions(path: Path) -> dict[str, list[str]]:
    descriptions: dict[str, list[str]] = {}

    def read(entry: dict[str, Any]) -> None:
        video_id = _video_id(as_text("video", entry.get("video")))
        descriptions.setdefault(video_id, []).append(as_text("description", entry.get("description")))

    entries = load_json(path)
    for _ in each_object(str(path), entries, read):
        pass
    check_distinct(str(path), "annotation_id", entries)
    return {i: [" ".join(text.strip() for text in texts)] for i, texts in descriptions.items()}


def _captions(path: Path) -> dict[str, list[str]]:
    captions: dict[str, list[str]] = {}
    for place, entry in json_lines(path):
        with errors_at(place):
            video_id = _video_id(as_text("clip_name", entry.get("clip_name")))
            captions.setdefault(video_id, []).append(as_text("caption", entry.get("caption")))
    return captions


READERS = {".csv": _paragraphs, ".jsonl": _captions, ".json": _descriptions}


def _video_id(path: str) -> str:
    return as_file_id(path.rsplit("/", 1)[-1].partition(".")[0])


DATASET = DataSet(
    title="DiDeMo (Hendricks et al., ICCV 2017), paragraphs",
    files="didemo_{train,val,test}_label.tmass.csv, or {train,val,test}.jsonl, or {train,val,test}_data.json",
    captions=Texts(read_split),
    max_words=64,
    num_frames=64,
)
