"""MSVD (Chen and Dolan, ACL 2011): 1,970 clips, about 40 captions each, many of them per test clip too."""

from __future__ import annotations

import json
from pathlib import Path

from tempme_vl.data.splits import RetrievalSplit, check_split_name, find_annotations, make_split

SPLITS = ("train", "val", "test")


def read_split(root: str | Path, split: str, video_root: str | Path | None = None) -> RetrievalSplit:
    """Reads captions_msvd.json (`{id: [captions]}`) and {train,val,test}_list.txt under `root`.

    1,200 / 100 / 670 clips. Pickled captions of other layouts are not read: unpickling runs foreign code.
    """
    check_split_name("msvd", split, SPLITS)
    captions_path, list_path = find_annotations(root, ["captions_msvd.json", f"{split}_list.txt"], ("msvd_data",))
    captions = json.loads(captions_path.read_text(encoding="utf-8"))
    ids = list_path.read_text(encoding="utf-8").split()
    unknown = [video_id for video_id in ids if video_id not in captions]
    if unknown:
        raise ValueError(f"{list_path}: {len(unknown)} ids have no captions in {captions_path}, e.g. {unknown[0]}")
    return make_split(f"msvd/{split}", {i: captions[i] for i in ids}, root, video_root, ("MSVD_Videos", "YouTubeClips"))
