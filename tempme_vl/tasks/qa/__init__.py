"""Video question answering: one model, and heads by name. A new one is a file with a `QAHead` and a line in `HEADS`."""

from __future__ import annotations

from pathlib import Path

from tempme_vl.frontend import VisualFrontend
from tempme_vl.pretrained import load_model, load_weights
from tempme_vl.tasks.qa.base import QAHead, VideoQAModel
from tempme_vl.tasks.qa.classifier import ClassifierHead
from tempme_vl.tasks.qa.decoder import DecoderHead
from tempme_vl.tasks.qa.llm import LLMHead
from tempme_vl.tasks.umt_text import part_of

__all__ = ["HEADS", "ClassifierHead", "DecoderHead", "LLMHead", "QAHead", "VideoQAModel", "load_qa_model"]

HEADS: dict[str, type[QAHead]] = {"classifier": ClassifierHead, "decoder": DecoderHead, "llm": LLMHead}


def load_qa_model(directory: str | Path) -> VideoQAModel:
    """Reads what `VideoQAModel.save_pretrained` wrote.

    Raises:
        ValueError: a folder without the files, one of another kind of model, or weights that do not fit.
    """
    config, state = load_model(directory)
    if config["kind"] != "video_qa":
        raise ValueError(f"expected a question answering model in {directory}; got one of kind {config['kind']!r}")
    frontend = VisualFrontend.from_config(config["frontend"])
    head = HEADS[config["head"]].load(config["head_config"], Path(directory), frontend.shape)
    model = VideoQAModel(frontend, head, config["input"])
    of_head = head.complete_state(part_of(state, "head."))
    load_weights(model, state | {f"head.{key}": value for key, value in of_head.items()}, directory)
    return model
