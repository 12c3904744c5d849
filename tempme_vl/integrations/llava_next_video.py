"""LLaVA-NeXT-Video: CLIP ViT, hidden state -2 without the CLS tokens, pooling on the grid, a token-wise projector."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from torch import Tensor
from transformers.modeling_outputs import BaseModelOutputWithPooling

from tempme_vl.integrations.base import Request, VisualTokens, listed
from tempme_vl.integrations.in_encoder import InEncoderHost, grid_side, per_frame
from tempme_vl.merging import MergeSchedule


class LlavaNextVideoHost(InEncoderHost):
    """Raises:
    ValueError: merging in front of a pooling with weights of its own, which cannot be left out.
    """

    projector = ("multi_modal_projector", "image_newline")

    def __init__(self, model: Any, processor: Any, schedule: MergeSchedule, behind: Request | None = None):
        super().__init__(model, processor, schedule, behind)
        if self.merges and any(True for _ in self.pool_weights()):
            raise ValueError(
                f"this model pools by spatial_pool_mode={model.config.spatial_pool_mode!r}, which has weights of its "
                "own and needs a grid; merging works with 'average' and 'max'"
            )

    def project(self, tokens: Tensor) -> Tensor:
        return self.model.model.multi_modal_projector(self.without_prefix(tokens))

    def pool_weights(self) -> Iterator[Tensor]:
        return self.model.model.vision_resampler.parameters()

    def pool_grid(self, patches: Tensor) -> Tensor:
        return self.model.model.vision_resampler(patches)

    def project_grid(self, tokens: Tensor) -> Tensor:
        pooled = per_frame(self.pool_grid, tokens[:, :, self.frontend.shape.num_prefix :])
        return self.model.model.multi_modal_projector(pooled)

    def frame_grid(self) -> tuple[int, int]:
        side = grid_side(self.frontend.shape) // self.model.config.spatial_pool_stride
        return side, side

    def image_output(self, images: Sequence[VisualTokens]) -> BaseModelOutputWithPooling:
        return listed(images)
