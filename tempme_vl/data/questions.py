"""Questions about videos as torch datasets: to train on, and to ask about videos that are encoded already."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from tempme_vl.data.reader import VideoReader
from tempme_vl.data.sampling import sample_generator
from tempme_vl.data.videoqa import QASplit, Question
from tempme_vl.messages import few

Tokenize = Callable[[str, str | None, Sequence[str]], dict[str, Tensor]]  # question, answer to train on, options


class TrainQuestions(Dataset):
    """Every question with its video, addressed by (epoch, index).

    Everything random of a sample, also which of several right answers is taken, is drawn from (seed, epoch, index),
    so neither ranks, workers nor a resumed run change it.

    Items: video (F, 3, S, S) float32, frame_mask (F,), times (F,) in seconds (see `VideoInput`), what `tokenize`
    gives, valid 0 or 1, name; option_valid (K,) where questions have options.

    Raises:
        ValueError: questions with and without options in one split.
    """

    def __init__(self, split: QASplit, reader: VideoReader, tokenize: Tokenize, seed: int = 0):
        self.split, self.reader, self.tokenize, self.seed = split, reader, tokenize, seed
        self.most_options = most_options(split)

    def __len__(self) -> int:
        return len(self.split.questions)

    def __getitem__(self, key: tuple[int, int]) -> dict[str, Any]:
        epoch, index = key
        question = self.split.questions[index]
        rng = sample_generator(self.seed, epoch, index)
        read = self.reader(question.video, rng)
        right = [answer for answer in question.answers if not question.options or answer in question.options]
        answer = right[int(rng.integers(len(right)))]
        return {
            "video": read.video,
            "frame_mask": torch.ones(len(read.video)),
            "times": read.times,
            **tokenized(self.tokenize, question, answer, self.most_options),
            "valid": int(read.valid),
            "name": f"{question.question_id} ({question.video.video_id})",
        }


class AskedQuestions(Dataset):
    """The questions of a split in order, each with what was kept of its video.

    Items: the tensors of `kept`, what `tokenize` gives without an answer, option_valid (K,) as in training.

    Args:
        kept: name -> (V, ...), rows of encoded videos.
        rows: the row of each question's video.
    """

    def __init__(self, split: QASplit, kept: Mapping[str, Tensor], rows: Sequence[int], tokenize: Tokenize):
        self.split, self.kept, self.rows, self.tokenize = split, kept, rows, tokenize
        self.most_options = most_options(split)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        of_video = {name: tensor[self.rows[index]] for name, tensor in self.kept.items()}
        return of_video | tokenized(self.tokenize, self.split.questions[index], None, self.most_options)


def most_options(split: QASplit) -> int:
    """The largest number of options of a question of the split, 0 where none has any.

    Raises:
        ValueError: questions with and without options in one split.
    """
    without = [question.question_id for question in split.questions if not question.options]
    if without and len(without) < len(split.questions):
        raise ValueError(f"{split.name}: {len(without)} questions have no options, others do: {few(without)}")
    return max(len(question.options) for question in split.questions)


def tokenized(tokenize: Tokenize, question: Question, answer: str | None, most: int) -> dict[str, Tensor]:
    """What `tokenize` gives of a question, its options filled up to the `most` of a batch; option_valid (most,).

    Args:
        most: 0 where questions have no options.
    """
    asked = tokenize(question.question, answer, question.options)
    if not most:
        return asked
    count = len(question.options)
    # rows that fill up repeat the last one: attention needs real words even where nobody looks at the result
    rows = torch.arange(most).clamp(max=count - 1)
    filled = {name: value[rows] if name.startswith("option_") else value for name, value in asked.items()}
    return {**filled, "option_valid": (torch.arange(most) < count).long()}
