"""Scores answers to questions about videos: any model's predictions, without a GPU, a model or torch.

    python eval/videoqa.py --predictions predictions.json --annotations MSRVTT-QA/test_qa.json --json report.json

With the answer list of the training split, for the ceiling of a classifier over its 1,500 most frequent answers:
    python eval/videoqa.py --predictions predictions.csv --annotations msrvtt_qa/test.csv \
        --vocabulary answers.json --vocabulary-size 1500

Predictions: a JSON object {question id: answer}, a JSON list of {"question_id": ..., "answer": ...}, or csv
`qid,answer`. Annotations: MSRVTT-QA (JSON or csv), MSVD-QA, ActivityNet-QA (NAME_q.json with NAME_a.json beside it),
or one's own .jsonl file (file, question, answer or answers, optional id and split).
"""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from pathlib import Path

import tyro

from tempme_vl.data.videoqa import read_questions, read_vocabulary
from tempme_vl.evaluation.videoqa import accuracy, read_predictions, table


@dataclass(frozen=True)
class Options:
    """Accuracy, overall and by type of question, in percent. Questions without a prediction count as wrong."""

    predictions: Path
    """Answers by question id: a JSON object, a JSON list or a csv file."""
    annotations: Path
    """The questions of the split with their answers: .json, .csv or .jsonl."""
    split: str | None = None
    """Of a .jsonl file, score the lines of this split only."""
    vocabulary: Path | None = None
    """The answers the model can give, from the training split, the most frequent first: a JSON list or a text file
    with one a line. Gives the ceiling."""
    vocabulary_size: int | None = None
    """Take that many answers from the front of --vocabulary."""
    normalize: bool = False
    """Compare without case, punctuation and leading articles, as is usual for generated answers. Default: exact."""
    json: Path | None = None
    """Write the report to this file."""


def main(options: Options) -> None:
    """ValueError for options that miss each other and for files that are not as described above."""
    split = read_questions(options.annotations, options.split)
    report = {
        "predictions": str(options.predictions),
        "annotations": str(options.annotations),
        **accuracy(read_predictions(options.predictions), split, vocabulary_of(options), normalize=options.normalize),
    }
    if options.json is not None:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(report, indent=2) + "\n")
    print(table(report))


def vocabulary_of(options: Options) -> tuple[str, ...] | None:
    """The answers of --vocabulary, cut to --vocabulary-size."""
    size = options.vocabulary_size
    if options.vocabulary is None:
        if size is not None:
            raise ValueError("--vocabulary-size needs --vocabulary")
        return None
    answers = read_vocabulary(options.vocabulary)
    if size is not None and not 0 < size <= len(answers):
        raise ValueError(f"{options.vocabulary} has {len(answers)} answers; got --vocabulary-size {size}")
    return answers[:size]


if __name__ == "__main__":
    try:
        main(tyro.cli(Options))
    except ValueError as error:
        sys.exit(f"error: {error}")
