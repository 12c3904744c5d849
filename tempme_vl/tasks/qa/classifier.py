"""Answers as classes: a question that has seen the video, and an MLP over the most frequent training answers (ALPRO).

Without a list of answers it chooses among a question's options: each is read behind the question, and the MLP gives
one logit for it. Letters as in `tempme_vl.tasks.qa.base`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tempme_vl.backbones.base import TowerShape
from tempme_vl.precision import at_least_float32
from tempme_vl.pretrained import load_answers, save_answers
from tempme_vl.schema import read, write
from tempme_vl.tasks.qa.base import HeadContext, QAHead, chosen, head_place
from tempme_vl.tasks.qa.bert import create_questions, new_in_bert, start_text
from tempme_vl.tasks.qa.options import BertOptions
from tempme_vl.tasks.qa.question import QuestionEncoder, SavedQuestions


class ClassifierHead(QAHead):
    """Args:
    questions: reads questions and attends to the video.
    answers: the classes; empty to choose among options.
    """

    name = "classifier"
    options = BertOptions
    needs_vocabulary = True
    only_options = True

    def __init__(self, questions: QuestionEncoder, answers: Sequence[str]):
        super().__init__()
        width = questions.shape.width
        self.questions, self.answers = questions, tuple(answers)
        self.classifier = nn.Sequential(
            nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, max(1, len(answers)))
        )
        self.new_parameters = (r"^classifier\.",)
        self._number = {answer: number for number, answer in enumerate(answers)}

    @classmethod
    def create(cls, context: HeadContext, options: BertOptions) -> ClassifierHead:
        questions = create_questions(context, options)
        start_text(context, options, questions)
        head = cls(questions, context.answers)
        head.new_parameters += new_in_bert(context, options)
        return head

    def tokenize(self, question: str, answer: str | None = None, options: Sequence[str] = ()) -> dict[str, Tensor]:
        """See `QAHead.tokenize`. An answer outside the list gets the weight 0: it is not trained on.

        Raises:
            ValueError: where there is no list of answers, no options or an answer that is none of them; where there
                is one, no option that is in it.
        """
        if not self.answers:
            return self._tokenize_options(question, answer, options)
        ids, mask = self.questions.tokenize(question)
        asked = {"question_ids": ids, "question_mask": mask}
        if options:
            classes = torch.tensor([self._number.get(option, -1) for option in options])
            if (classes < 0).all():
                raise ValueError(f"none of the options {list(options)} is among the {len(self.answers)} answers")
            asked["option_class"] = classes
        if answer is not None:
            number = self._number.get(answer, -1)
            asked |= {"answer_class": torch.tensor(max(0, number)), "answer_weight": torch.tensor(float(number >= 0))}
        return asked

    def _tokenize_options(self, question: str, answer: str | None, options: Sequence[str]) -> dict[str, Tensor]:
        if not options:
            raise ValueError(f"this head chooses among options, but the question has none: {question!r}")
        ids, masks = zip(*(self.questions.tokenize(f"{question} {option}") for option in options), strict=True)
        asked = {"option_ids": torch.stack(ids), "option_mask": torch.stack(masks)}
        if answer is None:
            return asked
        if answer not in options:
            raise ValueError(f"expected one of the options {list(options)} as the answer; got {answer!r}")
        return {**asked, "answer_class": torch.tensor(list(options).index(answer))}

    def forward(self, tokens: Tensor, size: Tensor, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """See `QAHead.forward`; logits (B, A), or (B, K) of options, too."""
        keys = self.questions.keys_values(tokens, size)
        if self.answers:
            logits = self._logits(batch["question_ids"], batch["question_mask"], keys)
        else:
            videos, options, _ = batch["option_ids"].shape
            rows = torch.arange(videos, device=tokens.device).repeat_interleave(options)
            ids, mask = batch["option_ids"].flatten(0, 1), batch["option_mask"].flatten(0, 1)
            logits = self._logits(ids, mask, keys.select(rows)).view(videos, options)
            if "option_valid" in batch:
                logits = logits.masked_fill(~batch["option_valid"].bool(), -torch.inf)
        if "answer_class" in batch:
            return {"logits": logits, "losses": F.cross_entropy(logits, batch["answer_class"], reduction="none")}
        if "option_class" in batch:
            logits = self._of_options(logits, batch)
        return {"logits": logits, **chosen(logits)}

    def _logits(self, ids: Tensor, mask: Tensor, keys: Any) -> Tensor:
        return at_least_float32(self.classifier(self.questions(ids, mask, keys)[:, 0]))

    @staticmethod
    def _of_options(logits: Tensor, batch: Mapping[str, Tensor]) -> Tensor:
        """(B, A) -> (B, K), -inf for options that are no class."""
        classes = batch["option_class"]
        there = classes >= 0
        if "option_valid" in batch:
            there = there & batch["option_valid"].bool()
        return logits.gather(1, classes.clamp(min=0)).masked_fill(~there, -torch.inf)

    def set_grad_checkpointing(self, enable: bool) -> None:
        self.questions.set_grad_checkpointing(enable)

    def save(self, directory: Path, state: Mapping[str, Tensor]) -> tuple[dict[str, Any], dict[str, Tensor]]:
        save_answers(directory, self.answers)
        return write(self.questions.save(directory)), dict(state)

    def anew(self, folder: Path) -> Sequence[str]:
        """Classes of other answers start anew."""
        return ("classifier.2.",) if load_answers(folder) != self.answers else ()

    @classmethod
    def load(cls, config: Mapping[str, Any], directory: Path, shape: TowerShape) -> ClassifierHead:
        saved = read(SavedQuestions, config, head_place(directory))
        return cls(QuestionEncoder.load(saved, directory), load_answers(directory))
