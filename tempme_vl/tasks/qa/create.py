"""Question answering models by name."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from tempme_vl.backbones.umt_checkpoint import read_checkpoint
from tempme_vl.families import find_family, split_name
from tempme_vl.frontend import create_frontend
from tempme_vl.pretrained import load_answers
from tempme_vl.tasks.inputs import VideoInput
from tempme_vl.tasks.qa.base import QAHead, VideoQAModel
from tempme_vl.tasks.qa.classifier import ClassifierHead
from tempme_vl.tasks.qa.decoder import DecoderHead, Rule
from tempme_vl.tasks.qa.llm import TEMPLATE, LLMHead, load_llm, load_tokenizer
from tempme_vl.tasks.qa.question import QuestionEncoder
from tempme_vl.tasks.qa.umt import load_umt_questions
from tempme_vl.tasks.umt_text import TEXT_OF
from tempme_vl.text import BertDecoder, BertShape
from tempme_vl.text.bert_weights import load_bert, load_bert_decoder, read_bert
from tempme_vl.tuning import Lora
from tempme_vl.weights.exports import Export, find_export, load_exported_rest, require_vocabulary

_log = logging.getLogger("tempme_vl.tasks")


def create_qa_model(
    name: str,
    vocabulary: tuple[str, ...],
    head: Literal["classifier", "decoder"] = "decoder",
    answers: Sequence[str] = (),
    pretrained: str | None = None,
    method: str = "tempme",
    num_frames: int = 12,
    clip_position_std: float = 0.0,
    text: str | None = None,
    text_pretrained: str | None = None,
    max_words: int = 25,
    rule: Rule | None = None,
    candidates: int = 128,
    answer_words: int = 5,
    **options: Any,
) -> VideoQAModel:
    """A front end by name with a head that reads questions with BERT.

    Args:
        name: "family:model", as in `tempme_vl.create_frontend`.
        vocabulary: BERT's words in the order of their ids (`tempme_vl.text.tokenizers.bert_vocabulary`, or
            `word_vocabulary` for small models).
        head: "classifier" (a class for each of `answers`) or "decoder" (ranks `answers`, or writes freely).
        answers: the most frequent one first, from the training split only
            (`tempme_vl.data.videoqa.answer_vocabulary`).
        pretrained: weights of the front end; of a UMT checkpoint in any form also the text side and the decoder, as
            far as it has them; of a question answering model's folder that this package wrote also the same head, with
            that folder's vocabulary. What it lacks starts at random.
        text: a `BertShape` by name; default: UMT's own, "tiny" for tiny towers and "bert-base" for others.
        text_pretrained: a BERT (`tempme_vl.text.bert_weights.read_bert`) that question encoder and decoder start from,
            before what a UMT checkpoint has of them; None for random weights.
        rule: how the decoder answers (`DecoderHead`); default: "likelihood" with answers, else "generate".
        others: see `tempme_vl.create_frontend`.

    Raises:
        ValueError: see `tempme_vl.create_frontend` and the heads; an unknown head; or a text side of other sizes than
            the checkpoint's.
    """
    if head not in ("classifier", "decoder"):
        raise ValueError(f"expected one of the heads classifier, decoder; got {head!r}")
    family, model = split_name(name)
    frontend = create_frontend(name, pretrained, method, num_frames, clip_position_std, **options)
    default = TEXT_OF[model] if family == "umt" else "tiny" if model == "tiny" else "bert-base"
    shape = BertShape.named(text or default, cross_width=frontend.shape.width, vocab_size=len(vocabulary))
    # UMT's decoder was trained on tokens of one size, and gives them equal weight
    questions = QuestionEncoder.of_shape(
        shape, vocabulary, max_words=max_words, proportional=head == "classifier" or family != "umt"
    )
    decoder = BertDecoder(shape, shape.layers - shape.fusion_layer) if head == "decoder" else None
    if text_pretrained is not None:
        bert = read_bert(text_pretrained)
        load_bert(questions.text, questions.fusion, bert)
        if decoder is not None:
            load_bert_decoder(decoder, bert)
    export = None if pretrained is None else find_export(pretrained)
    if family == "umt" and pretrained is not None and export is None:
        _log.info("%s", load_umt_questions(questions, decoder, read_checkpoint(pretrained)))
    made: QAHead
    if decoder is None:
        made = ClassifierHead(questions, answers)
    else:
        rule = rule or ("likelihood" if answers else "generate")
        made = DecoderHead(questions, decoder, answers, rule, candidates, answer_words)
    if family != "umt":  # UMT's has seen videos
        made.new_parameters = (*made.new_parameters, "" if text_pretrained is None else r"\.fusion\..*crossattention")
    qa_model = VideoQAModel(frontend, made, _input(name))
    if export:
        _load_head(qa_model, vocabulary, export)
    return qa_model


def _load_head(model: VideoQAModel, vocabulary: tuple[str, ...], export: Export) -> None:
    """Starts the head from a folder of the package, where that has the same; classes of other answers start anew.

    Raises:
        ValueError: other words, or weights that do not fit.
    """
    if export.config.get("head") != model.head.name:
        theirs = export.config.get("head", "none")
        _log.warning("%s: its head is %s, so the %s starts anew", export.folder, theirs, model.head.name)
        return
    require_vocabulary(export, vocabulary)
    other_answers = model.head.name == "classifier" and load_answers(export.folder) != model.head.answers
    load_exported_rest(model, export, anew=("head.classifier.2.",) if other_answers else ())


def create_llm_qa_model(
    name: str,
    llm: str,
    pretrained: str | None = None,
    method: str = "tempme",
    num_frames: int = 12,
    clip_position_std: float = 0.0,
    template: str = TEMPLATE,
    max_words: int = 64,
    answer_words: int = 8,
    train_llm: bool = False,
    lora_rank: int = 0,
    lora_alpha: int = 16,
    lora_dropout: float = 0.0,
    dtype: str = "float32",
    **options: Any,
) -> VideoQAModel:
    """A front end by name in front of a causal language model of transformers, which writes the answers.

    Args:
        name: "family:model", as in `tempme_vl.create_frontend`.
        llm: a folder, or a name on the hub, with safetensors weights and a tokenizer of any kind.
        pretrained: weights of the front end, and of it alone, whatever else a folder of this package holds.
        template, max_words, answer_words: see `LLMHead`.
        train_llm: train all of the language model; without it and without LoRA it stays as it is.
        lora_rank, lora_alpha, lora_dropout: of LoRA on the language model (`Lora.wrap`); rank 0 for none.
        dtype: of the language model's weights: float32, bfloat16 or float16.
        others: see `tempme_vl.create_frontend`.

    Raises:
        ValueError: see `tempme_vl.create_frontend`, `load_llm` and `LLMHead`.
    """
    frontend = create_frontend(name, pretrained, method, num_frames, clip_position_std, **options)
    source = str(Path(llm).resolve()) if Path(llm).is_dir() else llm  # found again from any working directory
    model = load_llm(source, dtype)
    head = LLMHead(
        Lora(lora_rank, lora_alpha, lora_dropout).wrap(model, task="CAUSAL_LM") if lora_rank else model,
        load_tokenizer(source),
        frontend.shape.width,
        frontend.schedule.output_tokens,
        template,
        max_words,
        answer_words,
        train_llm,
        source,
    )
    return VideoQAModel(frontend, head, _input(name))


def _input(name: str) -> VideoInput:
    """As a tower's family samples frames."""
    return VideoInput(find_family(name).sampling)
