"""Qwen2.5-VL: windows and rotary positions in the tower, a 2x2 merger, and positions of time, row and column (M-RoPE)
in the language model, which are given for the kept tokens; the model's own memory of positions stays untouched."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers.modeling_outputs import BaseModelOutputWithPooling

from tempme_vl.integrations.base import SampledVideo, VisualTokens
from tempme_vl.integrations.post_encoder import FPS, ClipFeatures, FrameFeatures, PostEncoderHost, pooled


class Qwen2_5_VLHost(PostEncoderHost):
    """Raises:
    ValueError: a transformers that cannot generate from positions of three axes.
    """

    oldest: ClassVar[str] = "5.14.1"  # of transformers, among those that were tried

    def __init__(self, model: Any, processor: Any, method: str, num_frames: int, options: Mapping[str, Any]):
        self.slot_frames = processor.video_processor.temporal_patch_size
        super().__init__(model, processor, method, num_frames, options)
        if not hasattr(model, "_prepare_position_ids_for_generation"):
            raise ValueError(
                "generate() of this transformers loses the positions of time, row and column that kept tokens need; "
                f"update transformers to compress {type(model).__name__} ({self.oldest} is new enough)"
            )

    @property
    def tower(self) -> nn.Module:
        return self.model.model.visual

    @property
    def _side(self) -> int:
        """Patches of a token's side."""
        return self.model.config.vision_config.spatial_merge_size

    def _preprocess(self, videos: Sequence[Any]) -> Any:
        return self.processor.video_processor(videos=list(videos), do_sample_frames=False, return_tensors="pt")

    def grid(self, height: int, width: int) -> tuple[int, int]:
        blank = torch.zeros(self.num_frames, 3, height, width, dtype=torch.uint8)
        _, rows, columns = self._preprocess([blank])["video_grid_thw"][0].tolist()
        return rows // self._side, columns // self._side

    def attended(self, grid: tuple[int, int]) -> tuple[int, float]:
        vision = self.model.config.vision_config
        patches = grid[0] * grid[1] * self._side**2
        window = min(patches, (vision.window_size // vision.patch_size) ** 2)
        full = len(vision.fullatt_block_indexes) / vision.depth
        return patches, full * patches + (1 - full) * window

    def features(self, videos: Sequence[SampledVideo]) -> list[FrameFeatures]:
        values = self._preprocess([video.frames for video in videos])
        weight, grids = next(self.tower.parameters()), values["video_grid_thw"]
        pixels = values["pixel_values_videos"].to(weight.device, weight.dtype)
        output = self.model.model.get_video_features(pixels, grids.to(weight.device))
        features = []
        for (slots, rows, columns), levels in zip(grids.tolist(), zip(*self.levels(output), strict=True), strict=True):
            x, *deeper = (level.unflatten(0, (slots, -1)) for level in levels)
            features.append(FrameFeatures(x, (rows // self._side, columns // self._side), tuple(deeper)))
        return features

    @staticmethod
    def levels(output: Any) -> list[Sequence[Tensor]]:
        """Features of each video for the first layer of the language model, and for deeper ones."""
        return [pooled(output)]

    def visual_tokens(self, video: SampledVideo, frames: FrameFeatures, clips: ClipFeatures) -> VisualTokens:
        rows, columns = frames.grid
        span = (video.indices[-1] - video.indices[0]) / max(1, len(video.indices) - 1) or 1.0
        return VisualTokens(
            clips.x.flatten(0, 1),
            {
                # runs of placeholders in the prompt: tokens before merging, and which of them are kept
                "runs": [(frames.x.shape[0] * frames.x.shape[1], clips.source.flatten().tolist())],
                "grid": [len(frames.x), rows * self._side, columns * self._side],
                "slot_seconds": self.slot_frames / ((video.fps or FPS) / span),
            },
        )

    def encoder_output(self, tokens: Sequence[VisualTokens]) -> Any:
        return BaseModelOutputWithPooling(pooler_output=[t.features for t in tokens])  # type: ignore[arg-type]

    def extra_inputs(
        self, input_ids: Tensor, attention_mask: Tensor, tokens: Sequence[Sequence[VisualTokens]]
    ) -> dict[str, Tensor]:
        positions = input_ids.new_zeros(3, *input_ids.shape)
        for row, videos in enumerate(tokens):
            seen = attention_mask[row].bool()
            positions[:, row, seen] = self._positions(input_ids[row, seen].tolist(), videos).to(input_ids.device)
        return {"position_ids": positions}

    def _positions(self, ids: Sequence[int], videos: Sequence[VisualTokens]) -> Tensor:
        """(3, L): the host's own positions for the prompt before merging, of the tokens that are kept."""
        whole: list[int] = []
        kinds: list[int] = []  # 2 for a video's tokens, 0 for words
        kept: list[int] = []
        runs = iter([run for video in videos for run in video.extra["runs"]])
        at = 0
        while at < len(ids):
            if ids[at] == self.token_id:
                if kinds and kinds[-1]:
                    raise ValueError("two videos stand side by side in a prompt; the host needs a token between them")
                full, places = next(runs)
                kept += [len(whole) + place for place in places]
                whole += [self.token_id] * full
                kinds += [2] * full
                at += len(places)
            else:
                kept.append(len(whole))
                whole.append(ids[at])
                kinds.append(0)
                at += 1
        wanted = inspect.signature(self.model.model.get_rope_index).parameters
        inputs = {"mm_token_type_ids": torch.tensor([kinds])} if "mm_token_type_ids" in wanted else {}
        if videos:
            inputs["video_grid_thw"] = torch.tensor([video.extra["grid"] for video in videos])
        if videos and "second_per_grid_ts" in wanted:
            inputs["second_per_grid_ts"] = torch.tensor([video.extra["slot_seconds"] for video in videos])
        positions, _ = self.model.model.get_rope_index(torch.tensor([whole]), **inputs)
        return positions[:, 0, kept]
