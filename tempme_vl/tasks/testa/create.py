"""TESTA's models by name, from random weights, public files or folders of this package."""

from __future__ import annotations

import logging
from dataclasses import replace
from typing import Any, TypeVar

from tempme_vl.backbones.testa_checkpoint import read_checkpoint
from tempme_vl.families import split_name
from tempme_vl.frontend import VisualFrontend, create_frontend
from tempme_vl.tasks.testa.model import TEXT_OF, ContrastOptions, MatchingModel
from tempme_vl.tasks.testa.pretraining import TestaPretrainingConfig, TestaPretrainingModel
from tempme_vl.tasks.testa.public import load_public
from tempme_vl.tasks.testa.retrieval import TestaRetrievalConfig, TestaRetrievalModel
from tempme_vl.text import BlipShape, BlipTextEncoder, blip_vocabulary
from tempme_vl.weights.exports import Export, find_export, load_exported_rest, require_vocabulary

_log = logging.getLogger(__name__)

M = TypeVar("M", bound=MatchingModel)


def create_testa_retrieval_model(
    name: str,
    vocabulary: tuple[str, ...],
    pretrained: str | None = None,
    method: str = "testa",
    num_frames: int = 32,
    training: ContrastOptions | None = None,
    **options: Any,
) -> TestaRetrievalModel:
    """TESTA's retrieval model by name ("testa:tiny", "testa:b16").

    Args:
        vocabulary: BERT's words in the order of their ids (`tempme_vl.text.tokenizers.bert_vocabulary` for public
            weights); [DEC] and [ENC] are added where they are not there.
        pretrained: a public file of BLIP or TESTA, or a folder that this package wrote of its retrieval or its
            pre-training, whose vocabulary it must be; what it lacks starts at random. None for random weights. Momentum
            copies start as copies where it has none.
        training: to train it, see `ContrastOptions`.
        others: see `tempme_vl.create_frontend`.

    Raises:
        ValueError: see `tempme_vl.create_frontend`; or a vocabulary of another size than the checkpoint's.
    """
    frontend, text, words = _parts(name, vocabulary, pretrained, method, num_frames, options)
    return _started(TestaRetrievalModel(frontend, text, words, training=training), pretrained)


def create_testa_pretraining_model(
    name: str,
    vocabulary: tuple[str, ...],
    pretrained: str | None = None,
    method: str = "none",
    num_frames: int = 8,
    training: ContrastOptions | None = None,
    **options: Any,
) -> TestaPretrainingModel:
    """TESTA's model for pre-training by name, as `create_testa_retrieval_model`; TESTA itself starts from BLIP."""
    frontend, text, words = _parts(name, vocabulary, pretrained, method, num_frames, options)
    return _started(TestaPretrainingModel(frontend, text, words, training=training), pretrained)


def _parts(
    name: str,
    vocabulary: tuple[str, ...],
    pretrained: str | None,
    method: str,
    num_frames: int,
    options: dict[str, Any],
) -> tuple[VisualFrontend, BlipTextEncoder, tuple[str, ...]]:
    family, model_name = split_name(name)
    if family != "testa":
        raise ValueError(f"expected one of TESTA's models, such as 'testa:b16'; got {name!r}")
    frontend = create_frontend(name, pretrained, method, num_frames, **options)
    words = blip_vocabulary(vocabulary)
    shape = BlipShape.named(TEXT_OF[model_name], cross_width=frontend.shape.width, vocab_size=len(words))
    return frontend, BlipTextEncoder(shape), words


def _started(model: M, pretrained: str | None) -> M:
    """With what `pretrained` holds beside the visual tower."""
    if pretrained is None:
        return model
    export = find_export(pretrained)
    if export is None:
        _log.info("%s: %s", pretrained, load_public(model, read_checkpoint(pretrained)))
    elif export.kind in (TestaRetrievalConfig.kind, TestaPretrainingConfig.kind):
        _load_rest(model, export)
        model.reset_copies()
    else:
        _log.warning("%s: a %s model has no text side for retrieval, which starts at random", pretrained, export.kind)
    return model


def _load_rest(model: MatchingModel, export: Export) -> None:
    """The text side, and of one pre-training to another the decoder."""
    require_vocabulary(export, model.vocabulary)
    anew = ["momentum.", "queue."]
    if export.kind == model.folder_config.kind:
        export = replace(export, state=model.complete_state(export.state))
    else:
        anew.append("decoder.")
    load_exported_rest(model, export, anew)
