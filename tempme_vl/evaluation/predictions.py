"""Reading anybody's predictions: which of a file's keys hold the answers of a model, and which the ground truth.

Public scripts write the ground truth beside the prediction, and "answer" is either: Video-ChatGPT's and all after it
write `{"id", "question", "answer": truth, "pred": prediction}`, InternVL's `{"question_id", "answer": prediction,
"annotation": truth}`. So a key is never taken where it could be the other one, and what was read is said.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tempme_vl.data.files import csv_rows, errors_at, json_lines, load_json, read_text
from tempme_vl.data.videoqa import QASplit, as_id
from tempme_vl.messages import few

ID_KEYS = ("question_id", "id", "qid", "questionId")
PREDICTION_KEYS = (
    "pred",
    "prediction",
    "pred_answer",
    "predicted_answer",
    "output",
    "model_output",
    "response",
    "generated",
    "generated_answer",
    "generated_text",
    "filtered_resps",  # lmms-eval's samples
)
ANSWER = "answer"  # the prediction, unless a key above is beside it
TEXT = "text"  # LLaVA's answer beside its "prompt"; in LLaVA's files of questions, the question
TRUTH_KEYS = ("gt", "gt_answer", "ground_truth", "annotation", "target", "label", "reference")

OBJECT_KEY, OBJECT_VALUE = "the object's keys", "the object's values"  # of {"170859": "man"}
OTHER_FORMATS = (".tsv", ".xlsx", ".xls", ".parquet", ".pkl", ".pth", ".npy", ".npz")

Entry = Mapping[str, Any]
_WANTED = f"one of {', '.join(ID_KEYS)} and one of {', '.join((*PREDICTION_KEYS[:-1], ANSWER))}"


@dataclass(frozen=True)
class Predictions:
    """Answers by question id, and how they were read.

    Attributes:
        answers: an empty text where a model gave none.
        prediction_key, id_key: those that were read.
        unread: other keys that hold an answer: the ground truth.
        like_questions: "answer" was read beside "question" and without a ground truth, as in a file of annotations.
    """

    answers: dict[str, str]
    prediction_key: str
    id_key: str
    unread: tuple[str, ...] = ()
    like_questions: bool = False

    def in_words(self) -> str:
        """Which keys were read, and which not."""
        left = f"; ground truth, not read: {', '.join(self.unread)}" if self.unread else ""
        return f"predictions read from {self.prediction_key}, ids from {self.id_key}{left}"

    def refuse_ground_truth(self, split: QASplit) -> None:
        """ValueError for a file like one of annotations whose answers are all right: it could be either."""
        answers = {question.question_id: question.answers for question in split.questions}
        if self.like_questions and all(text in answers.get(i, ()) for i, text in self.answers.items()):
            raise ValueError(
                f"all {len(self.answers)} predictions, read from {ANSWER!r} beside 'question', are the ground truth: "
                f"is this a file of annotations? If not, say so with --prediction-key {ANSWER}"
            )


def read_predictions(path: str | Path, prediction_key: str | None = None, id_key: str | None = None) -> dict[str, str]:
    """The answers of `load_predictions`, by question id."""
    return load_predictions(path, prediction_key, id_key).answers


def load_predictions(path: str | Path, prediction_key: str | None = None, id_key: str | None = None) -> Predictions:
    """Reads answers by question id.

    Files: csv with a header; JSON lines, whatever their file's name ends in; a JSON list of objects, alone or as the
    one list in an object; a JSON object `{"170859": "man"}` or `{"170859": {"pred": "man"}}`.

    Keys: an id of ID_KEYS, and one of PREDICTION_KEYS; without one of these "answer", or "text" beside "prompt" or
    "question". Samples of lmms-eval have the id in their "doc". Other keys are not read.

    Args:
        prediction_key, id_key: the keys to read, where a file could mean several.

    Raises:
        ValueError: naming the file and the entry, line or ids: another form, keys that could be either, entries with
            different keys, an id that occurs more than once, an answer that is no text (empty, or null, is one).
    """
    path = Path(path)
    rows: list[tuple[str, str]] = []
    found: tuple[str, str] | None = None
    unread: dict[str, None] = {}
    like_questions = False
    for place, given in _entries(path):
        with errors_at(place):
            entry = _fields(given)
            keys = _prediction_key(entry, prediction_key), _id_key(entry, id_key)
            found = found or keys
            if keys != found:
                raise ValueError(
                    f"expected {found[0]} and {found[1]}, as in the entries before; got {few(list(entry), 9)}"
                )
            question_id = as_id(entry[keys[1]])
            rows.append((question_id, _text(question_id, entry[keys[0]])))
        truth = [key for key in (ANSWER, *TRUTH_KEYS) if key in entry and key != keys[0]]
        unread |= dict.fromkeys(truth)
        like_questions |= keys[0] == ANSWER and prediction_key is None and "question" in entry and not truth
    if found is None:
        raise ValueError(f"{path}: no predictions")
    if twice := [i for i, count in Counter(question_id for question_id, _ in rows).items() if count > 1]:
        raise ValueError(f"{path}: {len(twice)} question ids are answered more than once: {few(twice)}")
    return Predictions(dict(rows), *found, tuple(unread), like_questions)


def _entries(path: Path) -> Iterator[tuple[str, object]]:
    """The file's entries, each with its place to name in errors."""
    if path.suffix.lower() in OTHER_FORMATS:
        raise ValueError(f"{path}: expected predictions as JSON, JSON lines or csv")
    if path.suffix.lower() == ".csv":
        return csv_rows(path, line_breaks=True)  # answers are written at length
    if _is_lines(path):
        return json_lines(path)
    content = load_json(path)
    if isinstance(content, dict):
        inside = [value for value in content.values() if isinstance(value, list)]
        lists = [entries for entries in inside if any(isinstance(entry, dict) for entry in entries)]
        if not lists:
            return _of_object(path, content)
        content = lists[0] if len(lists) == 1 else None
    if not isinstance(content, list):
        raise ValueError(f"{path}: expected a JSON object or list of predictions; got {read_text(path)[:60]!r}")
    return ((f"{path}, entry {number}", entry) for number, entry in enumerate(content))


