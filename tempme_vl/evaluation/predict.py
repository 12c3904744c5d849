"""A model's answers to the questions of a split."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor

from tempme_vl.data.questions import AskedQuestions
from tempme_vl.data.reader import VideoReader
from tempme_vl.data.retrieval import EvalVideos
from tempme_vl.data.videoqa import QASplit
from tempme_vl.evaluation.encode import Encoder, encode_own, even_shards, gather_on_cpu
from tempme_vl.training import distributed


class Answering(Protocol):
    """What question answering models offer beside their call: see `tempme_vl.tasks.qa`."""

    kept: tuple[str, ...]

    def tokenizer(self) -> Callable[..., dict[str, Tensor]]: ...

    def text(self, prediction: list[int]) -> str: ...


def predict(
    model: Answering,
    encode: Encoder,
    split: QASplit,
    reader: VideoReader,
    device: torch.device,
    batch_size: int = 32,
    workers: int = 2,
) -> dict[str, str]:
    """Answers by question id, all ranks together and the same on every rank.

    Every video is read and encoded once, whatever the number of its questions. Questions about videos that could not be
    read, and those that a model writes nothing to, have no answer.

    Args:
        encode: the model, or its DeepSpeed engine, in eval mode.
    """
    number = {video: i for i, video in enumerate(dict.fromkeys(question.video for question in split.questions))}
    rows = [number[question.video] for question in split.questions]
    shards = even_shards(len(number))
    videos = EvalVideos(list(number), reader)
    kept = encode_own(encode, videos, device, (*model.kept, "valid"), shards, batch_size, workers)
    valid = gather_on_cpu(kept.pop("valid"), device)[: len(number)]

    # a rank asks about the videos that it encoded, so that no other needs their tokens
    questions_of = [[i for i, row in enumerate(rows) if row in shard] for shard in map(set, shards)]
    first = shards[distributed.rank()][0]
    asked = AskedQuestions(split, kept, [row - first for row in rows], model.tokenizer())
    own = encode_own(encode, asked, device, ("prediction",), questions_of, batch_size, workers, "questions")
    gathered = gather_on_cpu(own["prediction"], device).unflatten(0, (len(shards), len(own["prediction"])))
    found: dict[int, list[int]] = {}
    for numbers, predictions in zip(questions_of, gathered.tolist(), strict=True):
        found |= dict(zip(numbers, predictions, strict=False))  # behind them, what fills a short shard

    answers = {}
    for i, (question, row) in enumerate(zip(split.questions, rows, strict=True)):
        if valid[row]:
            prediction = found[i]
            text = question.options[prediction[0]] if question.options else model.text(prediction)
            if text.strip():
                answers[question.question_id] = text
    return answers
