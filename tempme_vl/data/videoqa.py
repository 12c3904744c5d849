"""Questions about videos with their answers: the public annotation layouts, and the answer vocabulary of a split.

Answers stay letter for letter as they are in the files, because accuracy compares strings. Neither torch nor a
decoder is loaded here.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Collection
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

from tempme_vl.data.files import (
    AnnotationError,
    as_file_id,
    as_id,
    as_text,
    as_texts,
    csv_rows,
    each_object,
    errors_at,
    is_text,
    load_json,
    read_lines,
    read_text,
    repeated,
)
from tempme_vl.data.jsonl import jsonl_entries, jsonl_names, video_of
from tempme_vl.data.splits import (
    Video,
    find_annotations,
    find_either,
    known_split,
    locate_videos,
    noted,
    trained_on,
)
from tempme_vl.messages import few, shown

SPLITS = ("train", "val", "test")
CSV_COLUMNS = ("video", "question", "answer", "qid")


@dataclass(frozen=True)
class Question:
    """A question about a video. Each of `answers` is right; `options` are a multiple choice's, else empty."""

    question_id: str
    video: Video
    question: str
    answers: tuple[str, ...]
    options: tuple[str, ...] = ()


@dataclass(frozen=True)
class QASplit:
    """The questions of a split, e.g. "msrvtt_qa/test".

    `note` is what a report must say beside scores on this split, such as that its videos were trained on.
    ValueError for no questions, ids that occur more than once, empty questions, a question without an answer or with
    an empty one, and options that are fewer than two, not distinct or without a right answer.
    """

    name: str
    questions: tuple[Question, ...]
    note: str = ""

    def __post_init__(self) -> None:
        if not self.questions:
            raise ValueError(f"{self.name}: no questions")
        wrong = {
            "question ids occur more than once": repeated([q.question_id for q in self.questions]),
            "questions are empty": [q.question_id for q in self.questions if not q.question.strip()],
            "questions have no answer or an empty one": [
                q.question_id for q in self.questions if not q.answers or not all(map(str.strip, q.answers))
            ],
            "questions need two distinct options or more, a right answer among them": [
                q.question_id for q in self.questions if q.options and not _is_choice(q)
            ],
        }
        for what, bad in wrong.items():
            if bad:
                raise ValueError(f"{self.name}: {len(bad)} {what}: {few(bad)}")


def answer_vocabulary(train: QASplit, size: int | None = None) -> tuple[str, ...]:
    """The `size` most frequent answers of a training split (None: all), the most frequent first, ties by alphabet.

    Fewer where the split has fewer. Give it the training split only: a list made of the evaluated split would tell
    the model which answers to expect. ValueError for a size below 1.
    """
    if size is not None and size < 1:
        raise ValueError(f"an answer vocabulary has 1 answer at least; got size={size}")
    counts = Counter(answer for question in train.questions for answer in question.answers)
    return tuple(sorted(counts, key=lambda answer: (-counts[answer], answer))[:size])


def coverage(vocabulary: Collection[str], split: QASplit) -> float:
    """Percentage of questions with an answer in `vocabulary`: the ceiling of a model that can give no other answer."""
    known = frozenset(vocabulary)
    return 100 * sum(not known.isdisjoint(q.answers) for q in split.questions) / len(split.questions)


def read_vocabulary(path: str | Path) -> tuple[str, ...]:
    """Reads an answer list, the most frequent first: a JSON list of texts, or a text file with one answer a line.

    AnnotationError for an empty list, empty answers and answers that occur more than once.
    """
    path = Path(path)
    answers = load_json(path) if path.suffix == ".json" else read_text(path).rstrip("\n").split("\n")
    if not isinstance(answers, list) or not answers:
        raise AnnotationError(f"{path}: expected a list of answers that is not empty")
    if bad := [answer for answer in answers if not is_text(answer)]:
        raise AnnotationError(f"{path}: {len(bad)} answers are empty or no text: {', '.join(map(shown, bad[:5]))}")
    if twice := repeated(answers):
        raise AnnotationError(f"{path}: {len(twice)} answers occur more than once: {few(twice)}")
    return tuple(answers)


def read_questions(path: str | Path, split: str | None = None) -> QASplit:
    """Reads one annotation file of any known layout. Videos are not looked for; their ids are the file's.

    - .csv: `video,question,answer,qid`, further columns ignored (MSRVTT-QA; its `type` is the video's category)
    - .jsonl: as `read_question_lines`; `split` keeps the lines of that split
    - .json: `[{"id", "video_id", "question", "answer"}]` (MSRVTT-QA, MSVD-QA), or ActivityNet-QA's questions
      NAME_q.json, `[{"question_id", "video_name", "question"}]`, whose answers are read from NAME_a.json beside it

    The name of the result is folder/file. AnnotationError names the file and the line or entry.
    """
    path = Path(path)
    if path.suffix == ".jsonl":
        return read_question_lines(path, "", split)
    if split is not None:
        raise ValueError(f"{path} holds one split; only lines of a .jsonl file can be chosen by split={split!r}")
    questions = tuple(_read_file(path))
    with errors_at(str(path)):
        return QASplit(f"{path.resolve().parent.name}/{path.name}", questions)


