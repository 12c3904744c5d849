"""Hosts whose tower is a plain ViT: tokens merge inside it, and what comes out goes through the host's projector.

What the host does between tower and language model on a grid (pooling) is left out as soon as anything merges, because
there is no grid any more; with nothing merged it stays, and the host's own result comes out.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from tempme_vl.backbones import hf
from tempme_vl.backbones.base import TowerShape
from tempme_vl.frontend import VisualFrontend, make_schedule, tower_gflops
from tempme_vl.integrations.base import Costs, Host, SampledVideo, VisualTokens
from tempme_vl.merging import MergeSchedule


class InEncoderHost(Host):
    """A host around `VisualFrontend`, which is made of the very modules of the tower and is no child of the model.

    A subclass says `tower`, `project`, `project_grid` and `native_tokens`, and `layer` if no configuration tells it.
    """

    keeps_prefix = False  # whether the language model gets the CLS tokens
    added_tokens = 0  # tokens that `project` adds to a video's
    pixel_name = "pixel_values_videos"  # what the host's preprocessing calls them

    def __init__(self, model: Any, processor: Any, schedule: MergeSchedule):
        super().__init__(model, processor, schedule.frames)
        backbone, config = hf.backbone_of(self.tower(model), self.layer(model))
        self.frontend = VisualFrontend(backbone, schedule, config)
        self.merges = any(plan.join is not None or plan.before or plan.after for plan in schedule.plan)
        blocks = cast(list[Any], list(self.frontend.blocks))
        self.merging = nn.ModuleDict(
            {layer: blocks[int(layer)].before_attention.clip_position for layer in self.frontend.clip_positions}
        )

    # ---- facts of a host

    @staticmethod
    def tower(model: Any) -> nn.Module:
        """The vision tower."""
        raise NotImplementedError

    @staticmethod
    def layer(model: Any) -> int:
        """The hidden state that the host takes, as in `hidden_states`."""
        layer = model.config.vision_feature_layer
        if not isinstance(layer, int):
            raise ValueError(
                f"this model joins the hidden states {list(layer)}; tokens that merge on the way have no counterpart "
                "in an earlier one: only a model with one vision_feature_layer can be compressed inside its tower"
            )
        return layer

    def project(self, tokens: Tensor) -> Tensor:
        """(V, M, D) the tower's tokens, CLS included -> (V, M', D_llm), token by token."""
        raise NotImplementedError

    def project_grid(self, tokens: Tensor) -> Tensor:
        """(V, F, N, D) all tokens of all frames -> (V, M', D_llm), as the host itself does it, pooling included."""
        raise NotImplementedError

    @staticmethod
    def native_tokens(model: Any, shape: TowerShape, num_frames: int) -> int:
        """Tokens that the host's own way gives the language model for one video."""
        raise NotImplementedError

    def tokens(self) -> int:
        """M', tokens that ours gives."""
        if not self.merges:
            return self.native_tokens(self.model, self.frontend.shape, self.num_frames)
        last = self.frontend.schedule.layer_counts[-1]
        return last.clips * (last.mlp - (0 if self.keeps_prefix else last.prefix)) + self.added_tokens

    # ---- the protocol

    @classmethod
    def create(cls, model: Any, processor: Any, method: str, num_frames: int, options: Mapping[str, Any]) -> Host:
        backbone, _ = hf.backbone_of(cls.tower(model), cls.layer(model))
        shape, layers = backbone.shape, len(backbone.blocks)
        return cls(
            model, processor, make_schedule(method, layers, num_frames, shape.tokens, shape.num_prefix, **options)
        )

    @classmethod
    def restore(cls, model: Any, processor: Any, config: Mapping[str, Any]) -> Host:
        return cls(model, processor, MergeSchedule.from_dict(config["schedule"]))

    def config(self) -> dict[str, Any]:
        schedule = self.frontend.schedule
        return {"method": schedule.method, "schedule": schedule.to_dict()}

    def pixels(self, videos: Sequence[SampledVideo]) -> Tensor:
        """(V, F, 3, H, W), by the host's own preprocessing, where the tower is and as precise."""
        values = self.processor.video_processor(
            videos=[video.frames for video in videos], do_sample_frames=False, return_tensors="pt"
        )
        weight = next(self.tower(self.model).parameters())
        self.merging.to(weight.device)  # the model may have moved since
        return values[self.pixel_name].to(weight.device, weight.dtype)

    def encode(self, videos: Sequence[SampledVideo], prompts: Sequence[str]) -> list[VisualTokens]:
        tokens = self.frontend(self.pixels(videos)).tokens
        features = (
            self.project(tokens) if self.merges else self.project_grid(tokens.unflatten(1, (self.num_frames, -1)))
        )
        return [VisualTokens(row) for row in features]

    def costs(self) -> Costs:
        whole, _ = hf.backbone_of(self.tower(self.model), -1)  # the host runs all blocks, whatever it takes
        shape = whole.shape
        identity = MergeSchedule.identity(len(whole.blocks), self.num_frames, shape.tokens, shape.num_prefix)
        return Costs(
            self.native_tokens(self.model, shape, self.num_frames),
            self.tokens(),
            2 * tower_gflops(identity, shape),
            2 * self.frontend.gflops(),
        )

    # ---- for subclasses

    def without_prefix(self, tokens: Tensor) -> Tensor:
        """Leaves the CLS tokens of every clip out of (V, M, D) merged tokens."""
        return self.frontend.patches(tokens)


def grid_side(shape: TowerShape) -> int:
    """Patches along a side of a frame."""
    return shape.image_size // shape.patch_size


def per_frame(function: Any, tokens: Tensor) -> Tensor:
    """Applies what takes (R, N, D) to (V, F, N, D), and puts a video's frames one behind the other again."""
    return function(tokens.flatten(0, 1)).unflatten(0, tokens.shape[:2]).flatten(1, 2)


def append(features: Tensor, token: Tensor) -> Tensor:
    """(V, M, D) and one token (D) behind each video -> (V, M + 1, D)."""
    return torch.cat([features, token.to(features).expand(len(features), 1, -1)], dim=1)
