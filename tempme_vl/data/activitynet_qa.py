"""ActivityNet-QA (Yu et al., AAAI 2019): questions about videos of ActivityNet."""

from __future__ import annotations

from tempme_vl.data.activitynet import VIDEO_FOLDERS
from tempme_vl.data.dataset import DataSet, Place, Texts
from tempme_vl.data.splits import find_annotations
from tempme_vl.data.videoqa import QASplit, make_questions, read_question_file


def read_split(place: Place, split: str) -> QASplit:
    """Reads {split}_q.json and {split}_a.json, joined by their question ids: 32,000 / 18,000 / 8,000 questions on 3,200
    / 1,800 / 800 videos, whose files are v_NAME.mp4 or .webm.
    """
    names = [f"{split}_q.json", f"{split}_a.json"]
    path, _ = find_annotations(place.root, names, ("activitynet_qa", "dataset"))
    questions = read_question_file(path)
    return make_questions(f"activitynet_qa/{split}", path, questions, place, VIDEO_FOLDERS, lambda name: f"v_{name}")


DATASET = DataSet(
    title="ActivityNet-QA (Yu et al., AAAI 2019)",
    files="{train,val,test}_q.json and {train,val,test}_a.json",
    questions=Texts(read_split),
)
