"""SmolVLM: frames go the way of images through a SigLIP and a pixel-shuffle connector; the prompt says how many there
are and when, and here how many clips."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from datetime import timedelta
from typing import Any

import torch
from torch import nn

from tempme_vl.compressors import FrameFeatures, KeptFeatures
from tempme_vl.compressors.base import Grid
from tempme_vl.integrations.base import SampledVideo, VisualTokens, pooled
from tempme_vl.integrations.devices import as_input
from tempme_vl.integrations.post_encoder import PostEncoderHost


class SmolVLMHost(PostEncoderHost):
    modality = "image"
    uses_time = True
    projector = ("connector",)

    @staticmethod
    def tower_of(model: Any) -> nn.Module:
        return model.model.vision_model

    @property
    def language_model(self) -> nn.Module:
        return self.model.model.text_model

    def check_images(self, videos: int) -> None:
        super().check_images(videos)
        if videos:
            raise ValueError(
                "SmolVLM takes images or videos in a prompt, and not both: its processor gives either as pixel_values, "
                "and one of them is lost. Give an image as a video of one frame"
            )

    def grid(self, height: int, width: int) -> tuple[int, int]:
        # frames are resized to a square, and need not be as large as the tower's own
        side = self.processor.video_processor.max_image_size["longest_edge"]
        side = side // self.model.config.vision_config.patch_size // self.model.config.scale_factor
        return side, side

    def attended(self, grid: tuple[int, int]) -> tuple[int, float]:
        patches = grid[0] * grid[1] * self.model.config.scale_factor**2
        return patches, patches

    def features(self, videos: Sequence[SampledVideo]) -> list[FrameFeatures]:
        values = self.preprocess([video.frames for video in videos])
        names = [name for name in ("pixel_values", "pixel_attention_mask") if values.get(name) is not None]
        given = {name: as_input(values[name], self.tower) for name in names}
        output = pooled(self.model.model.get_image_features(**given))
        x = torch.cat(list(output)).reshape(-1, output[0].shape[-1])
        rows, columns = self.grid(*videos[0].frames.shape[1:3])
        expected = sum(len(video.frames) for video in videos) * rows * columns
        if len(x) != expected:
            raise ValueError(
                f"expected {expected} features of {len(videos)} videos, got {len(x)}: SmolVLM leaves frames out whose "
                "pixels are all 0 after its preprocessing"
            )
        return self.frames_of(x.unflatten(0, (-1, rows * columns)), videos)

    def visual_tokens(self, video: SampledVideo, slots: int, grid: Grid, left: KeptFeatures) -> VisualTokens:
        tokens = super().visual_tokens(video, slots, grid, left)
        return VisualTokens(tokens.features, {**tokens.extra, "duration": video.duration})

    def written(self, tokens: VisualTokens) -> str:
        processor, seconds = self.processor, tokens.extra["seconds"]
        words: Any = inspect.getmodule(type(processor))  # the host's own, which differ little between versions
        around, whole = processor.fake_image_token, processor.global_image_token
        images = [f"{around}{whole}{processor.image_token * n}{around}" for n in tokens.extra["clip_tokens"]]
        duration = str(timedelta(seconds=int(tokens.extra["duration"])))
        intro = words.DEFAULT_VIDEO_INTRO.format(frame_count=words.num2words(len(seconds)), video_duration=duration)
        stamps = [f"{int(second // 60):02d}:{int(second % 60):02d}" for second in seconds]
        told = [words.FRAME_TIMESTAMP_MESSAGE.format(timestamp=stamp) for stamp in stamps]
        frames = [time + image for time, image in zip(told, images, strict=True)]
        return intro + "".join(frames) + words.DEFAULT_MEDIA_OUTTRO
