"""Accuracy of answers to questions about videos, for anybody's predictions: no model and no torch is needed.

A prediction is right if it equals one of the question's answers, letter for letter (UMT's and MSRVTT-QA's usual rule).
Every question of the split counts; one without a prediction, or with an empty one, counts as wrong.
"""

from __future__ import annotations

import re
import string
from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Mapping
from typing import Any

from tempme_vl.data.videoqa import QASplit, coverage
from tempme_vl.evaluation.predictions import read_predictions as read_predictions
from tempme_vl.messages import few

QUESTION_TYPES = ("what", "who", "how", "when", "where", "other")

_PUNCTUATION = str.maketrans("", "", string.punctuation)


def accuracy(
    predictions: Mapping[str, str],
    split: QASplit,
    vocabulary: Collection[str] | None = None,
    *,
    normalize: bool = False,
) -> dict[str, Any]:
    """Scores predictions, answers by question id, on a split.

    Args:
        predictions: may leave questions out, which are then wrong.
        vocabulary: the answers the model can give, from the training split (for `ceiling`).
        normalize: compare after `normalize_answer` on both sides; a metric of its own, named in the report.

    Returns:
        split, match ("exact" or "normalized"), total, correct, missing and empty (questions without a prediction, and
        with one that is empty), accuracy (percent), by_type and total_by_type (percent and questions for each of
        QUESTION_TYPES; None and 0 for a type that is not asked), vocabulary_size and ceiling (percent of questions with
        an answer in the vocabulary; None without one), ambiguous (pairs of video and question that occur with different
        answers: one prediction cannot fit all).

    Raises:
        ValueError: predictions for ids the split does not have, predictions that are no text, an empty vocabulary.
    """
    known = {question.question_id for question in split.questions}
    if unknown := [question_id for question_id in predictions if question_id not in known]:
        raise ValueError(
            f"{len(unknown)} of {len(predictions)} predictions have ids that {split.name} ({len(known)} questions) "
            f"does not have: {few(unknown)}; are they for another split?"
        )
    if no_text := [i for i, answer in predictions.items() if not isinstance(answer, str)]:
        raise ValueError(f"{len(no_text)} predictions are no text: those of {few(no_text)}")
    if vocabulary is not None and not vocabulary:
        raise ValueError("the answer vocabulary is empty")

    total, correct = Counter[str](), Counter[str]()
    answers_of = defaultdict(set)
    for question in split.questions:
        kind = question_type(question.question)
        total[kind] += 1
        answers_of[question.video.video_id, question.question].add(question.answers)
        if (prediction := predictions.get(question.question_id)) is not None:
            correct[kind] += is_right(prediction, question.answers, normalize)
    return {
        "split": split.name,
        "note": split.note,
        "match": "normalized" if normalize else "exact",
        "total": total.total(),
        "correct": correct.total(),
        "missing": len(known) - len(predictions),
        "empty": sum(not answer.strip() for answer in predictions.values()),
        "accuracy": 100 * correct.total() / total.total(),
        "by_type": {kind: 100 * correct[kind] / total[kind] if total[kind] else None for kind in QUESTION_TYPES},
        "total_by_type": {kind: total[kind] for kind in QUESTION_TYPES},
        "vocabulary_size": None if vocabulary is None else len(vocabulary),
        "ceiling": None if vocabulary is None else coverage(vocabulary, split),
        "ambiguous": sum(len(answers) > 1 for answers in answers_of.values()),
    }


def accuracy_by(
    predictions: Mapping[str, str], split: QASplit, group: Callable[[str], str]
) -> dict[str, tuple[float, int]]:
    """Percent right and number of questions for every value of `group`, a function of the question; exact match."""
    total, correct = Counter[str](), Counter[str]()
    for question in split.questions:
        kind = group(question.question)
        total[kind] += 1
        correct[kind] += predictions.get(question.question_id) in question.answers
    return {kind: (100 * correct[kind] / total[kind], total[kind]) for kind in sorted(total)}


def question_type(question: str) -> str:
    """One of QUESTION_TYPES: the question's first word ("what" for "What's"), "other" for all other words."""
    first = re.match(r"\W*([a-z]+)", question.lower())
    return first[1] if first and first[1] in QUESTION_TYPES else "other"


def normalize_answer(answer: str) -> str:
    """The answer in lower case without punctuation, repeated spaces and a leading article: "A dog." -> "dog"."""
    words = answer.lower().translate(_PUNCTUATION).split()
    return " ".join(words[1:] if len(words) > 1 and words[0] in ("a", "an", "the") else words)


def format_accuracy(report: Mapping[str, Any]) -> str:
    """The report of `accuracy` to read."""
    lines = [
        f"{report['split']}: {report['total']} questions, {report['missing']} without a prediction and "
        f"{report['empty']} with an empty one (counted as wrong), {report['match']} match",
        f"{'type':<10}{'questions':>10}{'accuracy %':>12}",
    ]
    rows = [(kind, report["total_by_type"][kind], report["by_type"][kind]) for kind in QUESTION_TYPES]
    for kind, total, percent in [*rows, ("all", report["total"], report["accuracy"])]:
        lines.append(f"{kind:<10}{total:>10}" + (f"{'-':>12}" if percent is None else f"{percent:>12.2f}"))
    lines[1:1] = [text for text in (report["note"], report.get("predictions_read")) if text]
    if report["ceiling"] is not None:
        lines.append(f"ceiling of a vocabulary of {report['vocabulary_size']} answers: {report['ceiling']:.2f} %")
    if report["ambiguous"]:
        lines.append(f"{report['ambiguous']} pairs of video and question occur with different answers")
    return "\n".join(lines)


def is_right(prediction: str, answers: tuple[str, ...], normalize: bool = False) -> bool:
    """Whether a prediction equals one of the answers, after `normalize_answer` on both sides if wanted."""
    if not normalize:
        return prediction in answers
    return normalize_answer(prediction) in map(normalize_answer, answers)
