"""UMT's question answering model on its public weights: the decoder head with UMT's own sizes and settings."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from tempme_vl.backbones.umt import Mode
from tempme_vl.backbones.umt_checkpoint import convert
from tempme_vl.frontend import VisualFrontend
from tempme_vl.merging import MergeSchedule
from tempme_vl.tasks.inputs import VideoInput
from tempme_vl.tasks.qa.decoder import DecoderHead
from tempme_vl.tasks.qa.model import VideoQAModel
from tempme_vl.tasks.qa.question import QuestionEncoder
from tempme_vl.text import BertDecoder, bert_from_umt, load_umt_decoder
from tempme_vl.weights.exports import part_of


def umt_qa_from_state_dict(
    state: Mapping[str, Tensor],
    heads: int,
    text_heads: int,
    image_size: int,
    mode: Mode,
    schedule: MergeSchedule,
    vocabulary: tuple[str, ...] = (),
) -> VideoQAModel:
    """A model on UMT-named weights of the QA or the pre-training form; all other sizes follow from their shapes.

    It generates; for a ranked list give its head's parts and the list to another `DecoderHead`.

    Args:
        heads, text_heads: of the visual and the text tower.
        others: see `VisualFrontend.from_umt_state_dict`.

    Raises:
        ValueError: weights of another family, or missing or unknown keys.
    """
    converted = convert(state, "qa")
    if trouble := converted.report.trouble:
        raise ValueError(f"not the weights of UMT's question answering: {trouble}")
    frontend = VisualFrontend.from_umt_state_dict(converted.state, heads, image_size, mode, schedule)
    text, fusion = bert_from_umt(part_of(converted.state, "text_encoder."), text_heads)
    answers = part_of(converted.state, "text_decoder.")
    depth = sum(key.endswith(".crossattention.self.query.weight") for key in answers)
    decoder = BertDecoder(text.shape, depth)
    load_umt_decoder(decoder, answers)
    questions = QuestionEncoder(text, fusion, vocabulary, proportional=False)
    return VideoQAModel(frontend, DecoderHead(questions, decoder), VideoInput("segment"))
