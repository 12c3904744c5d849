"""Molmo2: a SigLIP tower of two layers, pooling by attention, and a time in front of each frame, here of each clip. Its
language model adds features to what stands in their places, and all visual tokens of a prompt attend to each other, in
both directions. Videos go the way of images, whose token they share."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, ClassVar

import torch
from PIL.Image import Image
from torch import Tensor
from transformers.modeling_outputs import BaseModelOutputWithPooling

from tempme_vl.compressors import FrameFeatures, KeptFeatures
from tempme_vl.compressors.base import Grid
from tempme_vl.integrations.base import Feed, Request, SampledVideo, VisualTokens, listed, pooled
from tempme_vl.integrations.devices import as_input
from tempme_vl.integrations.post_encoder import PostEncoderHost
from tempme_vl.integrations.videos import assumed


class Molmo2Host(PostEncoderHost):
    """Raises:
    ValueError: a processor that ends rows of a frame by tokens, which merging leaves none of.
    """

    modality = "image"
    uses_time = True
    feeds: ClassVar[tuple[Feed, ...]] = ("encoder_outputs",)

    def __init__(self, model: Any, processor: Any, request: Request):
        super().__init__(model, processor, request)
        self.assumed_fps = float(processor.video_processor.max_fps)
        if processor.video_use_col_tokens:
            raise ValueError(
                "expected a Molmo2Processor with video_use_col_tokens=False, as published; with a token behind each "
                "row of a frame there is no place for rows that merge"
            )

    def check_images(self, videos: int) -> None:
        super().check_images(videos)
        if videos:
            raise ValueError(
                f"{type(self.model).__name__} takes images or videos in a prompt, and not both: they have one token, "
                "and its own forward takes pixels of either. Give an image as a video of one frame"
            )

    def grid(self, height: int, width: int) -> tuple[int, int]:
        values = self.preprocess([torch.zeros(1, 3, height, width, dtype=torch.uint8)])
        _, rows, columns = values["video_grids"][0].tolist()
        return rows, columns

    def attended(self, grid: tuple[int, int]) -> tuple[int, float]:
        patches = self.model.config.vision_config.num_position_embeddings
        return patches, patches

    def features(self, videos: Sequence[SampledVideo]) -> list[FrameFeatures]:
        values = self.preprocess([video.frames for video in videos])
        names = ("pixel_values_videos", "video_token_pooling", "video_grids")
        given = {name: as_input(values[name], self.tower) for name in names}
        output = pooled(self.model.model.get_video_features(**given))
        shapes = [(frames, (rows, columns)) for frames, rows, columns in values["video_grids"].tolist()]
        return [
            FrameFeatures(x.unflatten(0, (frames, -1)), grid) for x, (frames, grid) in zip(output, shapes, strict=True)
        ]

    def visual_tokens(self, video: SampledVideo, slots: int, grid: Grid, left: KeptFeatures) -> VisualTokens:
        return super().visual_tokens(assumed(video, self.assumed_fps), slots, grid, left)

    def written(self, tokens: VisualTokens) -> str:
        clips = zip(tokens.extra["seconds"], tokens.extra["clip_tokens"], strict=True)
        return " ".join(self.processor.get_video_string(torch.tensor([1, 1, count]), [time]) for time, count in clips)

    @property
    def _start(self) -> str:
        """What the processor has every prompt start with."""
        tokenizer = self.processor.tokenizer
        return tokenizer.bos_token or tokenizer.eos_token

    def encode_images(self, images: Sequence[Image]) -> list[VisualTokens]:
        first, *others = super().encode_images(images)
        return [
            replace(first, extra={**first.extra, "written": first.extra["written"].removeprefix(self._start)}),
            *others,
        ]

    def input_ids(self, prompt: str, tokens: Sequence[VisualTokens]) -> list[int]:
        return super().input_ids(prompt if prompt.startswith(self._start) else self._start + prompt, tokens)

    def encoder_output(self, tokens: Sequence[VisualTokens]) -> BaseModelOutputWithPooling:
        return listed(tokens)

    def extra_inputs(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        tokens: Sequence[Sequence[VisualTokens]],
        images: Sequence[Sequence[VisualTokens]],
    ) -> dict[str, Tensor]:
        """Which words are visual, marks around frames among them: for the mask."""
        kinds = self.processor.create_mm_token_type_ids(input_ids.tolist())
        return {"mm_token_type_ids": torch.tensor(kinds, device=input_ids.device)}
