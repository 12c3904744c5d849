"""Video question answering: one model, and heads by name. A new one is a file with a `QAHead` and a line in `HEADS`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from tempme_vl.frontend import VisualFrontend
from tempme_vl.pretrained import CONFIG_FILE, load_model, require_fit, sketch
from tempme_vl.schema import read
from tempme_vl.tasks.inputs import Inputs
from tempme_vl.tasks.qa.base import QAHead, VideoQAModel
from tempme_vl.tasks.qa.classifier import ClassifierHead
from tempme_vl.tasks.qa.decoder import DecoderHead
from tempme_vl.tasks.qa.llm import LLMHead
from tempme_vl.weights.exports import part_of

__all__ = ["HEADS", "ClassifierHead", "DecoderHead", "LLMHead", "QAHead", "VideoQAModel", "load_qa_model"]

VIDEO_QA = {"video_qa": "a question answering model"}
HEADS: dict[str, type[QAHead]] = {"classifier": ClassifierHead, "decoder": DecoderHead, "llm": LLMHead}


def load_qa_model(directory: str | Path) -> VideoQAModel:
    """Reads what `VideoQAModel.save_pretrained` wrote.

    Raises:
        ValueError: a folder without the files, one of another kind of model, or weights that do not fit.
    """
    config, state = load_model(directory, VIDEO_QA)
    directory = Path(directory)
    file = directory / CONFIG_FILE
    saved = read(_Saved, config, str(file))
    head_class = HEADS[saved.head]

    def make() -> VideoQAModel:
        frontend = VisualFrontend.from_config(config["frontend"], f"{file}, 'frontend'")
        return VideoQAModel(
            frontend, head_class.load(config["head_config"], directory, frontend.shape), config["input"]
        )

    def complete(model: VideoQAModel) -> dict[str, Any]:
        of_head = model.head.complete_state(part_of(state, "head."))
        return state | {f"head.{key}": value for key, value in of_head.items()}

    if head_class.is_whole(saved.head_config):
        drawn = sketch(make, directory)
        require_fit(drawn, complete(drawn), directory)
    model = make()
    weights = complete(model)
    require_fit(model, weights, directory)
    model.load_state_dict(weights)
    return model


@dataclass(frozen=True)
class _Saved:
    """config.json."""

    kind: Literal["video_qa"]
    frontend: Mapping[str, Any]
    head: str
    head_config: Mapping[str, Any]
    input: Inputs

    def __post_init__(self) -> None:
        if self.head not in HEADS:
            raise ValueError(f"'head': expected one of {', '.join(HEADS)}; got {self.head!r}")