def _is_lines(path: Path) -> bool:
    """By its name, or as Video-ChatGPT's scripts write them into NAME.json: an object a line."""
    if path.suffix.lower() in (".jsonl", ".ndjson"):
        return True
    lines = [line.strip() for line in read_text(path).split("\n") if line.strip()]
    return len(lines) > 1 and all(line.startswith("{") and line.endswith("}") for line in lines[:2])


def _of_object(path: Path, content: Entry) -> Iterator[tuple[str, object]]:
    """`{id: answer}`, `{id: {"pred": answer}}`, or one prediction as an object of its own."""
    if any(key in content for key in ID_KEYS) and any(key in content for key in (*PREDICTION_KEYS, ANSWER, TEXT)):
        yield str(path), content
        return
    for key, value in content.items():
        inside = value if isinstance(value, dict) else {OBJECT_VALUE: value}
        yield f"{path}, {key!r}", {**inside, OBJECT_KEY: key}


def _fields(entry: object) -> Entry:
    """The entry with what lmms-eval keeps of the question in its "doc"."""
    if not isinstance(entry, dict):
        raise ValueError(f"expected {_WANTED}; got {str(entry)[:80]}")
    doc = entry.get("doc")
    if isinstance(doc, dict) and not any(key in entry for key in ID_KEYS):
        return {**entry, **{key: doc[key] for key in (*ID_KEYS, "question", ANSWER) if key in doc}}
    return entry


def _id_key(entry: Entry, chosen: str | None) -> str:
    if OBJECT_KEY in entry and chosen is None:
        return OBJECT_KEY
    there = [key for key in ((chosen,) if chosen else ID_KEYS) if key in entry]
    if not there or len({str(entry[key]) for key in there}) > 1:
        raise ValueError(_cannot("id", there, chosen, entry))
    return there[0]


def _prediction_key(entry: Entry, chosen: str | None) -> str:
    if OBJECT_VALUE in entry and chosen is None:
        return OBJECT_VALUE
    there = [key for key in ((chosen,) if chosen else PREDICTION_KEYS) if key in entry]
    if not there and chosen is None:
        # LLaVA's files of questions have a "text" too, which is the question
        answered = TEXT in entry and ("prompt" in entry or "question" in entry)
        there = [key for key in (ANSWER, TEXT) if key in entry and (key == ANSWER or answered)]
    if len(there) != 1:
        raise ValueError(_cannot("prediction", there, chosen, entry))
    return there[0]


def _cannot(what: str, there: list[str], chosen: str | None, entry: Entry) -> str:
    if chosen:
        return f"there is no {chosen!r}, which --{what}-key names; got {few(list(entry), 9)}"
    if there:
        return f"the {what} could be in each of {few(there)}: name one with --{what}-key"
    return f"expected {_WANTED}; got {few(list(entry), 9)}"


def _text(question_id: str, value: object) -> str:
    """An answer; empty where a model gave none."""
    if isinstance(value, list) and len(value) == 1:  # lmms-eval's filtered responses to one question
        (value,) = value
    if value is None:
        return ""
    if not isinstance(value, str):
        raise ValueError(f"the answer to {question_id} must be a text (it may be empty); got {str(value)[:80]}")
    return value
