"""Questions about videos with their answers: the public annotation layouts, and the answer vocabulary of a split.

Answers stay letter for letter as they are in the files, because accuracy compares strings. Neither torch nor a
decoder is loaded here.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

from tempme_vl.data.dataset import Place
from tempme_vl.data.files import (
    AnnotationError,
    as_file_id,
    as_id,
    as_text,
    as_texts,
    check_distinct,
    csv_rows,
    each_object,
    errors_at,
    is_text,
    load_json,
    read_text,
    repeated,
)
from tempme_vl.data.jsonl import jsonl_entries, video_of
from tempme_vl.data.splits import Video, locate_videos
from tempme_vl.messages import few, shown

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

    @property
    def videos(self) -> list[Video]:
        """The video of each question."""
        return [question.video for question in self.questions]

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
      NAME_q.json, `[{"question_id", "video_name", "question"}]`, whose answers are read from NAME_a.json beside it,
      in whatever order

    The name of the result is folder/file. AnnotationError names the file and the line or entry.
    """
    path = Path(path)
    if path.suffix == ".jsonl":
        return read_question_lines(path, "", split)
    if split is not None:
        raise ValueError(f"{path} holds one split; only lines of a .jsonl file can be chosen by split={split!r}")
    questions = tuple(read_question_file(path))
    with errors_at(str(path)):
        return QASplit(f"{path.resolve().parent.name}/{path.name}", questions)


def make_questions(
    name: str,
    source: Path,
    questions: Sequence[Question],
    place: Place,
    folders: Sequence[str] = (),
    id_of: Callable[[str], str] = str,
) -> QASplit:
    """A split of questions that have a file's own video ids, with the videos' files.

    Args:
        source: the file, which AnnotationError names.
        folders: where videos usually lie below the data root, see `locate_videos`.
        id_of: from the file's id of a video to its name.
    """
    ids = {raw: id_of(raw) for raw in dict.fromkeys(q.video.video_id for q in questions)}
    paths = locate_videos(ids.values(), place.root, place.video_root, folders)
    videos = {raw: Video(ids[raw], path) for raw, path in zip(ids, paths, strict=True)}
    with errors_at(str(source)):
        return QASplit(name, tuple(replace(q, video=videos[q.video.video_id]) for q in questions))


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


def read_question_file(path: Path) -> list[Question]:
    """The questions of a .csv or .json file in one of the layouts of `read_questions`, with its own video ids."""
    if path.suffix == ".csv":
        questions = []
        for place, row in csv_rows(path):
            with errors_at(place):
                questions.append(question_of(row, CSV_COLUMNS))
        return questions
    entries = _entries(path)
    if not any("video_name" in entry for entry in entries):
        return list(each_object(str(path), entries, lambda e: question_of(e, ("video_id", "question", "answer", "id"))))
    if not path.name.endswith("_q.json"):
        raise AnnotationError(
            f"{path}: these are questions without answers; expected NAME_q.json and NAME_a.json beside it"
        )
    answers_path = path.with_name(path.name.removesuffix("_q.json") + "_a.json")
    answers = _entries(answers_path)
    check_distinct(str(path), "question_id", entries)
    check_distinct(str(answers_path), "question_id", answers)
    if len(entries) != len(answers):
        raise AnnotationError(f"{path} has {len(entries)} questions, {answers_path} {len(answers)} answers")
    answer_of = {str(answer.get("question_id")): answer for answer in answers}

    def read(entry: dict[str, Any]) -> Question:
        answer = answer_of.get(str(entry.get("question_id")))
        if answer is None:
            raise ValueError(f"question_id {shown(entry.get('question_id'))} has no answer in {answers_path}")
        return question_of({**entry, **answer}, ("video_name", "question", "answer", "question_id"))

    return list(each_object(str(path), entries, read))


def _entries(path: Path) -> list[dict[str, Any]]:
    return list(each_object(str(path), load_json(path), dict))


def question_of(entry: dict[str, Any], keys: tuple[str, str, str, str]) -> Question:
    """The question of an entry of a file, with the file's id of the video, see `make_questions`.

    Args:
        keys: of the video, the question, the answer and the question's id.

    Raises:
        ValueError: keys that are not there, or what is there is no id or no text.
    """
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


def _is_choice(question: Question) -> bool:
    options = set(question.options)
    return len(options) == len(question.options) >= 2 and not options.isdisjoint(question.answers)
