"""Answers in words: a question that has seen the video, and a decoder that ranks a list of answers or writes one.

As UMT and BLIP have it. Letters as in `tempme_vl.tasks.qa.base`; Q questions.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar, get_args

import torch
from torch import Tensor

from tempme_vl.precision import at_least_float32
from tempme_vl.tasks.qa.base import QAHead, chosen
from tempme_vl.tasks.qa.options import DecoderOptions, Rule
from tempme_vl.tasks.qa.question import BlipQuestions, QuestionEncoder
from tempme_vl.text import BertDecoder, QuestionKeys
from tempme_vl.text.tokenizers import WordPieceTokenizer


@dataclass(frozen=True)
class Ranking:
    """The likeliest answers of Q questions, the best one first.

    Attributes:
        answers: (Q, K) int64, numbers in the answer list.
        probabilities: (Q, K), the softmax of the scores over these K.
    """

    answers: Tensor
    probabilities: Tensor


class AnsweringHead(QAHead):
    """What the heads with a decoder share.

    Args:
        questions: reads questions and attends to the video.
        decoder: attends to the question's words.
        answers: the list to rank; empty to write freely.
        rule: how to answer. "likelihood": the answer of the list with the highest log p(answer), as BLIP and TESTA
            rank; "umt": by log p(first word) + log p(answer), which counts the first word twice and is behind UMT's
            published accuracies; "generate": word by word.
        candidates: answers of the list that are scored whole, those with the likeliest first words.
        answer_words: pieces of an answer, [CLS] and [SEP] among them.

    Raises:
        ValueError: an unknown rule, or one that ranks without a list of answers.
    """

    name = "decoder"
    options = DecoderOptions
    needs_vocabulary = True
    start_word: ClassVar[str] = "[CLS]"  # of every answer
    smoothing: ClassVar[float] = 0.0  # of the targets of an answer, see `BertDecoder.sequence_loss`

    def __init__(
        self,
        questions: QuestionEncoder | BlipQuestions,
        decoder: BertDecoder,
        answers: Sequence[str] = (),
        rule: Rule = "generate",
        candidates: int = 128,
        answer_words: int = 5,
    ):
        super().__init__()
        if rule not in get_args(Rule):
            raise ValueError(f"expected one of the rules {', '.join(get_args(Rule))}; got {rule!r}")
        if rule != "generate" and not answers:
            raise ValueError(f"the rule {rule!r} ranks a list of answers, and there is none: give answers")
        self.questions, self.decoder, self.answers = questions, decoder, tuple(answers)
        self.rule, self.candidates, self.answer_words = rule, candidates, answer_words

    @property
    def writes(self) -> bool:  # type: ignore[override]
        return self.rule == "generate"

    def tokenize(self, question: str, answer: str | None = None, options: Sequence[str] = ()) -> dict[str, Tensor]:
        ids, mask = self.questions.tokenize(question)
        asked = {"question_ids": ids, "question_mask": mask}
        if answer is not None:
            asked["answer_ids"], asked["answer_mask"] = self._words(answer)
        elif options:
            asked["option_ids"], asked["option_mask"] = self._stacked(options)
        return asked

    def forward(self, tokens: Tensor, size: Tensor, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """See `QAHead.forward`; states (B, L, D) of the questions, too.

        A batch may have several answers to a question: answer_row (A,) int64 says whose they are.
        """
        mask = batch["question_mask"]
        states = self.questions(batch["question_ids"], mask, self.questions.keys_values(tokens, size))
        if "answer_ids" in batch:
            question = self.decoder.keys_values(states, mask)
            if "answer_row" in batch:
                question = question.select(batch["answer_row"])
            ids, words = batch["answer_ids"].unsqueeze(1), batch["answer_mask"].unsqueeze(1)
            return {"states": states, "losses": self._loss(ids, words, question).squeeze(1)}
        return {"states": states, **self._answer(states, mask, batch)}

    @torch.no_grad()
    def _answer(self, states: Tensor, mask: Tensor, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        if "option_ids" in batch:
            question = self.decoder.keys_values(states, mask)
            losses = self._loss(batch["option_ids"], batch["option_mask"], question)
            if "option_valid" in batch:
                losses = losses.masked_fill(~batch["option_valid"].bool(), torch.inf)
            return chosen(-losses)
        if self.rule == "generate":
            written = self.generate(states, mask)
            return {"prediction": written, "scores": self._probability(written, states, mask)}
        ids, words = (part.to(states.device) for part in self._list)
        ranking = self.rank(states, mask, ids, words, self.candidates, self.rule)
        scores = ranking.probabilities.new_zeros(len(states), len(ids))
        return {
            "prediction": ranking.answers[:, :1],
            "scores": scores.scatter(1, ranking.answers, ranking.probabilities),
        }

    @torch.no_grad()
    def rank(
        self,
        states: Tensor,
        mask: Tensor,
        answer_ids: Tensor,
        answer_mask: Tensor,
        candidates: int = 128,
        rule: Rule = "likelihood",
        rows: int = 1024,
    ) -> Ranking:
        """Answers of a list in the order of their likelihood.

        The candidates are those whose first word is the likeliest one; among equals, such as answers with the same
        first word, the earlier ones of the list.

        Args:
            states, mask: (Q, L, D) and (Q, L) of the questions.
            answer_ids, answer_mask: (A, L), the list; [CLS], words, [SEP], then padding.
            candidates: K; the whole list where it is shorter.
            rule: the score, "likelihood" or "umt".
            rows: answers that are decoded at once, at least one per question: bounds the memory.

        Raises:
            ValueError: a rule that does not rank, an empty list, answers that are only [CLS], or no candidates.
        """
        if rule not in ("likelihood", "umt"):
            raise ValueError(f"expected a rule that ranks, likelihood or umt; got {rule!r}")
        if candidates < 1 or answer_ids.ndim != 2 or answer_ids.shape != answer_mask.shape or not answer_ids.numel():
            raise ValueError(
                f"expected answers (A, L) with a mask alike, at least one of them, and at least one candidate; got "
                f"{tuple(answer_ids.shape)}, {tuple(answer_mask.shape)} and {candidates} candidates"
            )
        if answer_ids.shape[1] < 2 or not answer_mask[:, 1].all():
            raise ValueError("expected answers of [CLS] and at least one word; some of these have none")
        question = self.decoder.keys_values(states, mask)
        first_words = self._first_words(question, answer_ids)
        # stable, so that ties fall alike on every machine
        first_words, order = first_words.sort(dim=1, descending=True, stable=True)
        first_words, chosen = first_words[:, :candidates], order[:, :candidates]
        losses = [
            self._loss(answer_ids[part], answer_mask[part], question)
            for part in chosen.split(max(1, rows // len(states)), dim=1)
        ]
        scores = -torch.cat(losses, dim=1)
        if rule == "umt":
            scores = scores + first_words
        probabilities, order = scores.softmax(1).sort(dim=1, descending=True, stable=True)
        return Ranking(chosen.gather(1, order), probabilities)

    def generate(self, states: Tensor, mask: Tensor, max_words: int | None = None) -> Tensor:
        """The likeliest words one after the other: (Q, max_words) int64, the end token among them, then padding.

        Args:
            states, mask: (Q, L, D) and (Q, L) of the questions.
            max_words: most word pieces of an answer, the end token among them; as in training by default, where
                an answer starts with a token that is not generated.

        Raises:
            ValueError: a vocabulary that is not the decoder's, or without [CLS] and [SEP].
        """
        words = self.questions.vocabulary
        if len(words) != self.decoder.shape.vocab_size or not {self.start_word, "[SEP]"} <= set(words):
            raise ValueError(
                f"expected a vocabulary of {self.decoder.shape.vocab_size} words, {self.start_word} and [SEP] among "
                f"them; got {len(words)}: create the model with the one it was trained with"
            )
        start, end = words.index(self.start_word), words.index("[SEP]")
        most = self.answer_words - 1 if max_words is None else max_words
        return self._write(self.decoder.keys_values(states, mask), start, end, most)

    def _write(self, question: QuestionKeys, start: int, end: int, most: int) -> Tensor:
        return self.decoder.generate(question, start, end, most)

    def _probability(self, written: Tensor, states: Tensor, mask: Tensor) -> Tensor:
        """(Q, 1) of generated words (Q, L), up to their end token."""
        words = self.questions.vocabulary
        start = torch.full_like(written[:, :1], words.index(self.start_word))
        ended = (written == words.index("[SEP]")).cumsum(dim=1)
        real = torch.cat([torch.ones_like(start), torch.cat([torch.ones_like(start), 1 - ended[:, :-1]], dim=1)], dim=1)
        ids = torch.cat([start, written], dim=1)
        question = self.decoder.keys_values(states, mask)
        return (-self.decoder.sequence_loss(ids.unsqueeze(1), real.unsqueeze(1), question)).exp()

    def _loss(self, ids: Tensor, mask: Tensor, question: QuestionKeys) -> Tensor:
        """Of whole answers (Q, K, L), as they are trained: (Q, K)."""
        return self.decoder.sequence_loss(self.begun(ids), mask, question, self.smoothing)

    def begun(self, ids: Tensor) -> Tensor:
        """Ids of answers (..., L), which start with [CLS], as the decoder takes them."""
        return ids

    def text(self, prediction: Sequence[int]) -> str:
        """An answer of the list by its number, or generated pieces joined to words."""
        if self.rule != "generate":
            return self.answers[prediction[0]]
        words = self.questions.vocabulary
        ids, end = list(prediction), words.index("[SEP]")
        ids = ids[: ids.index(end)] if end in ids else ids
        # pieces that continue a word begin with ##
        return " ".join(words[number] for number in ids).replace(" ##", "")

    def _first_words(self, question: QuestionKeys, answer_ids: Tensor) -> Tensor:
        """(Q, A): log p of every answer's first word, all answers starting with the same token."""
        start = self.begun(answer_ids)[:1, :1].expand(len(question), 1).unsqueeze(1)
        return at_least_float32(self.decoder(start, question)).log_softmax(-1).flatten(1)[:, answer_ids[:, 1]]

    def _words(self, answer: str) -> tuple[Tensor, Tensor]:
        return self._tokenizer(answer)

    def _stacked(self, answers: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Ids and mask (K, answer_words)."""
        ids, masks = zip(*map(self._words, answers), strict=True)
        return torch.stack(ids), torch.stack(masks)

    @cached_property
    def _tokenizer(self) -> WordPieceTokenizer:
        return WordPieceTokenizer(self.questions.vocabulary, self.answer_words, end=True)

    @cached_property
    def _list(self) -> tuple[Tensor, Tensor]:
        return self._stacked(self.answers)

    def set_grad_checkpointing(self, enable: bool) -> None:
        self.questions.set_grad_checkpointing(enable)
        self.decoder.grad_checkpointing = enable