def read_split(dataset: str, root: str | Path, split: str, video_root: str | Path | None = None) -> QASplit:
    """Reads "train", "val" or "test" of "motion", "msrvtt_qa", "msvd_qa" or "activitynet_qa" under `root`.

    Videos are looked for as by `load_split` of tempme_vl.data.datasets, and need not be there. Ids are those of the
    retrieval readers, so that both find the same files.

    - msrvtt_qa: {split}_qa.json or {split}.csv; 158,581 / 12,278 / 72,821 questions on 6,513 / 497 / 2,990 videos
    - msvd_qa: {split}_qa.json; 30,933 / 6,415 / 13,157. With youtube_mapping.txt (`name vid7`) ids are the names of
      the original videos, without it "vid7".
    - activitynet_qa: {split}_q.json and {split}_a.json; 32,000 / 18,000 / 8,000 on 3,200 / 1,800 / 800 videos
    - motion: rendered under `root` first

    ValueError for an unknown data set or split, missing files (lists those expected and found), and bad entries
    (AnnotationError).
    """
    if dataset not in _DATASETS:
        raise ValueError(f"unknown QA data set {dataset!r}; known: {', '.join(_DATASETS)}")
    split = known_split(dataset, split, SPLITS)
    source, questions, video_id_of, video_folders = _DATASETS[dataset](root, split)
    ids = {raw: video_id_of(raw) for raw in dict.fromkeys(q.video.video_id for q in questions)}
    paths = locate_videos(ids.values(), root, video_root, video_folders)
    videos = {raw: Video(ids[raw], path) for raw, path in zip(ids, paths, strict=True)}
    with errors_at(str(source)):
        return QASplit(f"{dataset}/{split}", tuple(replace(q, video=videos[q.video.video_id]) for q in questions))


def read_question_lines(annotations: str | Path, video_root: str | Path, split: str | None = None) -> QASplit:
    """Reads lines like `{"file": "a.mp4", "question": "what runs", "answer": "dog", "split": "train"}`.

    Keys: `file` (relative to `video_root`), `question`, `answer` or `answers` (a list, each of them right), and
    optionally `options` (a list to choose from), `start`, `end` (seconds), `split`, `id` (else the line's number);
    others are ignored. `split` keeps the lines of that split, by its name or a usual synonym; None keeps all.
    AnnotationError names the file and the line; for a split that no line has it lists those that there are.
    """
    path, root = Path(annotations), Path(video_root)
    split, entries = jsonl_entries(path, split)
    questions = []
    for place, entry in entries:
        with errors_at(place):
            questions.append(_jsonl_question(entry, root, place.rpartition(" ")[2]))
    with errors_at(str(path)):
        return QASplit(f"{path.stem}/{split or 'all'}", tuple(questions))


def read_splits(
    dataset: str, root: Path | None, video_root: Path | None = None, annotations: Path | None = None
) -> tuple[QASplit, QASplit | None, QASplit]:
    """Training, validation and test questions of a data set as in `read_split`, or of "jsonl": a file of one's own.

    Of a JSON-lines file the lines with the splits "train", "val" and "test" (or a usual synonym) are taken; where no
    line has a split all train, and where none has a test split training is tested. Videos that are trained on and
    validated or tested make that split's note, which is logged too.

    ValueError as in `read_split` and `read_question_lines`, and where what a data set needs is not given.
    """
    if dataset != "jsonl":
        if root is None:
            raise ValueError(f"--dataset {dataset} needs --data-root, the folder of its annotation files")
        train, test = (read_split(dataset, root, split, video_root) for split in ("train", "test"))
        val: QASplit | None = read_split(dataset, root, "val", video_root)
    else:
        if annotations is None or video_root is None:
            raise ValueError("--dataset jsonl needs --annotations FILE and --video-root FOLDER")
        names = jsonl_names(annotations)
        train = read_question_lines(annotations, video_root, names.train)
        val = None if names.val is None else read_question_lines(annotations, video_root, names.val)
        test = train if names.test is None else read_question_lines(annotations, video_root, names.test)
    seen = [question.video for question in train.questions]
    if val is not None:
        val = noted(val, trained_on(seen, (question.video for question in val.questions)))
    return train, val, noted(test, trained_on(seen, (question.video for question in test.questions)))


