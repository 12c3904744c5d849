"""tempme_vl: a video as very few visual tokens (TempMe, ICLR 2025), for retrieval, QA and video-language models.

The names below are imported on first use (PEP 562): what needs no model, such as reading annotations and scoring
predictions, runs without loading torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.2.0"

if TYPE_CHECKING:
    from tempme_vl.frontend import VisualFrontend, create_frontend
    from tempme_vl.integrations import compress, load_compressed
    from tempme_vl.merging import MergeSchedule, make_schedule
    from tempme_vl.pipeline import VideoQA, VideoRetrieval, read_video
    from tempme_vl.registries import COMPRESSORS, DATASETS, FAMILIES, HEADS, HOSTS, METHODS, TUNINGS
    from tempme_vl.state import FrontendOutput, TokenState
    from tempme_vl.tasks.qa import create_qa_model, load_qa_model
    from tempme_vl.tasks.retrieval import create_retrieval_model, load_retrieval_model
    from tempme_vl.tasks.videollm import create_video_llm, load_video_llm

__all__ = [
    "COMPRESSORS",
    "DATASETS",
    "FAMILIES",
    "HEADS",
    "HOSTS",
    "METHODS",
    "TUNINGS",
    "FrontendOutput",
    "MergeSchedule",
    "TokenState",
    "VideoQA",
    "VideoRetrieval",
    "VisualFrontend",
    "compress",
    "create_frontend",
    "create_qa_model",
    "create_retrieval_model",
    "create_video_llm",
    "load_compressed",
    "load_qa_model",
    "load_retrieval_model",
    "load_video_llm",
    "make_schedule",
    "read_video",
]

_HOMES = {
    "tempme_vl.frontend": ("VisualFrontend", "create_frontend"),
    "tempme_vl.integrations": ("compress", "load_compressed"),
    "tempme_vl.merging": ("MergeSchedule", "make_schedule"),
    "tempme_vl.pipeline": ("VideoQA", "VideoRetrieval", "read_video"),
    "tempme_vl.registries": ("COMPRESSORS", "DATASETS", "FAMILIES", "HEADS", "HOSTS", "METHODS", "TUNINGS"),
    "tempme_vl.state": ("FrontendOutput", "TokenState"),
    "tempme_vl.tasks.qa": ("create_qa_model", "load_qa_model"),
    "tempme_vl.tasks.retrieval": ("create_retrieval_model", "load_retrieval_model"),
    "tempme_vl.tasks.videollm": ("create_video_llm", "load_video_llm"),
}


def __getattr__(name: str) -> Any:
    for home, names in _HOMES.items():
        if name in names:
            return getattr(import_module(home), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
