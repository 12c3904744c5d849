"""`VisualFrontend`: an image encoder that merges a video's tokens while it encodes them."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import torch
from einops import rearrange
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from tempme_vl.backbones.base import Backbone, BlockAdapter, TowerConfig, TowerShape
from tempme_vl.card import PLACE, Card
from tempme_vl.configs import FrontendConfig, ModelConfig, facts, tower_name
from tempme_vl.families import FAMILIES, find_family, split_name
from tempme_vl.hub import Shareable, find_folder
from tempme_vl.merging import PAPER, Counting, LayerMerge, MergeSchedule, is_of_merging, merge_layers
from tempme_vl.merging.tempme import CrossClipMerge
from tempme_vl.normalize import normalize
from tempme_vl.outputs import Readout, direction_of, read_out
from tempme_vl.pooling import FramePlace
from tempme_vl.pretrained import CONFIG_FILE, build, load_any, refuse_added_modules, save_model
from tempme_vl.scheduling import schedule_for, tower_gflops
from tempme_vl.schema import ConfigError, read
from tempme_vl.state import FrontendOutput, TokenState

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from tempme_vl.backbones.testa import Kind
    from tempme_vl.backbones.umt import Mode, Positions
    from tempme_vl.data.transforms import Preprocess
    from tempme_vl.hub import HubOptions

_log = logging.getLogger(__name__)


def _attention(of: TowerShape | MergeSchedule) -> str:
    return "joint" if of.joint else "divided" if of.divided else "apart"


class MergedBlock(nn.Module):
    """A transformer block with merging before attention, between attention and MLP, and behind the MLP."""

    def __init__(self, block: BlockAdapter, merge: LayerMerge):
        super().__init__()
        self.block = block
        self.before_attention, self.after_attention = merge.before_attention, merge.after_attention
        self.after_mlp = merge.after_mlp

    def forward(self, state: TokenState) -> TokenState:
        state, over_time = self.block.time_step(state)
        state = self.before_attention(state, over_time)
        state, attention = self.block.attention_step(state)
        state = self.after_attention(state, attention)
        return self.after_mlp(self.block.mlp_step(state), attention)


class VisualFrontend(Shareable, nn.Module):
    """Turns a batch of videos into few tokens and one embedding each.

    Args:
        backbone: the encoder; its modules are used, not copied.
        schedule: how many tokens every block keeps.
        config: what builds the same tower again, and its preprocessing; needed only for these two.

    Raises:
        ValueError: a schedule made for another number of layers or tokens than the backbone's, or for frames apart
            where the backbone sees them jointly.
    """

    def __init__(self, backbone: Backbone, schedule: MergeSchedule, config: TowerConfig | None = None):
        super().__init__()
        layers, shape = len(backbone.blocks), backbone.shape
        there = (layers, shape.tokens, shape.num_prefix, shape.joint, shape.divided)
        if (len(schedule.plan), schedule.tokens, schedule.prefix, schedule.joint, schedule.divided) != there:
            raise ValueError(
                f"the backbone has {layers} layers and {shape.tokens} tokens a frame ({shape.num_prefix} CLS), frames "
                f"{_attention(shape)}; the schedule was made for layers={len(schedule.plan)}, "
                f"tokens={schedule.tokens} ({schedule.prefix} CLS), {_attention(schedule)}"
            )
        self.shape, self.schedule, self.config = backbone.shape, schedule, config
        self.embed, self.norm, self.head = backbone.embed, backbone.norm, backbone.head
        merges = merge_layers(schedule, backbone.shape.width)
        self.blocks = nn.ModuleList(
            MergedBlock(cast(BlockAdapter, block), merge) for block, merge in zip(backbone.blocks, merges, strict=True)
        )
        self.tuned = FramePlace()
        self.grad_checkpointing = False

    def forward(
        self,
        video: Tensor,
        frame_mask: Tensor | None = None,
        trace_source: bool = False,
        guide: Tensor | None = None,
    ) -> FrontendOutput:
        """Encodes videos (TempMe, section 3).

        Args:
            video: (B, F, 3, H, W) frames, F = schedule.frames, H = W = shape.image_size: normalised, or as uint8, which
                are normalised here by `preprocessing`.
            frame_mask: (B, F), nonzero for real frames; padding frames take part in matching and attention and
                are left out of `pooled` only, as in the paper's code. Default: all real. In a tower that does not
                pool by CLS tokens a joined clip counts as real if one of its frames is.
            trace_source: also say which input tokens every output token holds.
            guide: (B, E) an embedding of a text for each video, in the space of `pooled`, for a schedule that merges
                with a text in mind (the option `guidance` of method "testa"), which needs it.

        Raises:
            ValueError: a video, mask or guide of another shape, whole numbers other than uint8, or uint8 in a front end
                whose preprocessing is not known; a guide missing, or given to a schedule that has no use for it.
        """
        self._check(video, frame_mask)
        self._check_guide(guide, video.shape[0])
        x = self.embed(self._normalised(video).flatten(0, 1))
        schedule = self.schedule
        start = x, schedule.clips, self.shape.num_prefix, trace_source, schedule.proportional
        if guide is not None:
            guide = direction_of(guide.to(x.dtype), self.norm, self.head, self.shape.width)
        state = TokenState.start(*start, frame_mask=frame_mask, guide=guide)
        for block in self.blocks:
            state = checkpoint(block, state, use_reentrant=False) if self._recompute() else block(state)
        return self._output(state, frame_mask)

    def _output(self, state: TokenState, frame_mask: Tensor | None) -> FrontendOutput:
        last = self.schedule.layer_counts[-1]
        found, planned = (state.num_clips, state.x.shape[1], state.num_prefix), (last.clips, last.out, last.prefix)
        if found != planned:
            raise ValueError(
                f"the modules of method {self.schedule.method!r} leave (clips, tokens of a clip, prefix) = {found}; "
                f"its schedule says {planned}"
            )
        tower = Readout(self.norm, self.head, self.shape, self.schedule)
        return read_out(state, frame_mask, tower, self.tuned)

    def preprocess(self, video: str | Path | np.ndarray, sampling: str = "fps1") -> Tensor:
        """A video as this tower's input: (F, 3, S, S) float32, F = schedule.frames; torch.stack makes a batch.

        Args:
            video: a file, or uint8 RGB frames (T, H, W, 3), of which F are taken evenly from the first to the last.
            sampling: how a file's frames are chosen, a name in `tempme_vl.data.sampling.SAMPLING`.

        Raises:
            VideoError: a file that cannot be read.
            ValueError: frames in another form, or a front end whose preprocessing is not known.
        """
        from tempme_vl.data.reader import VideoReader
        from tempme_vl.data.sampling import uniform
        from tempme_vl.data.splits import Video
        from tempme_vl.data.transforms import VideoTransform

        transform = VideoTransform(self.preprocessing)
        if isinstance(video, np.ndarray):
            return transform(video[uniform(max(len(video), 1), self.schedule.frames)] if len(video) else video)
        reader = VideoReader(self.schedule.frames, transform, sampling=sampling, on_broken="raise")
        return reader(Video(str(video), Path(video))).video

    @property
    def preprocessing(self) -> Preprocess:
        """How frames become this tower's input.

        Raises:
            ValueError: a front end on a backbone of unknown origin.
        """
        from tempme_vl.data.transforms import Preprocess

        if self.config is None:
            raise ValueError("this front end's preprocessing is not known: give VisualFrontend the tower's `config`")
        return Preprocess(**asdict(self.config.preprocess))

    def patches(self, values: Tensor) -> Tensor:
        """Leaves the CLS tokens and registers of every clip out of a value a token, such as `FrontendOutput.tokens`.

        Args:
            values: (B, M, ...), in the order of `FrontendOutput.tokens`, of all clips or of some.
        """
        last = self.schedule.layer_counts[-1]
        if self.shape.pooling == "all":  # one prefix for the video
            return values[:, last.prefix :]
        by_clip = rearrange(values, "b (c n) ... -> b c n ...", n=last.out)
        return rearrange(by_clip[:, :, last.prefix :], "b c n ... -> b (c n) ...")

    def _check(self, video: Tensor, frame_mask: Tensor | None) -> None:
        side = self.shape.image_size
        expected = (self.schedule.frames, 3, side, side)
        if video.ndim != 5 or tuple(video.shape[1:]) != expected:
            raise ValueError(
                f"expected video (B, F, 3, H, W) with (F, 3, H, W) = {expected}; got {tuple(video.shape)}. Sample "
                f"{expected[0]} frames and resize them to {side} px, or create the front end with other num_frames"
            )
        if not video.is_floating_point() and video.dtype != torch.uint8:
            raise ValueError(
                f"expected normalised frames of a floating dtype, or uint8 of 0 to 255; got {video.dtype}. "
                "frontend.preprocess takes one video's raw frames (T, H, W, 3), or its file"
            )
        if frame_mask is not None and frame_mask.shape != video.shape[:2]:
            raise ValueError(f"expected frame_mask {tuple(video.shape[:2])}; got {tuple(frame_mask.shape)}")

    def _check_guide(self, guide: Tensor | None, videos: int) -> None:
        if self.schedule.guided != (guide is not None):
            raise ValueError(
                "this schedule merges with a text in mind: give `guide`, an embedding of a text for each video, or "
                "leave the option `guidance` of the method out"
                if guide is None
                else 'only a schedule with guidance takes a `guide`: method "testa" with guidance above 0'
            )
        if guide is not None and self.shape.pooling == "attention":
            raise ValueError("this tower pools its tokens by attention: single ones are not in the space of texts")
        if guide is not None and guide.shape != (videos, self.shape.embed_dim):
            raise ValueError(f"expected guide {(videos, self.shape.embed_dim)}; got {tuple(guide.shape)}")

    def _normalised(self, video: Tensor) -> Tensor:
        if video.dtype != torch.uint8:
            return video
        if self.config is None:
            raise ValueError("uint8 frames are normalised by the tower's `config`: give VisualFrontend one")
        return normalize(video, self.config.preprocess.mean, self.config.preprocess.std)

    def _recompute(self) -> bool:
        return self.grad_checkpointing and torch.is_grad_enabled()

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recomputes every block in the backward pass instead of keeping its activations."""
        self.grad_checkpointing = enable

    @property
    def clip_positions(self) -> dict[str, nn.Parameter]:
        """TempMe's clip positions by layer number (as a string): (clips before the join, D)."""
        return {
            str(layer): block.before_attention.clip_position.weight
            for layer, block in enumerate(self.blocks)
            if isinstance(block.before_attention, CrossClipMerge)
        }

    def init_clip_positions(self, std: float) -> None:
        """Draws the clip positions from N(0, std^2)."""
        for position in self.clip_positions.values():
            nn.init.normal_(position, std=std)

    def take_clip_positions(self, given: Mapping[str, Tensor]) -> None:
        """Copies the clip positions that came with weights where this front end has the same, and says what it did.

        Args:
            given: by layer, (clips before the join, D).

        Raises:
            ValueError: numbers that are not finite.
        """
        own = self.clip_positions
        if damaged := [layer for layer, position in given.items() if not position.isfinite().all()]:
            raise ValueError(f"the clip positions of the layers {', '.join(damaged)} are not finite")
        taken = [layer for layer in given if layer in own and own[layer].shape == given[layer].shape]
        for layer in taken:
            own[layer].data.copy_(given[layer])
        unused = [f"{layer} {tuple(given[layer].shape)}" for layer in sorted(given, key=int) if layer not in taken]
        if unused:
            there = ", ".join(f"{layer} {tuple(own[layer].shape)}" for layer in own) or "none"
            _log.warning(
                "clip positions of the weights' layers %s stay unused; this front end (%s, %d frames) has %s",
                ", ".join(unused),
                self.schedule.method,
                self.schedule.frames,
                there,
            )
        if taken and (start := sorted(own.keys() - {*taken}, key=int)):
            _log.warning("clip positions of the layers %s are not among the weights and start anew", ", ".join(start))

    def gflops(self, counting: Counting = PAPER) -> float:
        """Cost of one video in the paper's counting, or another's: FVCORE is what TESTA's tables have
        (`MergeSchedule.gflops`)."""
        return tower_gflops(self.schedule, self.shape, counting)

    @classmethod
    def from_openai_state_dict(
        cls,
        state: Mapping[str, Tensor],
        heads: int,
        schedule: MergeSchedule,
        quick_gelu: bool = True,
    ) -> VisualFrontend:
        """A front end on the weights of a CLIP ViT (float32; cast it with `.to(dtype)`).

        Args:
            state: in OpenAI's names, of the whole model or the visual tower with or without its prefix "visual."; or in
                any other layout of `tempme_vl.backbones.clip_checkpoint`. What is not of the tower is left alone;
                TempMe's clip positions are taken where the schedule has the same (`take_clip_positions`).
            heads: attention heads of the tower (width // 64 for OpenAI's models).

        Raises:
            ValueError: weights of another architecture, or a schedule for another one.
        """
        from tempme_vl.families.open_clip import tower_from_openai

        backbone, config = tower_from_openai(state, heads, quick_gelu)
        frontend = cls(backbone, schedule, config)
        frontend.take_clip_positions(backbone.clip_positions)
        return frontend

    @classmethod
    def from_umt_state_dict(
        cls,
        state: Mapping[str, Tensor],
        heads: int,
        image_size: int,
        mode: Mode,
        schedule: MergeSchedule,
        positions: Positions = "image",
        pretrained_frames: int | None = None,
    ) -> VisualFrontend:
        """A front end on UMT-named vision weights, in any form of UMT's public files.

        Args:
            state: with or without the "vision_encoder." prefix; "vision_proj" is used where there is one, else the
                pooled embedding is as wide as the tower.
            heads: attention heads (width // 64 in UMT's models).
            mode: "joint" (all frames attend together) or "per_frame" (apart); the schedule becomes one of that mode.
            positions, pretrained_frames: see `tempme_vl.backbones.umt.UMTConfig`.

        Raises:
            ValueError: weights of another family, missing or unknown keys, or a schedule for another tower.
        """
        from tempme_vl.families.umt import tower_from_umt

        given = heads, image_size, schedule.frames, mode, positions, pretrained_frames
        backbone, config = tower_from_umt(state, *given)
        return cls(backbone, replace(schedule, joint=backbone.shape.joint), config)

    @classmethod
    def from_testa_state_dict(
        cls,
        state: Mapping[str, Tensor],
        heads: int,
        image_size: int,
        schedule: MergeSchedule,
        attention: Kind = "divided",
    ) -> VisualFrontend:
        """A front end on the visual weights of a file of BLIP or TESTA.

        Args:
            state: under their names ("visual_encoder.blocks.0.attn.qkv.weight"); "vision_proj" is used where there is
                one, else the pooled embedding is as wide as the tower. What a file of BLIP has not of attention over
                time starts as a copy of the attention within frames, and does nothing.
            heads: attention heads (width // 64 in public models).
            schedule: becomes one for such attention.
            attention: "divided", "apart" or "joint" (`tempme_vl.backbones.testa.TestaConfig`).

        Raises:
            ValueError: weights of another family, missing keys, or a schedule for another tower.
        """
        from tempme_vl.families.testa import tower_from_testa

        backbone, config = tower_from_testa(state, heads, image_size, schedule.frames, attention)
        shape = backbone.shape
        return cls(backbone, replace(schedule, joint=shape.joint, divided=shape.divided), config)

    def openai_state_dict(self, state: Mapping[str, Tensor] | None = None) -> dict[str, Tensor]:
        """The tower's weights under open_clip's names, bit for bit; merging parameters are left out.

        Args:
            state: other weights than the tower's own, under its names.
        """
        from tempme_vl.backbones.clip_checkpoint import to_openai_names

        state = self.state_dict() if state is None else state
        return to_openai_names({key: value for key, value in state.items() if not is_of_merging(self, key)})

    def save_pretrained(self, directory: str | Path) -> None:
        """Writes model.safetensors and config.json, which hold everything `from_pretrained` needs, and README.md."""
        save_model(directory, ModelConfig(self.full_config()), self.state_dict(), self.card())

    def card(self) -> Card:
        """What is known of it, for people (`tempme_vl.card`)."""
        tokens = self.schedule.output_tokens
        code = (
            "from tempme_vl import VisualFrontend\n\n"
            f'frontend = VisualFrontend.from_pretrained("{PLACE}")\n'
            'video = frontend.preprocess("clip.mp4")[None]\n'
            f"tokens = frontend(video).tokens  # (1, {tokens}, {self.shape.width})\n"
        )
        title = f"A front end for videos: {tower_name(self.config)}, {self.schedule.method}"
        return Card(title, "feature-extraction", self.facts(), code, (self.schedule.method,))

    def facts(self) -> dict[str, str]:
        """Rows of a card; see `tempme_vl.configs.facts`."""
        return facts(self.config, self.schedule, self.shape)

    def full_config(self) -> FrontendConfig:
        """What builds it again: the tower, its preprocessing, and the schedule.

        Raises:
            ValueError: a front end that was built on a backbone of unknown origin.
        """
        if self.config is None:
            raise ValueError("to save a front end, give VisualFrontend the `config` that builds its backbone again")
        return FrontendConfig(self.config, self.schedule)

    @classmethod
    def from_config(cls, config: FrontendConfig, place: str = "the front end's configuration") -> VisualFrontend:
        """A front end with random weights from what `full_config` gave.

        Args:
            place: to name in errors, such as the file.

        Raises:
            ConfigError: what no tower is made of.
        """
        try:
            frontend = cls(FAMILIES[config.tower.family].build_tower(config.tower), config.schedule, config.tower)
        except ValueError as error:
            raise ConfigError(f"{place}: {error}") from error
        side = config.tower.preprocess.image_size
        if side != frontend.shape.image_size:
            raise ConfigError(
                f"{place}, 'preprocess', 'image_size': expected {frontend.shape.image_size}, as the tower takes; "
                f"got {side}"
            )
        return frontend

    @classmethod
    def from_pretrained(cls, source: str | Path, **hub: Unpack[HubOptions]) -> VisualFrontend:
        """Reads what `save_pretrained` wrote, here or for a whole retrieval model (its visual part).

        Args:
            source: the folder, or the name of a model on the Hugging Face hub, "organisation/model".
            hub: revision, token, cache_dir, local_files_only (`tempme_vl.hub.HubOptions`).

        Raises:
            ValueError: a folder without config.json and model.safetensors, or weights that do not fit; or see
                `tempme_vl.hub.find_folder`.
        """
        directory = find_folder(source, **hub)
        settings, state = load_any(directory)
        file = directory / CONFIG_FILE
        if "frontend" not in settings:
            raise ConfigError(f"{file}: expected a model with a 'frontend'; got {', '.join(settings)}")
        refuse_added_modules(settings, directory)
        place = f"{file}, 'frontend'"
        if settings.pop("kind") == ModelConfig.kind:
            config = read(ModelConfig, settings, str(file)).frontend
        else:
            config = FrontendConfig.from_dict(settings["frontend"], place)
            state = {k.removeprefix("frontend."): v for k, v in state.items() if k.startswith("frontend.")}
        return build(lambda: cls.from_config(config, place), state, directory)


