"""A model's answers to the questions of a split."""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor

from tempme_vl.data.questions import AskedQuestions
from tempme_vl.data.reader import ClipReader
from tempme_vl.data.retrieval import EvalClips
from tempme_vl.data.videoqa import QASplit
from tempme_vl.evaluation.encode import Encoder, encode_all


class Answering(Protocol):
    """What question answering models offer beside their call: see `tempme_vl.tasks.qa`."""

    kept: tuple[str, ...]

    def tokenize(self, question: str, answer: str | None = None, options: Any = ()) -> dict[str, Tensor]: ...

    def text(self, prediction: list[int]) -> str: ...


def predict(
    model: Answering,
    encode: Encoder,
    split: QASplit,
    reader: ClipReader,
    device: torch.device,
    batch_size: int = 32,
    workers: int = 2,
) -> dict[str, str]:
    """Answers by question id, all ranks together and the same on every rank.

    Every clip is read and encoded once, whatever the number of its questions. Questions about clips that could not be
    read, and those that a model writes nothing to, have no answer.

    Args:
        encode: the model, or its DeepSpeed engine, in eval mode.
    """
    number = {clip: i for i, clip in enumerate(dict.fromkeys(question.clip for question in split.questions))}
    kept = encode_all(encode, EvalClips(list(number), reader), device, (*model.kept, "valid"), batch_size, workers)
    valid = kept.pop("valid")
    rows = [number[question.clip] for question in split.questions]
    asked = AskedQuestions(split, kept, rows, model.tokenize)
    found = encode_all(encode, asked, device, ("prediction",), batch_size, workers, "questions")["prediction"]
    answers = {}
    for question, row, prediction in zip(split.questions, rows, found.tolist(), strict=True):
        if valid[row]:
            text = question.options[prediction[0]] if question.options else model.text(prediction)
            if text.strip():
                answers[question.question_id] = text
    return answers
