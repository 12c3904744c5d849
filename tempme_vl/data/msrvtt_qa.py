"""MSRVTT-QA (Xu et al., ACM MM 2017): questions about the videos of MSR-VTT."""

from __future__ import annotations

from tempme_vl.data.dataset import DataSet, Place, Texts
from tempme_vl.data.msrvtt import VIDEO_FOLDERS
from tempme_vl.data.splits import find_either
from tempme_vl.data.videoqa import QASplit, make_questions, read_question_file


def read_split(place: Place, split: str, name: str = "msrvtt_qa") -> QASplit:
    """Reads {split}_qa.json or {split}.csv: 158,581 / 12,278 / 72,821 questions on 6,513 / 497 / 2,990 videos."""
    path = find_either(place.root, (f"{split}_qa.json", f"{split}.csv"), ("msrvtt_qa", "MSRVTT-QA"))
    return make_questions(f"{name}/{split}", path, read_question_file(path), place, VIDEO_FOLDERS, _name)


def _name(number: str) -> str:
    return f"video{number}" if number.isdecimal() else number


DATASET = DataSet(
    title="MSRVTT-QA (Xu et al., ACM MM 2017)",
    files="{train,val,test}_qa.json or {train,val,test}.csv",
    questions=Texts(read_split),
)
