"""How the heads whose questions BERT reads are created: its size, and the weights that it starts from."""

from __future__ import annotations

import logging
from collections.abc import Mapping

from torch import Tensor

from tempme_vl.backbones.umt_checkpoint import KeyReport, convert, read_checkpoint
from tempme_vl.families import split_name
from tempme_vl.tasks.qa.base import HeadContext
from tempme_vl.tasks.qa.options import BertOptions
from tempme_vl.tasks.qa.question import QuestionEncoder
from tempme_vl.tasks.umt_text import TEXT_OF, load_bert_side
from tempme_vl.text import BertDecoder, BertShape, load_umt_decoder
from tempme_vl.text.bert_weights import load_bert, load_bert_decoder, read_bert
from tempme_vl.weights.exports import find_export, part_of

_log = logging.getLogger("tempme_vl.tasks")


def is_umt(context: HeadContext) -> bool:
    """Whether the tower is UMT's, whose checkpoints have a text side that has seen videos."""
    return split_name(context.name)[0] == "umt"


def create_questions(context: HeadContext, options: BertOptions, proportional: bool = True) -> QuestionEncoder:
    """A question encoder with random weights, see `QuestionEncoder`."""
    model = split_name(context.name)[1]
    usual = TEXT_OF[model] if is_umt(context) else "tiny" if model == "tiny" else "bert-base"
    shape = BertShape.named(
        options.text or usual, cross_width=context.frontend.shape.width, vocab_size=len(context.vocabulary)
    )
    return QuestionEncoder.of_shape(shape, context.vocabulary, max_words=options.max_words, proportional=proportional)


def start_text(
    context: HeadContext, options: BertOptions, questions: QuestionEncoder, decoder: BertDecoder | None = None
) -> None:
    """Loads a BERT, then what a UMT checkpoint that the front end started from has of a text side.

    Raises:
        ValueError: see `read_bert`; or a text side of other sizes than the checkpoint's.
    """
    if options.text_pretrained is not None:
        bert = read_bert(options.text_pretrained)
        load_bert(questions.text, questions.fusion, bert)
        if decoder is not None:
            load_bert_decoder(decoder, bert)
    if is_umt(context) and context.pretrained is not None and find_export(context.pretrained) is None:
        _log.info("%s", load_umt_questions(questions, decoder, read_checkpoint(context.pretrained)))


def new_in_bert(context: HeadContext, options: BertOptions) -> tuple[str, ...]:
    """Patterns of what no pretrained text side had: all, or with a BERT the attention to videos, which UMT's has."""
    if is_umt(context):
        return ()
    return ("",) if options.text_pretrained is None else (r"\.fusion\..*crossattention",)


def load_umt_questions(
    questions: QuestionEncoder, decoder: BertDecoder | None, state: Mapping[str, Tensor]
) -> KeyReport:
    """Loads a question encoder, and a decoder if given, from a public UMT checkpoint, as far as it has them.

    Without a decoder of its own in the file, the decoder starts from the fusion layers, as UMT's does.

    Returns:
        what became of every key of the file, the visual ones included.

    Raises:
        ValueError: a text side of other sizes than the model's.
    """
    converted = convert(state, "qa", questions.shape.fusion_layer)
    load_bert_side(questions.text, questions.fusion, part_of(converted.state, "text_encoder."))
    if decoder is not None:
        load_umt_decoder(decoder, part_of(converted.state, "text_decoder."))
    return converted.report
