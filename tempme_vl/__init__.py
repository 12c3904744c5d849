"""tempme_vl: a video as very few visual tokens (TempMe, ICLR 2025), for retrieval, QA and video-language models."""

from tempme_vl.frontend import VisualFrontend, create_frontend, make_schedule
from tempme_vl.merging import MergeSchedule
from tempme_vl.state import FrontendOutput, TokenState

__all__ = ["FrontendOutput", "MergeSchedule", "TokenState", "VisualFrontend", "create_frontend", "make_schedule"]
