"""Video-LLaVA: CLIP or LanguageBind ViT, hidden state -2 with the CLS tokens, a token-wise projector."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from tempme_vl.backbones.base import TowerShape
from tempme_vl.integrations.in_encoder import InEncoderHost


class VideoLlavaHost(InEncoderHost):
    keeps_prefix = True

    @staticmethod
    def tower(model: Any) -> nn.Module:
        return model.model.video_tower

    @property
    def image_tower(self) -> Any:
        return self.model.model.image_tower

    def project(self, tokens: Tensor) -> Tensor:
        return self.model.model.multi_modal_projector(tokens)

    def project_grid(self, tokens: Tensor) -> Tensor:
        return self.project(tokens.flatten(1, 2))

    @staticmethod
    def native_tokens(model: Any, shape: TowerShape, num_frames: int) -> int:
        return num_frames * shape.tokens
