"""Qwen2.5-Omni's thinker, `model.thinker` of the whole model, on what videos show and not on what they sound like: as
Qwen2.5-VL, with its processor's own limits of pixels and positions a second."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from torch import Tensor
from transformers import BatchFeature

from tempme_vl.compressors import KeptFeatures
from tempme_vl.compressors.base import Grid
from tempme_vl.integrations.base import Request, SampledVideo, VisualTokens
from tempme_vl.integrations.qwen2_5_vl import Qwen2_5_VLHost
from tempme_vl.integrations.videos import assumed


class Qwen2_5OmniThinkerHost(Qwen2_5_VLHost):
    """Raises:
    ValueError: a transformers whose thinker has other parts, or what Qwen2.5-VL's refuses.
    """

    assumed_fps = 2.0  # of the frames that the processor gets
    oldest = "5.24.0"

    def __init__(self, model: Any, processor: Any, request: Request):
        if not hasattr(model.model, "visual"):
            raise ValueError(
                f"the parts of {type(model).__name__} lie elsewhere in this transformers: update transformers to "
                f"compress it ({self.oldest} is new enough)"
            )
        super().__init__(model, processor, request)

    @property
    def positions_a_second(self) -> float:
        return self.model.config.position_id_per_seconds

    @property
    def pixel_limits(self) -> Mapping[str, int]:
        return self.processor.videos_kwargs["size"]

    def preprocess(self, videos: Sequence[np.ndarray | Tensor], **options: Any) -> BatchFeature:
        return super().preprocess(videos, **{"size": self.pixel_limits, **options})

    def visual_tokens(self, video: SampledVideo, slots: int, grid: Grid, left: KeptFeatures) -> VisualTokens:
        return super().visual_tokens(assumed(video, self.assumed_fps), slots, grid, left)
