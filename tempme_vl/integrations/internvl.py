"""InternVL: frames go the way of images, one tile each, through a ViT, pixel shuffle and a projector; the prompt names
them "Frame1", "Frame2" and so on, and here the clips."""

from __future__ import annotations

from collections.abc import Sequence

from tempme_vl.compressors import FrameFeatures
from tempme_vl.integrations.base import SampledVideo, VisualTokens, pooled
from tempme_vl.integrations.post_encoder import PostEncoderHost


class InternVLHost(PostEncoderHost):
    modality = "image"

    def grid(self, height: int, width: int) -> tuple[int, int]:
        vision, ratio = self.model.config.vision_config, self.model.config.downsample_ratio
        rows, columns = (int(s // p * ratio) for s, p in zip(vision.image_size, vision.patch_size, strict=True))
        return rows, columns

    def attended(self, grid: tuple[int, int]) -> tuple[int, float]:
        patches = round(grid[0] * grid[1] / self.model.config.downsample_ratio**2) + 1
        return patches, patches

    def features(self, videos: Sequence[SampledVideo]) -> list[FrameFeatures]:
        pixels = self.pixels(videos).flatten(0, 1)
        return self.frames_of(pooled(self.model.model.get_image_features(pixel_values=pixels)), videos)

    def written(self, tokens: VisualTokens) -> str:
        processor = self.processor
        start, image, end = processor.start_image_token, processor.image_token, processor.end_image_token
        return "\n".join(
            f"Frame{clip}: {start}{image * count}{end}" for clip, count in enumerate(tokens.extra["clip_tokens"], 1)
        )
