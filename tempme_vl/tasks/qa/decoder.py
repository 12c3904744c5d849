"""The head "decoder": how it is created and saved, with the texts of UMT, or of BLIP on a tower of TESTA."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from tempme_vl.backbones.base import TowerShape
from tempme_vl.families import split_name
from tempme_vl.manifest import errors_in
from tempme_vl.pretrained import load_answers, save_answers
from tempme_vl.schema import Layers, Size, read, write
from tempme_vl.tasks.qa.answering import AnsweringHead, Ranking
from tempme_vl.tasks.qa.base import HeadContext, head_place
from tempme_vl.tasks.qa.bert import create_questions, is_umt, new_in_bert, start_text
from tempme_vl.tasks.qa.blip import READER, create_blip_head, load_blip_head
from tempme_vl.tasks.qa.options import DecoderOptions, Rule
from tempme_vl.tasks.qa.question import QuestionEncoder, SavedQuestions
from tempme_vl.text import BertDecoder

__all__ = ["DecoderHead", "Ranking", "Rule"]


@dataclass(frozen=True)
class _Saved(SavedQuestions):
    """The JSON data of a `DecoderHead`."""

    layers: Layers
    rule: Rule
    candidates: Size
    answer_words: Size


class DecoderHead(AnsweringHead):
    """See `AnsweringHead`; questions are read by UMT's BERT."""

    @classmethod
    def create(cls, context: HeadContext, options: DecoderOptions) -> AnsweringHead:
        if split_name(context.name)[0] == "testa":
            return create_blip_head(context, options)
        # UMT's decoder was trained on tokens of one size, and gives them equal weight
        questions = create_questions(context, options, proportional=not is_umt(context))
        shape = questions.shape
        decoder = BertDecoder(shape, shape.layers - shape.fusion_layer)
        start_text(context, options, questions, decoder)
        rule = options.rule or ("likelihood" if context.answers else "generate")
        head = cls(questions, decoder, context.answers, rule, options.candidates, options.answer_words)
        head.new_parameters = new_in_bert(context, options)
        return head

    def save(self, directory: Path, state: Mapping[str, Tensor]) -> tuple[dict[str, Any], dict[str, Tensor]]:
        save_answers(directory, self.answers)
        assert isinstance(self.questions, QuestionEncoder)
        saved = _Saved(
            **vars(self.questions.save(directory)),
            layers=len(self.decoder.layers),
            rule=self.rule,
            candidates=self.candidates,
            answer_words=self.answer_words,
        )
        return write(saved), dict(state)

    @classmethod
    def load(cls, config: Mapping[str, Any], directory: Path, shape: TowerShape) -> AnsweringHead:
        if READER in config:
            return load_blip_head(config, directory)
        saved = read(_Saved, config, head_place(directory))
        questions, answers = QuestionEncoder.load(saved, directory), load_answers(directory)
        decoder = BertDecoder(questions.shape, saved.layers)
        with errors_in(head_place(directory)):
            return cls(questions, decoder, answers, saved.rule, saved.candidates, saved.answer_words)
