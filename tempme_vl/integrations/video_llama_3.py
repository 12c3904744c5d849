"""VideoLLaMA 3: a tower with rotary positions on frames of any shape, bilinear pooling, and a time in front of each
frame, here of each clip. Its preprocessing drops tokens that change little from frame to frame, which is turned off: a
compressor does that here (`evs` is close to it)."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import Any, ClassVar

import numpy as np
from torch import Tensor, nn
from transformers import BatchFeature
from transformers.modeling_outputs import BaseModelOutputWithPooling

from tempme_vl.compressors import FrameFeatures, KeptFeatures
from tempme_vl.compressors.base import Grid
from tempme_vl.integrations.base import SampledVideo, VisualTokens, listed, pooled
from tempme_vl.integrations.devices import as_input
from tempme_vl.integrations.parts import blank, same_size
from tempme_vl.integrations.post_encoder import PostEncoderHost
from tempme_vl.integrations.videos import assumed


class VideoLlama3Host(PostEncoderHost):
    uses_time = True
    assumed_fps = 1.0
    projector: ClassVar[tuple[str, ...]] = ("projector",)

    @staticmethod
    def tower_of(model: Any) -> nn.Module:
        return model.model.vision_model

    def preprocess(self, videos: Sequence[np.ndarray | Tensor], **options: Any) -> BatchFeature:
        return super().preprocess(videos, use_token_compression=False, **options)

    def grid(self, height: int, width: int) -> tuple[int, int]:
        values = self.preprocess([blank(self.num_frames, height, width)])
        _, rows, columns = (values["video_grid_thw"][0] // values["video_merge_sizes"][0]).tolist()
        return rows, columns

    def attended(self, grid: tuple[int, int]) -> tuple[int, float]:
        patches = grid[0] * grid[1] * self.processor.video_processor.merge_size**2
        return patches, patches

    def features(self, videos: Sequence[SampledVideo]) -> list[FrameFeatures]:
        size = same_size(self.preprocess, videos[0], self.processor.video_processor.size)
        values = self.preprocess([video.frames for video in videos], **size)
        names = ("pixel_values_videos", "video_grid_thw", "video_merge_sizes")
        given = {name: as_input(values[name], self.tower) for name in names}
        output = pooled(self.model.model.get_video_features(**given))
        grids = [self.grid(*video.frames.shape[1:3]) for video in videos]
        return [FrameFeatures(x.unflatten(0, (-1, prod(grid))), grid) for x, grid in zip(output, grids, strict=True)]

    def visual_tokens(self, video: SampledVideo, slots: int, grid: Grid, left: KeptFeatures) -> VisualTokens:
        return super().visual_tokens(assumed(video, self.assumed_fps), slots, grid, left)

    def written(self, tokens: VisualTokens) -> str:
        clips = zip(tokens.extra["seconds"], tokens.extra["clip_tokens"], strict=True)
        return ",".join(f"Time {second:.1f}s:{self.placeholder * count}" for second, count in clips)

    def encoder_output(self, tokens: Sequence[VisualTokens]) -> BaseModelOutputWithPooling:
        return listed(tokens)
