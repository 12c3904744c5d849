"""GLM-4.1V, GLM-4.5V and GLM-4.6V: as Qwen3-VL without features for deeper layers, in other words, and with one token
for images and videos, which the model therefore gets as images all."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

from tempme_vl.compressors import Clip
from tempme_vl.integrations.base import SampledVideo, VisualTokens
from tempme_vl.integrations.post_encoder import clip_means
from tempme_vl.integrations.qwen import QwenClipsHost


class Glm4vHost(QwenClipsHost):
    modality = "image"
    projector: ClassVar[tuple[str, ...]] = ("downsample", "merger")

    def check_images(self, videos: int) -> None:
        super().check_images(videos)
        if videos:
            raise ValueError(
                f"{type(self.model).__name__} takes images or videos in a prompt, and not both: they have one token, "
                "and its own forward counts all of these for either. Give an image as a video of two equal frames"
            )

    def clip_seconds(self, video: SampledVideo, slots: int, clips: Sequence[Clip]) -> list[float]:
        return clip_means(video.seconds[:: self.slot_frames], clips)  # of a temporal patch its first frame's time

    def written(self, tokens: VisualTokens) -> str:
        image = self.processor.image_token
        return "".join(
            self.processor.replace_frame_token_id(second).replace(image, image * len(kept))
            for second, (_, kept) in zip(tokens.extra["seconds"], tokens.extra["runs"], strict=True)
        )