def _read_file(path: Path) -> list[Question]:
    if path.suffix == ".csv":
        questions = []
        for place, row in csv_rows(path):
            with errors_at(place):
                questions.append(_question(row, CSV_COLUMNS))
        return questions
    entries = _entries(path)
    if not any("video_name" in entry for entry in entries):
        return list(each_object(str(path), entries, lambda e: _question(e, ("video_id", "question", "answer", "id"))))
    if not path.name.endswith("_q.json"):
        raise AnnotationError(
            f"{path}: these are questions without answers; expected NAME_q.json and NAME_a.json beside it"
        )
    answers_path = path.with_name(path.name.removesuffix("_q.json") + "_a.json")
    answers = _entries(answers_path)
    if len(entries) != len(answers):
        raise AnnotationError(f"{path} has {len(entries)} questions, {answers_path} {len(answers)} answers")
    answer_of = iter(answers)

    def read(entry: dict[str, Any]) -> Question:
        answer = next(answer_of)
        ids = entry.get("question_id"), answer.get("question_id")
        if ids[0] != ids[1]:
            raise ValueError(f"question_id {shown(ids[0])}, but {shown(ids[1])} in {answers_path}")
        return _question({**entry, **answer}, ("video_name", "question", "answer", "question_id"))

    return list(each_object(str(path), entries, read))


def _entries(path: Path) -> list[dict[str, Any]]:
    return list(each_object(str(path), load_json(path), dict))


def _question(entry: dict[str, Any], keys: tuple[str, str, str, str]) -> Question:
    """`keys` of the video, the question, the answer and the question's id."""
    video, question, answer, question_id = keys
    if not set(keys) <= set(entry):
        raise ValueError(f"expected {', '.join(keys)}; got {few(list(entry), 9)}")
    video_id = as_file_id(entry[video])
    return Question(
        as_id(entry[question_id]),
        _video(video_id),
        as_text(question, entry[question]).strip(),
        (as_text(answer, entry[answer]),),
    )


@lru_cache(maxsize=8192)  # files ask tens of questions about a video
def _video(video_id: str) -> Video:
    return Video(video_id, Path(video_id))


def _jsonl_question(entry: dict[str, Any], root: Path, line: str) -> Question:
    if ("answer" in entry) == ("answers" in entry):
        raise ValueError("expected either 'answer' or 'answers'")
    answers = as_texts("answers", entry["answers"]) if "answers" in entry else (as_text("answer", entry["answer"]),)
    options = as_texts("options", entry["options"]) if "options" in entry else ()
    question = as_text("question", entry.get("question")).strip()
    return Question(as_id(entry.get("id", line)), video_of(entry, root), question, answers, options)


# the file, its questions with its own video ids, what those become, the usual folders of the videos
_Source = tuple[Path, list[Question], Callable[[str], str], tuple[str, ...]]


def _msrvtt(root: str | Path, split: str) -> _Source:
    path = find_either(root, (f"{split}_qa.json", f"{split}.csv"), ("msrvtt_qa", "MSRVTT-QA"))
    folders = ("MSRVTT_Videos", "all", "TrainValVideo")
    return path, _read_file(path), lambda n: f"video{n}" if n.isdecimal() else n, folders


def _motion(root: str | Path, split: str) -> _Source:
    from tempme_vl.data.motion import render_motion  # PyAV is needed for this data set alone

    return _msrvtt(render_motion(root), split)


def _msvd(root: str | Path, split: str) -> _Source:
    folders, video_folders = ("msvd_qa", "MSVD-QA"), ("MSVD_Videos", "YouTubeClips")
    (path,) = find_annotations(root, [f"{split}_qa.json"], folders)
    mapping = path.with_name("youtube_mapping.txt")
    questions = _read_file(path)
    if not os.path.lexists(mapping):
        return path, questions, lambda n: f"vid{n}", video_folders
    names = _youtube_names(mapping)
    if unknown := sorted({q.video.video_id for q in questions if f"vid{q.video.video_id}" not in names}):
        raise AnnotationError(f"{path}: {len(unknown)} videos are not in {mapping}: {few(unknown)}")
    return path, questions, lambda n: names[f"vid{n}"], video_folders


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


def _activitynet(root: str | Path, split: str) -> _Source:
    names = [f"{split}_q.json", f"{split}_a.json"]
    path, _ = find_annotations(root, names, ("activitynet_qa", "dataset"))
    return path, _read_file(path), lambda name: f"v_{name}", ("Activity_Videos", "Videos")


_DATASETS: dict[str, Callable[[str | Path, str], _Source]] = {
    "motion": _motion,
    "msrvtt_qa": _msrvtt,
    "msvd_qa": _msvd,
    "activitynet_qa": _activitynet,
}


def _is_choice(question: Question) -> bool:
    options = set(question.options)
    return len(options) == len(question.options) >= 2 and not options.isdisjoint(question.answers)