def create_frontend(
    name: str,
    pretrained: str | None = None,
    method: str = "tempme",
    num_frames: int = 12,
    clip_position_std: float = 0.0,
    budget: float | None = None,
    tokens: int | None = None,
    **options: Any,
) -> VisualFrontend:
    """A front end by name, as `open_clip.create_model` and `timm.create_model` make theirs.

    Args:
        name: "family:model", for example "open_clip:ViT-B-16-quickgelu", "umt:b16", "timm:vit_base_patch16_224", or
            "hf:" and a hub id or folder of a vision tower of transformers.
        pretrained: a tag of the family ("openai"; for hf and timm "default"); the path of weights, in any layout that
            the family knows, or of a folder that this package wrote; or None for random weights. Clip positions among
            them are taken where this front end has the same ones.
        method: a name in `tempme_vl.METHODS`; docs/methods.md has them with their options.
        num_frames: F.
        clip_position_std: TempMe's clip positions start as N(0, std^2). 0 starts at the pretrained function; a
            tower trained from scratch needs about 0.5.
        budget, tokens: what a video may cost at most, as a share of the GFLOPs without merging, or in tokens that leave
            the encoder; options of the method that are not given are chosen for it (`schedule_for`).
        options: those of the method (`make_schedule`) and of the family: for UMT, mode="per_frame" (frames apart, the
            default) or "joint" and positions="image" or "joint" (`tempme_vl.backbones.umt.UMTConfig`); for TESTA,
            attention="divided", "apart" or "joint" and temporal_scaling (`tempme_vl.backbones.testa.TestaConfig`); for
            hf and timm, layer and image_size (`load_tower` in `tempme_vl.backbones.hf` and `.timm`).

    Raises:
        ValueError: see `split_name`, the family's loader and `schedule_for`.
    """
    family = find_family(name)
    tower_options = {key: options.pop(key) for key in family.options if key in options}
    backbone, config = family.load_tower(split_name(name)[1], pretrained, num_frames, **tower_options)
    return merge_in(backbone, config, method, num_frames, clip_position_std, budget=budget, tokens=tokens, **options)


def merge_in(
    backbone: Backbone, config: TowerConfig, method: str, num_frames: int, clip_position_std: float, **options: Any
) -> VisualFrontend:
    """A front end on a tower, with its clip positions drawn, or those that came with its weights.

    Args:
        config: the tower's.
        options: of `schedule_for`.
    """
    schedule = schedule_for(method, len(backbone.blocks), backbone.shape, num_frames, **options)
    frontend = VisualFrontend(backbone, schedule, config)
    frontend.init_clip_positions(clip_position_std)
    frontend.take_clip_positions(backbone.clip_positions)
    return frontend
