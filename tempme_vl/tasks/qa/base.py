"""The record of a head that answers questions about videos.

Letters: B videos, each with its question, K options or candidates of a question, L words, A answers in all; others as
in `tempme_vl.state`.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from tempme_vl.backbones.base import TowerShape
from tempme_vl.frontend import VisualFrontend
from tempme_vl.precision import at_least_float32
from tempme_vl.pretrained import CONFIG_FILE
from tempme_vl.tasks.heads import Head, Task
from tempme_vl.weights.exports import Export


@dataclass(frozen=True)
class HeadContext:
    """What a head is created for.

    Attributes:
        name: of the front end's tower, "family:model".
        frontend: whose tokens it reads.
        answers: those of the training split, the most frequent one first; none where it is to choose among the
            options of a question, or to write.
        vocabulary: words that questions are read with, in the order of their ids; none for a head that has its own.
        pretrained: weights that the front end started from.
    """

    name: str
    frontend: VisualFrontend
    answers: tuple[str, ...] = ()
    vocabulary: tuple[str, ...] = ()
    pretrained: str | None = None


class QAHead(Head, nn.Module):
    """What turns the tokens of videos and questions about them into answers.

    Attributes:
        needs_vocabulary: BERT's words, or those of the training questions, are given to it (`HeadContext.vocabulary`).
        uses_answers: it is given the training split's most frequent answers. The answers of one that is not are
            compared without case, punctuation and leading articles.
        only_options: without such answers it can only choose among a question's options.
        answers: those it can give, the most frequent one first; empty if it writes them freely.
        writes: `scores` are of what it wrote, and not of its answers.
    """

    task: ClassVar[Task] = "qa"
    needs_vocabulary: ClassVar[bool] = False
    uses_answers: ClassVar[bool] = True
    only_options: ClassVar[bool] = False
    answers: tuple[str, ...] = ()
    writes: bool = False

    @classmethod
    def create(cls, context: HeadContext, options: Any) -> QAHead:
        """A head to train.

        Args:
            options: an instance of `options`.
        """
        raise NotImplementedError

    def tokenize(self, question: str, answer: str | None = None, options: Sequence[str] = ()) -> dict[str, Tensor]:
        """What `forward` needs of one question, without the batch dimension.

        Args:
            answer: to train on it; None to be asked.
            options: those to choose among, K.

        Returns:
            tensors whose names start with "question_", "answer_" or "option_"; of the last K is the first dimension.
        """
        raise NotImplementedError

    def forward(self, tokens: Tensor, size: Tensor, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """One way in for training and answering.

        Args:
            tokens, size: (B, M, D), (B, M, 1) of the videos, normed.
            batch: what `tokenize` gave for B questions; option_valid (B, K), 0 for options that only fill up a row.

        Returns:
            with answers: losses (A,), one for each answer. Else prediction (B, W) int64, which `text` reads, and scores
            float: (B, K) of the options, or of `answers`, shares that add up to 1 (0 for what was not considered); of a
            head that writes (B, 1), the probability of what it wrote. Where options were given, W = 1: the number of
            the chosen one.
        """
        raise NotImplementedError

    def own_vocabulary(self, vocabulary: tuple[str, ...]) -> tuple[str, ...]:
        """The words that its ids stand for, where it was given these (`HeadContext.vocabulary`)."""
        return vocabulary

    def text(self, prediction: Sequence[int]) -> str:
        """A row of `prediction` as an answer; only for questions without options."""
        return self.answers[prediction[0]]

    def set_grad_checkpointing(self, enable: bool) -> None:
        """Recomputes the head's blocks in the backward pass, where it has any."""

    def without_weights(self) -> QAHead:
        """A copy that can only `tokenize`."""
        empty = nn.Parameter(torch.empty(0))
        return copy.deepcopy(self, {id(tensor): empty for tensor in (*self.parameters(), *self.buffers())})

    def is_saved(self, name: str) -> bool:
        """Whether `save` needs a parameter of the head; the weights of others are found again."""
        return True

    def save(self, directory: Path, state: Mapping[str, Tensor]) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """Writes files of its own and gives JSON data, written by the class that `load` reads it with
        (`tempme_vl.schema`), and the weights for the model's file.

        Args:
            state: the head's full weights.
        """
        raise NotImplementedError

    @classmethod
    def load(cls, config: Mapping[str, Any], directory: Path, shape: TowerShape) -> QAHead:
        """The head of a folder, its weights in the model's file still to be loaded.

        Args:
            shape: of the front end whose tokens it reads.

        Raises:
            ConfigError: JSON data that `save` does not give.
        """
        raise NotImplementedError

    @classmethod
    def is_whole(cls, config: Mapping[str, Any]) -> bool:
        """Whether all the head's weights are in the model's own file, by the JSON data that `save` gave."""
        return True

    def complete_state(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The full weights from those that `save` gave, where a head keeps others elsewhere."""
        return dict(state)

    def start_from(self, export: Export) -> bool:
        """Starts from a folder of a model without a head, where that has what this one is made of; whether it has.

        Raises:
            ValueError: other words, or weights that do not fit.
        """
        return False

    def anew(self, folder: Path) -> Sequence[str]:
        """Beginnings of the names of weights that start anew where training goes on from a folder with such a head.

        Args:
            folder: a model's, with a head of the same name.
        """
        return ()


def head_place(directory: Path) -> str:
    """Where a head's JSON data stand, for errors."""
    return f"{directory / CONFIG_FILE}, 'head_config'"


def chosen(logits: Tensor) -> dict[str, Tensor]:
    """What `QAHead.forward` returns for logits or log-likelihoods (B, K), -inf for what is not considered."""
    return {"prediction": logits.argmax(dim=1, keepdim=True), "scores": at_least_float32(logits).softmax(dim=1)}
