"""Question answering as BLIP and TESTA have it: a question read with the video, and a decoder of answers.

It is the head "decoder" with other parts. Questions start with [ENC] and answers with [DEC], targets are smoothed, in
training and where answers are ranked, and what is written freely is the best of three beams.

Letters as in `tempme_vl.tasks.qa.base`; Q questions.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tempme_vl.backbones.testa_checkpoint import read_checkpoint
from tempme_vl.families import split_name
from tempme_vl.fit import load_strictly
from tempme_vl.frontend import VisualFrontend
from tempme_vl.manifest import errors_in
from tempme_vl.merging import MergeSchedule
from tempme_vl.pretrained import load_answers, load_vocabulary, save_answers, save_vocabulary
from tempme_vl.schema import Layers, Size, read, write
from tempme_vl.tasks.inputs import VideoInput
from tempme_vl.tasks.qa.answering import AnsweringHead
from tempme_vl.tasks.qa.base import HeadContext, head_place
from tempme_vl.tasks.qa.model import VideoQAModel
from tempme_vl.tasks.qa.options import DecoderOptions, Rule
from tempme_vl.tasks.qa.question import BlipQuestions
from tempme_vl.tasks.testa.captioning import SMOOTHING
from tempme_vl.tasks.testa.model import TEXT_OF
from tempme_vl.tasks.testa.pretraining import TestaPretrainingConfig, TestaPretrainingModel
from tempme_vl.tasks.testa.public import load_public
from tempme_vl.text import BertDecoder, BlipShape, BlipTextEncoder, QuestionKeys, blip_vocabulary
from tempme_vl.text.beams import Writing
from tempme_vl.text.beams import write as write_words
from tempme_vl.text.bert_layer import PAD
from tempme_vl.text.blip import DECODE, started, text_from_public
from tempme_vl.weights.exports import Export, find_export, part_of, require_vocabulary

_log = logging.getLogger("tempme_vl.tasks")


READER = "reader"  # in the JSON data of this head alone


@dataclass(frozen=True)
class _Saved:
    """The JSON data of a `BlipDecoderHead`."""

    reader: Literal["blip"]
    text: BlipShape
    max_words: Size
    layers: Layers
    rule: Rule
    candidates: Size
    answer_words: Size


class BlipDecoderHead(AnsweringHead):
    """See `AnsweringHead`; questions are read by BLIP's encoder."""

    start_word = DECODE
    smoothing = SMOOTHING
    beams: ClassVar[int] = 3

    def begun(self, ids: Tensor) -> Tensor:
        return started(ids, self.decoder.shape.vocab_size - 2)

    def own_vocabulary(self, vocabulary: tuple[str, ...]) -> tuple[str, ...]:
        return blip_vocabulary(vocabulary)

    def start_from(self, export: Export) -> bool:
        if export.kind != TestaPretrainingConfig.kind:
            return False
        require_vocabulary(export, self.questions.vocabulary)
        state = TestaPretrainingModel.complete_state(export.state)
        load_strictly(self.questions.text, part_of(state, "text."), f"the text side of {export.folder}")
        load_strictly(self.decoder, part_of(state, "decoder."), f"the decoder of {export.folder}")
        return True

    def _write(self, question: QuestionKeys, start: int, end: int, most: int) -> Tensor:
        first = question.mask.new_full((len(question), 1), start, dtype=torch.int64)
        writing = Writing(end, PAD, self.beams, most + 1)
        written = write_words(lambda ids: self.decoder(ids, question)[:, :, -1], first, writing)[:, 1:]
        return F.pad(written, (0, most - written.shape[1]), value=PAD)

    def save(self, directory: Path, state: Mapping[str, Tensor]) -> tuple[dict[str, Any], dict[str, Tensor]]:
        save_answers(directory, self.answers)
        save_vocabulary(directory, self.questions.vocabulary)
        assert isinstance(self.questions, BlipQuestions)
        saved = _Saved(
            "blip",
            self.questions.shape,
            self.questions.max_words,
            len(self.decoder.layers),
            self.rule,
            self.candidates,
            self.answer_words,
        )
        return write(saved), dict(state)


def create_blip_head(context: HeadContext, options: DecoderOptions) -> BlipDecoderHead:
    """The head of a tower of TESTA, whose public file it starts from if the tower does.

    Raises:
        ValueError: options that BLIP's texts do not have; or a text side of other sizes than the file's.
    """
    if options.text_pretrained is not None or options.rule == "umt":
        raise ValueError(
            "a tower of TESTA has BLIP's texts, which start from a file of BLIP or TESTA (pretrained) and answer by "
            f"likelihood or word by word; got text_pretrained={options.text_pretrained!r}, rule={options.rule!r}"
        )
    words = blip_vocabulary(context.vocabulary)
    usual = TEXT_OF[split_name(context.name)[1]]
    changes = {"cross_width": context.frontend.shape.width, "vocab_size": len(words)}
    shape = BlipShape.named(options.text or usual, **changes)
    questions = BlipQuestions(BlipTextEncoder(shape), words, options.max_words)
    decoder = BertDecoder(shape, shape.layers)
    if context.pretrained is not None and find_export(context.pretrained) is None:
        parts = nn.ModuleDict({"text": questions.text, "decoder": decoder})
        _log.info("%s: %s", context.pretrained, load_public(parts, read_checkpoint(context.pretrained)))
    rule: Rule = options.rule or ("likelihood" if context.answers else "generate")
    return BlipDecoderHead(questions, decoder, context.answers, rule, options.candidates, options.answer_words)


def load_blip_head(config: Mapping[str, Any], directory: Path) -> BlipDecoderHead:
    """What `BlipDecoderHead.save` described, its weights still to be loaded.

    Raises:
        ConfigError: JSON data that it does not give.
    """
    saved = read(_Saved, config, head_place(directory))
    vocabulary = load_vocabulary(directory, saved.text.vocab_size)
    questions = BlipQuestions(BlipTextEncoder(saved.text), vocabulary, saved.max_words)
    decoder, answers = BertDecoder(saved.text, saved.layers), load_answers(directory)
    with errors_in(head_place(directory)):
        return BlipDecoderHead(questions, decoder, answers, saved.rule, saved.candidates, saved.answer_words)


def qa_from_testa_state_dict(
    state: Mapping[str, Tensor],
    heads: int,
    text_heads: int,
    image_size: int,
    schedule: MergeSchedule,
    vocabulary: tuple[str, ...],
    dropout: float = 0.1,
) -> VideoQAModel:
    """A model on the weights of a file of question answering; all other sizes follow from their shapes.

    It writes; for a ranked list give its head's parts and the list to another `BlipDecoderHead`.

    Args:
        heads, text_heads: of the visual and the text tower.
        vocabulary: of the file, [DEC] and [ENC] the last.
        others: see `VisualFrontend.from_testa_state_dict`.

    Raises:
        ValueError: weights of another family, or missing keys.
    """
    frontend = VisualFrontend.from_testa_state_dict(state, heads, image_size, schedule)
    text = text_from_public(part_of(state, "text_encoder."), text_heads, dropout)
    layers = sum(key.endswith(".crossattention.self.query.weight") for key in part_of(state, "text_decoder."))
    decoder = BertDecoder(text.shape, layers)
    converted = load_public(nn.ModuleDict({"text": text, "decoder": decoder}), state)
    if converted.missing or not layers:
        raise ValueError(f"not the weights of TESTA's question answering: {converted}")
    return VideoQAModel(
        frontend, BlipDecoderHead(BlipQuestions(text, vocabulary), decoder, answer_words=10), VideoInput("uniform")
    )
