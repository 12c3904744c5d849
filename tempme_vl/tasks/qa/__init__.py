"""Video question answering: one model, and heads by name. A new one is a file with a `QAHead`, and a line in
`tempme_vl.registries`; see docs/add_a_head.md.

The names below are imported on first use: the heads' options are read from command lines without loading torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tempme_vl.registries import HEADS
    from tempme_vl.tasks.qa.base import HeadContext, QAHead, chosen
    from tempme_vl.tasks.qa.classifier import ClassifierHead
    from tempme_vl.tasks.qa.create import create_qa_model
    from tempme_vl.tasks.qa.decoder import DecoderHead
    from tempme_vl.tasks.qa.llm import LLMHead
    from tempme_vl.tasks.qa.model import VideoQAModel, load_qa_model

_HOMES = {
    "HEADS": "registries",
    "HeadContext": "tasks.qa.base",
    "QAHead": "tasks.qa.base",
    "chosen": "tasks.qa.base",
    "ClassifierHead": "tasks.qa.classifier",
    "create_qa_model": "tasks.qa.create",
    "DecoderHead": "tasks.qa.decoder",
    "LLMHead": "tasks.qa.llm",
    "VideoQAModel": "tasks.qa.model",
    "load_qa_model": "tasks.qa.model",
}
__all__ = [
    "HEADS",
    "ClassifierHead",
    "DecoderHead",
    "HeadContext",
    "LLMHead",
    "QAHead",
    "VideoQAModel",
    "chosen",
    "create_qa_model",
    "load_qa_model",
]


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(import_module(f"tempme_vl.{_HOMES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
