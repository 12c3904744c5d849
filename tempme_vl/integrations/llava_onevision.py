"""LLaVA-OneVision: SigLIP's last hidden state before its norm, a token-wise projector, bilinear pooling to a quarter of
the tokens, and one learnt token behind each video."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor
from transformers.modeling_outputs import BaseModelOutputWithPooling

from tempme_vl.integrations.base import VisualTokens, listed
from tempme_vl.integrations.devices import own_weights
from tempme_vl.integrations.in_encoder import InEncoderHost, append, grid_side, per_frame


class LlavaOnevisionHost(InEncoderHost):
    added_tokens = 1
    projector = ("multi_modal_projector", "image_newline")

    def project(self, tokens: Tensor) -> Tensor:
        return self._with_newline(self.model.model.multi_modal_projector(self.without_prefix(tokens)))

    def pool_grid(self, patches: Tensor) -> Tensor:
        return self.model.model.apply_pooling(patches)

    def project_grid(self, tokens: Tensor) -> Tensor:
        inner = self.model.model
        patches = tokens[:, :, self.frontend.shape.num_prefix :]
        pooled = per_frame(lambda frames: self.pool_grid(inner.multi_modal_projector(frames)), patches)
        return self._with_newline(pooled)

    def _with_newline(self, features: Tensor) -> Tensor:
        with own_weights(self.model.model):
            return append(features, self.model.model.image_newline)

    def frame_grid(self) -> tuple[int, int]:
        side = (grid_side(self.frontend.shape) + 1) // 2
        return side, side

    def image_output(self, images: Sequence[VisualTokens]) -> BaseModelOutputWithPooling:
        return listed(images)
