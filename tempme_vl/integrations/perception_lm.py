"""PerceptionLM on a plain timm ViT: the tower's normed tokens without CLS, a projector, adaptive pooling on the grid.

The published models have Perception Encoder as their tower, which rotates queries and keys by position; inside such a
tower nothing can merge, and it is refused with that reason.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from tempme_vl.backbones.base import TowerShape
from tempme_vl.integrations.in_encoder import InEncoderHost, grid_side, per_frame
from tempme_vl.merging import MergeSchedule


class PerceptionLMHost(InEncoderHost):
    """Raises:
    ValueError: a tower with registers, or with a CLS token that the host keeps.
    """

    def __init__(self, model: Any, processor: Any, schedule: MergeSchedule):
        super().__init__(model, processor, schedule)
        if self.frontend.shape.num_prefix != int(model.config.vision_use_cls_token):
            raise ValueError(
                f"vision_use_cls_token={model.config.vision_use_cls_token} does not fit a tower with "
                f"{self.frontend.shape.num_prefix} CLS tokens and registers"
            )

    @staticmethod
    def tower(model: Any) -> nn.Module:
        return model.model.vision_tower

    @staticmethod
    def layer(model: Any) -> int:
        return -1

    def project(self, tokens: Tensor) -> Tensor:
        projector = self.model.model.multi_modal_projector
        tokens = self.without_prefix(self.frontend.norm(tokens))
        return projector.linear_2(projector.gelu(projector.linear_1(tokens)))

    def project_grid(self, tokens: Tensor) -> Tensor:
        patches = self.frontend.norm(tokens)[:, :, self.frontend.shape.num_prefix :]
        return per_frame(self.model.model.multi_modal_projector, patches)

    @staticmethod
    def native_tokens(model: Any, shape: TowerShape, num_frames: int) -> int:
        return num_frames * (grid_side(shape) // model.config.projector_pooling_ratio) ** 2
