"""Video question answering: one model, and heads by name. A new one is a file with a `QAHead` and a line in `HEADS`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from tempme_vl.frontend import VisualFrontend
from tempme_vl.hub import find_folder
from tempme_vl.pretrained import CONFIG_FILE, load_model, require_fit, sketch
from tempme_vl.schema import ConfigError
from tempme_vl.tasks.qa.base import QAConfig, QAHead, VideoQAModel
from tempme_vl.tasks.qa.classifier import ClassifierHead
from tempme_vl.tasks.qa.decoder import DecoderHead
from tempme_vl.tasks.qa.llm import LLMHead
from tempme_vl.weights.exports import part_of

__all__ = ["HEADS", "ClassifierHead", "DecoderHead", "LLMHead", "QAHead", "VideoQAModel", "load_qa_model"]

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from tempme_vl.hub import HubOptions

HEADS: dict[str, type[QAHead]] = {"classifier": ClassifierHead, "decoder": DecoderHead, "llm": LLMHead}


def load_qa_model(source: str | Path, **hub: Unpack[HubOptions]) -> VideoQAModel:
    """Reads what `VideoQAModel.save_pretrained` wrote.

    Args:
        source, hub: a folder, or a name on the Hugging Face hub with its options (`VisualFrontend.from_pretrained`).

    Raises:
        ValueError: a folder without the files, one of another kind of model, or weights that do not fit; or see
            `tempme_vl.hub.find_folder`.
    """
    directory = find_folder(source, **hub)
    saved, state = load_model(directory, QAConfig)
    file = directory / CONFIG_FILE
    if saved.head not in HEADS:
        raise ConfigError(f"{file}, 'head': expected one of {', '.join(HEADS)}; got {saved.head!r}")
    head_class = HEADS[saved.head]

    def make() -> VideoQAModel:
        frontend = VisualFrontend.from_config(saved.frontend, f"{file}, 'frontend'")
        return VideoQAModel(frontend, head_class.load(saved.head_config, directory, frontend.shape), saved.input)

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
