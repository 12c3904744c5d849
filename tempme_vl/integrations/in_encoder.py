"""Hosts whose tower is a plain ViT: tokens merge inside it, and what comes out goes through the host's projector; or
the tower runs whole, and what the host makes of it becomes fewer behind it.

What the host does between tower and language model on a grid (pooling) is left out as soon as anything merges, because
there is no grid any more; with nothing merged it stays, and the host's own result comes out.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from math import prod
from typing import Any

import torch
from torch import Tensor, nn

from tempme_vl.backbones import hf
from tempme_vl.backbones.base import TowerShape
from tempme_vl.compressors import COMPRESSORS, FrameFeatures, KeptFeatures
from tempme_vl.compressors.base import Reading
from tempme_vl.frontend import VisualFrontend
from tempme_vl.integrations.base import Costs, Host, Keep, Request, SampledVideo, VisualTokens
from tempme_vl.integrations.devices import input_device, running
from tempme_vl.integrations.parts import check_apart, check_reduces_parts, encode_by_parts, join_features
from tempme_vl.integrations.places import in_frame
from tempme_vl.integrations.readings import Watch, pooling_head, read_videos
from tempme_vl.integrations.reduction import Place, reduction, saved_behind, saved_request
from tempme_vl.merging import Limit, MergeSchedule, learnt_modules, learnt_of_part, make_schedule, share_learnt
from tempme_vl.scheduling import schedule_for, tower_gflops
from tempme_vl.schema import Size, read


@dataclass(frozen=True)
class _Saved:
    """tempme.json."""

    model: str
    method: str
    schedule: Mapping[str, Any]
    frames_at_once: Size | None = None


@dataclass(frozen=True)
class _Frames:
    """A video, or a part of one, before anything becomes fewer behind the tower.

    Attributes:
        features: of the patches.
        prefix: (F, P, D_llm), CLS tokens that the language model gets.
        added: (A, D_llm), tokens that the host puts behind a video.
    """

    features: FrameFeatures
    prefix: Tensor
    added: Tensor


class InEncoderHost(Host):
    """A host around `VisualFrontend`, which is made of the very modules of the tower and is no child of the model.

    A subclass says `project`, `project_grid` and `frame_grid`, and `layer` if no configuration tells it.

    Args:
        schedule: of the tower; one that merges nothing where `behind` is given.
        behind: what becomes of the features behind the tower.
    """

    keeps_prefix = False  # whether the language model gets the CLS tokens
    added_tokens = 0  # tokens that `project` and `project_grid` add behind a video's

    def __init__(self, model: Any, processor: Any, schedule: MergeSchedule, behind: Request | None = None):
        super().__init__(model, processor, schedule.method if behind is None else behind.method, schedule.frames)
        self.merges = schedule.changes
        self._watch = Watch()
        self._made_of, self._frontend = self._make_frontend(schedule)
        self.reduction = None if behind is None else reduction(behind, self._place())
        learnt = nn.ModuleDict(learnt_modules(self._frontend.blocks))
        self.merging = learnt if self.reduction is None else self.reduction.merging
        self.inner = None if self.reduction is None else self.reduction.inner

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
        frontend = VisualFrontend(backbone, schedule, config)
        if not schedule.changes:
            frontend.blocks[-1].after_attention = self._watch
        return _modules_of(tower), frontend

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
        return running(cls.tower_of(model))

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

    def pool_grid(self, patches: Tensor) -> Tensor:
        """(R, N, C) values of a frame's patches -> (R, S, C), as the host's own way pools its features."""
        return patches

    def pool_weights(self) -> Iterator[Tensor]:
        """Weights of that pooling, which only features can go through."""
        return iter(())

    def frame_grid(self) -> tuple[int, int]:
        """Rows and columns of the tokens that the host's own way gives for a frame, CLS not counted."""
        side = grid_side(self.frontend.shape)
        return side, side

    @property
    def kept_prefix(self) -> int:
        """CLS tokens of a frame that the language model gets."""
        return self.frontend.shape.num_prefix if self.keeps_prefix else 0

    def native_tokens(self) -> int:
        """Tokens that the host's own way gives the language model for one video."""
        return self.num_frames * (prod(self.frame_grid()) + self.kept_prefix) + self.added_tokens

    def tokens(self) -> int | None:
        """M', tokens that ours gives; None where the data decide."""
        if self.reduction is not None:
            left = self.reduction.count(self.num_frames, self.frame_grid())
            return None if left is None else left + self.reduction.fixed
        return self.tokens_of(self.frontend.schedule) if self.merges else self.native_tokens()

    def tokens_of(self, schedule: MergeSchedule) -> int:
        """M' by a schedule that merges inside the tower."""
        last = schedule.layer_counts[-1]
        return last.clips * (last.out - (0 if self.keeps_prefix else last.prefix)) + self.added_tokens

    def _place(self) -> Place:
        """What stands behind the tower."""
        fixed = self.num_frames * self.kept_prefix + self.added_tokens
        width = self.model.config.get_text_config().hidden_size
        return Place(type(self.model).__name__, self.num_frames, width, self._readings(), fixed)

    def _readings(self) -> tuple[Reading, ...]:
        if any(True for _ in self.pool_weights()):
            return ()
        sums_up = self.frontend.shape.num_prefix > 0 or pooling_head(self.tower) is not None
        return ("received", "keys", "summary") if sums_up else ("received", "keys")

    # ---- the protocol

    @classmethod
    def create(cls, model: Any, processor: Any, request: Request) -> Host:
        backbone, _ = hf.backbone_of(cls.running_tower(model), cls.layer(model))
        layers, shape, frames = len(backbone.blocks), backbone.shape, request.num_frames
        whole = MergeSchedule.identity(layers, frames, shape.tokens, shape.num_prefix)
        inside = request.method not in COMPRESSORS
        if request.where == "tower" and not inside:
            raise ValueError(
                f"{request.method!r} works on the features that a tower gives: expected where='behind' or 'auto'"
            )
        if request.where == "behind" or not inside:
            return cls(model, processor, whole, request)
        if request.keep == Keep():
            return cls(model, processor, schedule_for(request.method, layers, shape, frames, **request.options))
        native = cls(model, processor, whole)
        most = request.keep.most(native.native_tokens())
        assert most is not None
        limit = Limit("tokens", most, native.tokens_of)
        size = layers, frames, shape.tokens, shape.num_prefix, shape.joint
        return cls(model, processor, make_schedule(request.method, *size, limit, **request.options))

    @classmethod
    def restore(cls, model: Any, processor: Any, config: Mapping[str, Any]) -> Host:
        if config.get("where") == "behind":
            return cls.create(model, processor, saved_request(config))
        saved = read(_Saved, config, "the compression")
        schedule = MergeSchedule.from_dict(saved.schedule, "'schedule'")
        if saved.method != schedule.method:
            raise ValueError(f"'method': expected {schedule.method!r}, as the schedule says; got {saved.method!r}")
        return cls(model, processor, schedule)

    def config(self) -> dict[str, Any]:
        if self.reduction is not None:
            return {"where": "behind", **saved_behind(self.reduction, self.num_frames)}
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
        if self.frames_at_once is not None:
            return encode_by_parts(self, videos)
        tokens = self.frontend(self.pixels(videos)).tokens
        if self.reduction is None:
            return list(map(VisualTokens, self._projected(tokens)))
        return [self._reduced(frames) for frames in self._frames(tokens)]

    def _projected(self, tokens: Tensor) -> Tensor:
        """(V, M, D) of the tower -> (V, M', D_llm)."""
        if self.merges:
            return self.project(tokens)
        return self.project_grid(tokens.unflatten(1, (-1, self.frontend.shape.tokens)))

    def _frames(self, tokens: Tensor) -> list[_Frames]:
        """(V, F * N, D) of the tower, and what has been read in it."""
        assert self.reduction is not None and self._watch.seen is not None
        prefix, added = self.kept_prefix, self.added_tokens
        frames = tokens.unflatten(1, (-1, self.frontend.shape.tokens))
        how = self.frontend.shape.num_prefix, self.tower, self.pool_grid
        known = read_videos(self.reduction.reads, self._watch.seen, frames, *how)
        self._watch.seen = None
        found = []
        for row, more in zip(self.project_grid(frames), known, strict=True):
            x = row[: len(row) - added].unflatten(0, (frames.shape[1], -1))
            separator = row[-1] if added else None
            features = FrameFeatures(x[:, prefix:], self.frame_grid(), separator=separator, **more)
            found.append(_Frames(features, x[:, :prefix], row[len(row) - added :]))
        return found

    def _reduced(self, frames: _Frames) -> VisualTokens:
        """What is left between what always stays."""
        assert self.reduction is not None
        left = self.reduction.reduce(frames.features, self.num_frames)
        features = torch.cat([with_prefix(left, frames.prefix), frames.added])
        if self.inner is None:
            return VisualTokens(features)
        places = replace(left, x=in_frame(left.source, frames.features.x.shape[1]).unsqueeze(1))
        stays = [torch.full_like(each[..., :1], -1, dtype=torch.int64) for each in (frames.prefix, frames.added)]
        return VisualTokens(features, {"places": torch.cat([with_prefix(places, stays[0]), stays[1]])[:, 0].tolist()})

    # ---- videos part by part

    def check_cut(self) -> None:
        if self.merges:
            check_apart(self.method)

    def check_stream(self) -> None:
        self.check_cut()
        if self.reduction is not None:
            check_reduces_parts(self.reduction)

    def cut(self, frame: tuple[int, int]) -> int:
        if self.merges:
            return self.frontend.schedule.frame_multiple
        return 1 if self.reduction is None else self.reduction.cut(self.num_frames, self.frame_grid()) or 1

    def part_tokens(self, part: SampledVideo, first: int) -> Tensor:
        """(1, M, D), what the front end makes of a part; see `encode_part`."""
        frames = range(first, first + len(part.frames))
        _, frontend = self._make_frontend(replace(self.frontend.schedule, frames=len(frames)))
        pixels = self.pixels([part])
        share_learnt(frontend.blocks, learnt_of_part(self.merging, frames, self.num_frames))
        return frontend(pixels).tokens

    def encode_part(self, part: SampledVideo, first: int) -> Tensor | _Frames:
        tokens = self.part_tokens(part, first)
        if self.reduction is None:
            return self._projected(tokens)[0]
        frames = self._frames(tokens)[0]
        whole = self.reduction.cut(self.num_frames, self.frame_grid()) is None
        return frames if whole else self._reduced(frames).features

    def join_parts(self, parts: Sequence[Any], video: SampledVideo) -> VisualTokens:
        if isinstance(parts[0], _Frames):
            features = join_features([part.features for part in parts])
            prefix = torch.cat([part.prefix for part in parts])
            return self._reduced(_Frames(features, prefix, parts[-1].added))
        added = self.added_tokens
        own = [row[: len(row) - added] for row in parts]
        return VisualTokens(torch.cat([*own, parts[-1][len(parts[-1]) - added :]]))

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


def with_prefix(left: KeptFeatures, prefix: Tensor) -> Tensor:
    """The tokens that are left of a video, each frame's CLS tokens in front of the clip that holds the frame.

    Args:
        prefix: (F, P, D) of all frames.

    Returns:
        (F * P + M, D).
    """
    frames, each, _ = prefix.shape
    if not each:
        return left.x
    starts = list(range(frames))
    for clip in left.clips:
        starts[clip.first : clip.last + 1] = [clip.first] * (clip.last + 1 - clip.first)
    of_prefix = [2 * start for start in starts for _ in range(each)]
    of_tokens = [2 * clip.first + 1 for clip in left.clips for _ in range(clip.tokens)]
    order = torch.tensor([*of_prefix, *of_tokens], device=prefix.device).argsort(stable=True)
    return torch.cat([prefix.flatten(0, 1), left.x])[order]


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
