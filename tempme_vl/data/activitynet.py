"""ActivityNet Captions (Krishna et al., ICCV 2017) as paragraph retrieval: a whole video and all its sentences."""

from __future__ import annotations

import json
import math
from pathlib import Path

from tempme_vl.data.splits import RetrievalSplit, check_split_name, find_annotations, make_split

FILES = {"train": "train.json", "val_1": "val_1.json"}


def read_split(root: str | Path, split: str, video_root: str | Path | None = None) -> RetrievalSplit:
    """Reads train.json or val_1.json: `{id: {"duration", "timestamps", "sentences"}}`; 10,009 and 4,917 videos.

    The caption is all sentences joined by a space, the clip 0 to ceil(duration) seconds; 64 words, 64 frames.
    "val_1" is what papers test on. The public id lists hold a few ids without annotations, and are not needed.
    """
    check_split_name("activitynet", split, FILES)
    (path,) = find_annotations(root, [FILES[split]], ("captions",))
    data = json.loads(path.read_text(encoding="utf-8"))
    captions = {i: [" ".join(sentence.strip() for sentence in video["sentences"])] for i, video in data.items()}
    times = {i: (0.0, float(math.ceil(video["duration"]))) for i, video in data.items()}
    folders = ("Activity_Videos", "Videos")
    return make_split(f"activitynet/{split}", captions, root, video_root, folders, times, max_words=64, num_frames=64)
