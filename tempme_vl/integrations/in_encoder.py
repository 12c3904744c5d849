"""Hosts whose tower is a plain ViT: tokens merge inside it, and what comes out goes through the host's projector.

What the host does between tower and language model on a grid (pooling) is left out as soon as anything merges, because
there is no grid any more; with nothing merged it stays, and the host's own result comes out.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from tempme_vl.backbones import hf
from tempme_vl.backbones.base import TowerShape
from tempme_vl.frontend import VisualFrontend
from tempme_vl.integrations.base import Costs, Host, SampledVideo, VisualTokens, input_device
from tempme_vl.merging import MergeSchedule, learnt_modules, share_learnt
from tempme_vl.scheduling import schedule_for, tower_gflops
from tempme_vl.schema import read


@dataclass(frozen=True)
class _Saved:
    """tempme.json."""

    model: str
    method: str
    schedule: Mapping[str, Any]


class InEncoderHost(Host):
    """A host around `VisualFrontend`, which is made of the very modules of the tower and is no child of the model.

    A subclass says `project`, `project_grid` and `native_tokens`, and `layer` if no configuration tells it.
    """

    keeps_prefix = False  # whether the language model gets the CLS tokens
    added_tokens = 0  # tokens that `project` adds to a video's

    def __init__(self, model: Any, processor: Any, schedule: MergeSchedule):
        super().__init__(model, processor, schedule.method, schedule.frames)
        self.merges = schedule.changes
        self._made_of, self._frontend = self._make_frontend(schedule)
        self.merging = nn.ModuleDict(learnt_modules(self._frontend.blocks))

    # ---- the front end, made anew of the tower's modules where others took their place

    @property
    def frontend(self) -> VisualFrontend:
        """Of the modules that the tower has now: peft's `modules_to_save` puts a copy in the place of a module, and its
        LoRA others in the places of linear layers."""
        if self._made_of != _modules_of(self.tower):
            old = self._frontend
            self._made_of, self._frontend = self._make_frontend(old.schedule)
            self._frontend.set_grad_checkpointing(old.grad_checkpointing)
            share_learnt(self._frontend.blocks, self.merging)
        return self._frontend

    def _make_frontend(self, schedule: MergeSchedule) -> tuple[list[nn.Module], VisualFrontend]:
        tower = self.tower
        backbone, config = hf.backbone_of(tower, self.layer(self.model))
        return _modules_of(tower), VisualFrontend(backbone, schedule, config)

    def set_grad_checkpointing(self, enable: bool) -> None:
        self.frontend.set_grad_checkpointing(enable)

    # ---- the tower

    @property
    def tower(self) -> Any:
        return self.running_tower(self.model)

    @property
    def tower_parts(self) -> list[nn.Module]:
        """Without the head, which pools for other uses."""
        return [self.frontend.embed, self.frontend.blocks, self.frontend.norm]

    @classmethod
    def running_tower(cls, model: Any) -> nn.Module:
        """The vision tower that runs: where peft trains a copy of it, the copy, unless adapters are off."""
        tower = cls.tower_of(model)
        while hasattr(tower, "modules_to_save") and hasattr(tower, "original_module"):
            wrapper: Any = tower
            off = wrapper.disable_adapters or not wrapper.active_adapters
            tower = wrapper.original_module if off else wrapper.modules_to_save[wrapper.active_adapters[0]]
        return tower

    # ---- facts of a host

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

    def native_tokens(self) -> int:
        """Tokens that the host's own way gives the language model for one video."""
        raise NotImplementedError

    def tokens(self) -> int:
        """M', tokens that ours gives."""
        if not self.merges:
            return self.native_tokens()
        last = self.frontend.schedule.layer_counts[-1]
        return last.clips * (last.out - (0 if self.keeps_prefix else last.prefix)) + self.added_tokens

    # ---- the protocol

    @classmethod
    def create(cls, model: Any, processor: Any, method: str, num_frames: int, options: Mapping[str, Any]) -> Host:
        backbone, _ = hf.backbone_of(cls.running_tower(model), cls.layer(model))
        schedule = schedule_for(method, len(backbone.blocks), backbone.shape, num_frames, **options)
        return cls(model, processor, schedule)

    @classmethod
    def restore(cls, model: Any, processor: Any, config: Mapping[str, Any]) -> Host:
        saved = read(_Saved, config, "the compression")
        schedule = MergeSchedule.from_dict(saved.schedule, "'schedule'")
        if saved.method != schedule.method:
            raise ValueError(f"'method': expected {schedule.method!r}, as the schedule says; got {saved.method!r}")
        return cls(model, processor, schedule)

    def config(self) -> dict[str, Any]:
        return {"method": self.method, "schedule": self.frontend.schedule.to_dict()}

    def pixels(self, videos: Sequence[SampledVideo]) -> Tensor:
        self._refuse_offloaded()
        self.merging.to(input_device(self.tower))  # the model may have moved since
        return super().pixels(videos)

    def _refuse_offloaded(self) -> None:
        """accelerate brings a module's weights when it calls that module."""
        called = set(self._made_of)
        for part in self.frontend.modules():
            if part not in called and any(weight.is_meta for weight in part.parameters(recurse=False)):
                names = ", ".join(name for name, _ in part.named_parameters(recurse=False))
                raise ValueError(
                    f"this tower's {names} are offloaded, and lie on a module that is not called as a whole when "
                    "tokens merge: keep the tower on a device, by its line in device_map"
                )

    def encode(self, videos: Sequence[SampledVideo], prompts: Sequence[str]) -> list[VisualTokens]:
        tokens = self.frontend(self.pixels(videos)).tokens
        features = (
            self.project(tokens) if self.merges else self.project_grid(tokens.unflatten(1, (self.num_frames, -1)))
        )
        return [VisualTokens(row) for row in features]

    def costs(self, frame: tuple[int, int] | None = None) -> Costs:
        """Of frames as large as the tower's own, which all are resized to."""
        whole, _ = hf.backbone_of(self.tower, -1)  # the host runs all blocks, whatever it takes
        shape = whole.shape
        identity = MergeSchedule.identity(len(whole.blocks), self.num_frames, shape.tokens, shape.num_prefix)
        return Costs(
            self.native_tokens(),
            self.tokens(),
            tower_gflops(identity, shape),
            self.frontend.gflops(),
            (shape.image_size, shape.image_size),
        )

    # ---- for subclasses

    def without_prefix(self, tokens: Tensor) -> Tensor:
        """Leaves the CLS tokens of every clip out of (V, M, D) merged tokens."""
        return self.frontend.patches(tokens)


def _modules_of(tower: nn.Module) -> list[nn.Module]:
    return list(tower.modules())


def grid_side(shape: TowerShape) -> int:
    """Patches along a side of a frame."""
    return shape.image_size // shape.patch_size


def per_frame(function: Callable[[Tensor], Tensor], tokens: Tensor) -> Tensor:
    """Applies what takes (R, N, D) to (V, F, N, D), and puts a video's frames one behind the other again."""
    return function(tokens.flatten(0, 1)).unflatten(0, tokens.shape[:2]).flatten(1, 2)


def append(features: Tensor, token: Tensor) -> Tensor:
    """(V, M, D) and one token (D) behind each video -> (V, M + 1, D)."""
    return torch.cat([features, token.to(features).expand(len(features), 1, -1)], dim=1)
