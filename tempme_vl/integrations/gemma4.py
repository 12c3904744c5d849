"""Gemma 4: frames padded to one number of patches, mean pooling, and a time in front of each frame, here of each clip.
Larger ones attend in both directions inside a frame, here inside a clip; smaller ones have an embedding of each token's
number in every layer, so that features go in beside the numbers and in no other way."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import prod
from typing import ClassVar

import torch
from torch import Tensor
from transformers.modeling_outputs import BaseModelOutputWithPooling

from tempme_vl.compressors import FrameFeatures
from tempme_vl.compressors.base import Grid
from tempme_vl.integrations.base import Feed, SampledVideo, VisualTokens, listed, pooled
from tempme_vl.integrations.devices import as_input
from tempme_vl.integrations.post_encoder import PostEncoderHost


class Gemma4Host(PostEncoderHost):
    uses_time = True
    projector: ClassVar[tuple[str, ...]] = ("embed_vision",)
    feeds: ClassVar[tuple[Feed, ...]] = ("encoder_outputs",)

    @staticmethod
    def _positions(values: Mapping[str, Tensor]) -> Tensor:
        """(T, P, 2) of the frames of all videos; transformers 5.18 has an axis of videos in front."""
        return values["video_position_ids"].flatten(0, -3)

    @property
    def _pooling(self) -> int:
        """Patches of a token's side."""
        return self.model.config.vision_config.pooling_kernel_size

    def _grid(self, positions: Tensor) -> Grid:
        """Of the tokens of a frame whose patches lie at (P, 2) columns and rows, or -1 where they are padding."""
        columns, rows = ((positions.amax(0) + 1) // self._pooling).tolist()
        return rows, columns

    def grid(self, height: int, width: int) -> tuple[int, int]:
        values = self.preprocess([torch.zeros(1, 3, height, width, dtype=torch.uint8)])
        return self._grid(self._positions(values)[0])

    def attended(self, grid: tuple[int, int]) -> tuple[int, float]:
        patches = self.processor.video_processor.max_soft_tokens * self._pooling**2  # with padding
        return patches, patches

    def features(self, videos: Sequence[SampledVideo]) -> list[FrameFeatures]:
        values = self.preprocess([video.frames for video in videos])
        names = ("pixel_values_videos", "video_position_ids", "num_frames_per_video")  # the last: not in 5.18
        given = {name: as_input(values[name], self.tower) for name in names if name in values}
        output = pooled(self.model.model.get_video_features(**given))
        first = self._positions(values).unflatten(0, (len(videos), -1))[:, 0]
        return [
            FrameFeatures(x.unflatten(0, (-1, prod(self._grid(positions)))), self._grid(positions))
            for x, positions in zip(output, first, strict=True)
        ]

    def written(self, tokens: VisualTokens) -> str:
        start, end = self.processor.boi_token, self.processor.eoi_token
        clips = zip(tokens.extra["seconds"], tokens.extra["clip_tokens"], strict=True)
        return " ".join(
            f"{int(second // 60):02d}:{int(second % 60):02d} {start}{self.placeholder * count}{end}"
            for second, count in clips
        )

    def encoder_output(self, tokens: Sequence[VisualTokens]) -> BaseModelOutputWithPooling:
        return listed(tokens)

    def extra_inputs(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        tokens: Sequence[Sequence[VisualTokens]],
        images: Sequence[Sequence[VisualTokens]],
    ) -> dict[str, Tensor]:
        """What of the prompt is an image (1) or a video (2): for the mask."""
        return {"mm_token_type_ids": (input_ids == self.image_token_id) + 2 * (input_ids == self.token_id)}
