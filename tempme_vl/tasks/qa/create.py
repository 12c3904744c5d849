"""Question answering models by name."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import fields
from typing import Any, cast

from tempme_vl.families import find_family
from tempme_vl.frontend import create_frontend
from tempme_vl.tasks.heads import find_head, read_options
from tempme_vl.tasks.inputs import VideoInput
from tempme_vl.tasks.qa.base import HeadContext, QAHead
from tempme_vl.tasks.qa.model import VideoQAModel
from tempme_vl.weights.exports import Export, find_export, load_exported_rest, require_vocabulary

_log = logging.getLogger("tempme_vl.tasks")


def create_qa_model(
    name: str,
    vocabulary: Sequence[str] = (),
    head: str = "decoder",
    answers: Sequence[str] = (),
    pretrained: str | None = None,
    method: str = "tempme",
    num_frames: int = 12,
    clip_position_std: float = 0.0,
    **options: Any,
) -> VideoQAModel:
    """A front end by name with a head that answers questions.

    Args:
        name: "family:model", as in `tempme_vl.create_frontend`.
        vocabulary: words that questions are read with, in the order of their ids, for a head that needs them: BERT's
            (`tempme_vl.text.tokenizers.bert_vocabulary`, or `word_vocabulary` for small models).
        head: one of `tempme_vl.HEADS`: "classifier" (a class for each of `answers`), "decoder" (ranks `answers`, or
            writes freely), "llm" (a causal language model of transformers writes), or another package's.
        answers: the most frequent one first, from the training split only
            (`tempme_vl.data.videoqa.answer_vocabulary`).
        pretrained: weights of the front end; of a UMT checkpoint in any form also the text side and the decoder, as
            far as it has them; of a question answering model's folder that this package wrote also the same head, with
            that folder's vocabulary, but for a language model; of TESTA's pre-training the text side and the decoder.
            What it lacks starts at random.
        options: the head's own (`tempme_vl.tasks.qa.options`: text, text_pretrained and max_words of the classifier;
            these, rule, candidates and answer_words of the decoder; llm and others of the language model) and those of
            `tempme_vl.create_frontend`, as all others.

    Raises:
        ValueError: see `tempme_vl.create_frontend` and the heads; an unknown head, or one without the words that it
            needs; or a text side of other sizes than the checkpoint's.
    """
    kind = cast(type[QAHead], find_head(head, "qa"))
    own = {field.name for field in fields(kind.options)}
    told = read_options(head, {key: value for key, value in options.items() if key in own})
    if kind.needs_vocabulary and not vocabulary:
        raise ValueError(f"the head {head!r} needs a vocabulary: see tempme_vl.text.tokenizers.bert_vocabulary")
    rest = {key: value for key, value in options.items() if key not in own}
    frontend = create_frontend(name, pretrained, method, num_frames, clip_position_std, **rest)
    made = kind.create(HeadContext(name, frontend, tuple(answers), tuple(vocabulary), pretrained), told)
    model = VideoQAModel(frontend, made, VideoInput(find_family(name).sampling))
    export = None if pretrained is None else find_export(pretrained)
    if export:
        _load_head(model, tuple(vocabulary), export)
    return model


def _load_head(model: VideoQAModel, vocabulary: tuple[str, ...], export: Export) -> None:
    """Starts the head from a folder of the package, where that has the same.

    Raises:
        ValueError: other words, or weights that do not fit.
    """
    if export.config.get("head") is None and model.head.start_from(export):
        return
    if export.config.get("head") != model.head.name:
        theirs = export.config.get("head", "none")
        _log.warning("%s: its head is %s, so the %s starts anew", export.folder, theirs, model.head.name)
        return
    if model.head.needs_vocabulary:
        require_vocabulary(export, model.head.own_vocabulary(vocabulary))
    load_exported_rest(model, export, anew=[f"head.{start}" for start in model.head.anew(export.folder)])
