"""PerceptionLM: a timm ViT, its normed tokens without CLS, a projector, adaptive pooling on the grid.

A plain ViT merges inside. The published models have Perception Encoder as their tower, which rotates queries and keys
by position, so that nothing can merge inside it: there the tokens merge behind projector and pooling.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from tempme_vl.compressors import FrameFeatures
from tempme_vl.integrations.base import Host, Request, SampledVideo, pooled
from tempme_vl.integrations.in_encoder import InEncoderHost, grid_side, per_frame
from tempme_vl.integrations.post_encoder import PostEncoderHost
from tempme_vl.merging import MergeSchedule


class PerceptionLMHost(InEncoderHost):
    """With a plain ViT; `create` and `restore` give a `RotaryPerceptionLMHost` for a tower that rotates.

    Raises:
        ValueError: a tower with registers, or with a CLS token that the host keeps.
    """

    def __init__(self, model: Any, processor: Any, schedule: MergeSchedule, behind: Request | None = None):
        super().__init__(model, processor, schedule, behind)
        if self.frontend.shape.num_prefix != int(model.config.vision_use_cls_token):
            raise ValueError(
                f"vision_use_cls_token={model.config.vision_use_cls_token} does not fit a tower with "
                f"{self.frontend.shape.num_prefix} CLS tokens and registers"
            )

    @classmethod
    def create(cls, model: Any, processor: Any, request: Request) -> Host:
        if rotates(model):
            return RotaryPerceptionLMHost.create(model, processor, request)
        return super().create(model, processor, request)

    @classmethod
    def restore(cls, model: Any, processor: Any, config: Mapping[str, Any]) -> Host:
        if rotates(model):
            return RotaryPerceptionLMHost.restore(model, processor, config)
        return super().restore(model, processor, config)

    @staticmethod
    def layer(model: Any) -> int:
        return -1

    def project(self, tokens: Tensor) -> Tensor:
        projector = self.model.model.multi_modal_projector
        tokens = self.without_prefix(self.frontend.norm(tokens))
        return projector.linear_2(projector.gelu(projector.linear_1(tokens)))

    def pool_grid(self, patches: Tensor) -> Tensor:
        return self.model.model.multi_modal_projector.pooling(patches)

    def project_grid(self, tokens: Tensor) -> Tensor:
        patches = self.frontend.norm(tokens)[:, :, self.frontend.shape.num_prefix :]
        return per_frame(self.model.model.multi_modal_projector, patches)

    def frame_grid(self) -> tuple[int, int]:
        side = grid_side(self.frontend.shape) // self.model.config.projector_pooling_ratio
        return side, side


class RotaryPerceptionLMHost(PostEncoderHost):
    """With Perception Encoder, whose grid the projector pools."""

    def grid(self, height: int, width: int) -> tuple[int, int]:
        rows, columns = self.tower.timm_model.patch_embed.grid_size
        ratio = self.model.config.projector_pooling_ratio
        return rows // ratio, columns // ratio

    def attended(self, grid: tuple[int, int]) -> tuple[int, float]:
        rows, columns = self.tower.timm_model.patch_embed.grid_size
        tokens = rows * columns + self.tower.timm_model.num_prefix_tokens
        return tokens, tokens

    @property
    def tower_width(self) -> int:
        return self.tower.timm_model.embed_dim

    def features(self, videos: Sequence[SampledVideo]) -> list[FrameFeatures]:
        return self.frames_of(pooled(self.model.model.get_image_features(pixel_values=self.pixels(videos))), videos)


def rotates(model: Any) -> bool:
    """Whether the tower rotates queries and keys by position."""
    return getattr(getattr(model.model.vision_tower, "timm_model", None), "rope", None) is not None
