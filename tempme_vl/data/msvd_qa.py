"""MSVD-QA (Xu et al., ACM MM 2017): questions about the videos of MSVD."""

from __future__ import annotations

import os
from pathlib import Path

from tempme_vl.data.dataset import DataSet, Place, Texts
from tempme_vl.data.files import AnnotationError, as_file_id, errors_at, read_lines
from tempme_vl.data.msvd import VIDEO_FOLDERS
from tempme_vl.data.splits import find_annotations
from tempme_vl.data.videoqa import QASplit, make_questions, read_question_file
from tempme_vl.messages import few


def read_split(place: Place, split: str) -> QASplit:
    """Reads {split}_qa.json: 30,933 / 6,415 / 13,157 questions.

    With youtube_mapping.txt (`name vid7`) ids are the names of the original videos, without it "vid7".
    """
    (path,) = find_annotations(place.root, [f"{split}_qa.json"], ("msvd_qa", "MSVD-QA"))
    mapping = path.with_name("youtube_mapping.txt")
    questions = read_question_file(path)
    ids = {question.video.video_id: f"vid{question.video.video_id}" for question in questions}
    if os.path.lexists(mapping):
        names = _youtube_names(mapping)
        if unknown := sorted(number for number, video_id in ids.items() if video_id not in names):
            raise AnnotationError(f"{path}: {len(unknown)} videos are not in {mapping}: {few(unknown)}")
        ids = {number: names[video_id] for number, video_id in ids.items()}
    return make_questions(f"msvd_qa/{split}", path, questions, place, VIDEO_FOLDERS, ids.__getitem__)


def _youtube_names(mapping: Path) -> dict[str, str]:
    names: dict[str, str] = {}
    taken = set()
    for place, line in read_lines(mapping):
        with errors_at(place):
            fields = line.split()
            if len(fields) != 2:
                raise ValueError(f"expected lines like 'name vid7'; got {' '.join(fields)}")
            name, number = map(as_file_id, fields)
            if number in names or name in taken:
                raise ValueError(f"{name} or {number} again")
            names[number] = name
            taken.add(name)
    return names


DATASET = DataSet(
    title="MSVD-QA (Xu et al., ACM MM 2017)",
    files="{train,val,test}_qa.json, and youtube_mapping.txt if there is one",
    questions=Texts(read_split),
)
