"""MSVD (Chen and Dolan, ACL 2011): 1,970 videos, about 40 captions each, many of them per test video too."""

from __future__ import annotations

from pathlib import Path

from tempme_vl.data.files import AnnotationError, as_file_id, as_texts, errors_at, load_json, read_lines
from tempme_vl.data.splits import RetrievalSplit, find_annotations, known_split, make_split
from tempme_vl.messages import few, shown

SPLITS = ("train", "val", "test")


def read_split(root: str | Path, split: str, video_root: str | Path | None = None) -> RetrievalSplit:
    """Reads captions_msvd.json (`{id: [captions]}`) and {train,val,test}_list.txt under `root`.

    1,200 / 100 / 670 videos. Pickled captions of other layouts are not read: unpickling runs foreign code.
    """
    split = known_split("msvd", split, SPLITS)
    captions_path, list_path = find_annotations(root, ["captions_msvd.json", f"{split}_list.txt"], ("msvd_data",))
    data = load_json(captions_path)
    if not isinstance(data, dict):
        raise AnnotationError(f"{captions_path}: expected {{id: [captions]}}; got {shown(data)}")
    captions: dict[str, list[str]] = {}
    for video_id, texts in data.items():
        with errors_at(f"{captions_path}, entry {shown(video_id)}"):
            captions[as_file_id(video_id)] = list(as_texts("captions", texts))
    chosen: dict[str, list[str]] = {}
    unknown = []
    for place, line in read_lines(list_path):
        with errors_at(place):
            video_id = as_file_id(line.strip())
            if video_id in chosen:
                raise ValueError(f"{video_id} again")
        if video_id in captions:
            chosen[video_id] = captions[video_id]
        else:
            unknown.append(video_id)
    if unknown:
        raise AnnotationError(
            f"{list_path}: {len(unknown)} ids have no captions in {captions_path}, e.g. {few(unknown)}"
        )
    return make_split(f"msvd/{split}", list_path, chosen, root, video_root, ("MSVD_Videos", "YouTubeClips"))
