"""TESTA's video transformer (EMNLP Findings 2023): BLIP's ViT with TimeSformer's divided space-time attention.

Its aggregation is the method "testa" (`tempme_vl.merging.testa`), which here compares frames by the keys of their
attention over time. A video is the mean of all tokens that leave the encoder, its CLS token among them.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from typing import Annotated, Any, Literal, get_args

import torch
from torch import Tensor, nn

from tempme_vl.backbones.base import (
    CLIP_MEAN,
    CLIP_STD,
    Backbone,
    BlockAdapter,
    PatchProjection,
    Preprocessing,
    TowerConfig,
    TowerShape,
    square_side,
)
from tempme_vl.backbones.divided import DividedBlock, ImageBlock
from tempme_vl.backbones.testa_checkpoint import TOWER, Converted, convert, nearest, read_checkpoint, resize_times
from tempme_vl.fit import misfits
from tempme_vl.schema import LEFT_OUT, Layers, Range, Size
from tempme_vl.weights.exports import find_export, load_exported_tower, tower_part

_log = logging.getLogger(__name__)

Kind = Literal["divided", "apart", "joint"]
Frames = Annotated[int, Range(1, 10_000)]


@dataclass(frozen=True)
class TestaConfig:
    """What builds a tower of TESTA.

    Attributes:
        embed_dim: E, width of the projected embedding; None leaves the pooled tokens as they are.
        num_frames: F; each has a position of its own.
        temporal_scaling: whether each frame has a learnt factor in the attention over time, as in TESTA's
            pre-training; frames then cannot merge.
        attention: "divided"; "apart" for frames that know nothing of each other: BLIP's own ViT, each frame with its
            CLS token; or "joint" for all tokens of a video in one attention, as the paper compares TESTA with ToMe.
        init_std: deviation of random weights; None for 1 / sqrt(fan-in), with which a small model learns in minutes.
        time_start: what positions of frames are at first: "zero", as for weights of a model of images, or "waves",
            sines and cosines, with which a tower of random weights knows the order of frames from its first step.
    """

    __test__ = False  # no test, whatever its name begins with

    image_size: Size
    patch_size: Size
    width: Size
    layers: Layers
    heads: Size
    embed_dim: Size | None
    num_frames: Frames
    mlp_ratio: Annotated[float, Range(0.01, 100)] = 4.0
    temporal_scaling: bool = False
    init_std: Annotated[float, Range(0, 10)] | None = 0.02
    attention: Kind = "divided"
    time_start: Literal["zero", "waves"] = field(default="zero", metadata=LEFT_OUT)

    def __post_init__(self) -> None:
        if self.attention not in get_args(Kind):
            raise ValueError(f"unknown attention {self.attention!r}; expected one of {', '.join(get_args(Kind))}")
        if self.image_size % self.patch_size or self.width % self.heads:
            raise ValueError(
                f"the patch size must divide the image size and the heads the width; got patches of "
                f"{self.patch_size} in {self.image_size} px, {self.heads} heads in width {self.width}"
            )


_MODELS: dict[str, dict[str, Any]] = {
    "tiny": {
        "image_size": 32,
        "patch_size": 8,
        "width": 64,
        "layers": 6,
        "heads": 4,
        "embed_dim": 64,
        "init_std": None,
    },
    "mini": {
        "image_size": 16,
        "patch_size": 8,
        "width": 32,
        "layers": 3,
        "heads": 2,
        "embed_dim": 64,
        "init_std": None,
        "time_start": "waves",
    },
    "b16": {"image_size": 224, "patch_size": 16, "width": 768, "layers": 12, "heads": 12, "embed_dim": 256},
}


def model_config(
    name: str, num_frames: int, temporal_scaling: bool = False, attention: Kind = "divided"
) -> TestaConfig:
    """The configuration of "mini", "tiny" or "b16".

    Raises:
        ValueError: another name, or see `TestaConfig`.
    """
    if name not in _MODELS:
        raise ValueError(f"TESTA has no model {name!r}; expected one of {', '.join(_MODELS)}")
    return TestaConfig(num_frames=num_frames, temporal_scaling=temporal_scaling, attention=attention, **_MODELS[name])


class TestaEmbed(nn.Module):
    """Patches, their positions and their frame's, and a CLS token: (B*F, 3, H, W) -> (B*F, 1 + L, D).

    If joint (B, 1 + L*F, D), the patches of all frames at one place together, as in TESTA's code: ToMe halves them by
    their order.

    Images of another size than the tower's get the nearest positions, as in TESTA's code.
    """

    def __init__(self, config: TestaConfig):
        super().__init__()
        width, side = config.width, config.image_size // config.patch_size
        self.proj = PatchProjection(3, width, config.patch_size, stride=config.patch_size)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, width))
        self.pos_embed = nn.Parameter(torch.zeros(1, 1 + side**2, width))
        self.joint, self.timed = config.attention == "joint", config.attention != "apart"
        if self.timed:
            self.time_embed = nn.Parameter(torch.zeros(1, config.num_frames, width))

    def forward(self, images: Tensor) -> Tensor:
        grid = self.proj(images.to(self.proj.weight.dtype))
        patches = grid.flatten(2).transpose(1, 2) + self._positions(*grid.shape[-2:])
        if self.timed:
            times = self.time_embed.squeeze(0)[:, None]
            patches = patches.unflatten(0, (-1, len(times))) + times
            patches = patches.transpose(1, 2).flatten(1, 2) if self.joint else patches.flatten(0, 1)
        cls = (self.cls_token + self.pos_embed[:, :1]).expand(len(patches), -1, -1)
        return torch.cat([cls, patches], dim=1)

    def _positions(self, rows: int, columns: int) -> Tensor:
        """(L, D)."""
        table = self.pos_embed[0, 1:]
        side = square_side(len(table))
        if (rows, columns) == (side, side):
            return table
        numbers = side * nearest(side, rows)[:, None] + nearest(side, columns)
        return table[numbers.flatten().to(table.device)]


def build(config: TestaConfig) -> Backbone:
    """The randomly initialised tower of a configuration. Its attention over time does nothing at first."""
    scaled, divided = config.num_frames if config.temporal_scaling else 0, config.attention == "divided"
    sizes = config.width, config.heads, int(config.width * config.mlp_ratio)
    blocks: list[BlockAdapter] = [
        DividedBlock(*sizes, scaled) if divided else ImageBlock(*sizes) for _ in range(config.layers)
    ]
    embed = TestaEmbed(config)
    backbone = Backbone(
        embed,
        blocks,
        nn.LayerNorm(config.width, eps=1e-6),
        nn.Identity() if config.embed_dim is None else nn.Linear(config.width, config.embed_dim),
        TowerShape(
            image_size=config.image_size,
            patch_size=config.patch_size,
            width=config.width,
            heads=config.heads,
            embed_dim=config.embed_dim or config.width,
            mlp_ratio=config.mlp_ratio,
            norm_pre=False,
            joint=config.attention == "joint",
            pool=None if config.attention == "apart" else "all",
            divided=divided,
        ),
    )
    backbone.apply(partial(_init, std=config.init_std))
    for position in (embed.cls_token, embed.pos_embed):
        nn.init.trunc_normal_(position, std=0.02)
    if embed.timed and config.time_start == "waves":
        embed.time_embed.data[0] = _waves(config.num_frames, config.width)
    return backbone


def _waves(frames: int, width: int) -> Tensor:
    """(F, D): half of the numbers are sines, half cosines, of up to 4 turns a video and of amplitude 1 / sqrt(2)."""
    turns = 4 * torch.arange(1, width // 2 + 1) / (width // 2)
    angle = 2 * math.pi * torch.arange(frames)[:, None] / frames * turns
    return torch.cat([angle.sin(), angle.cos()], 1) * 0.5**0.5


def _init(module: nn.Module, std: float | None) -> None:
    """Linear layers from a truncated normal, biases zero; what stands behind attention over time starts at zero."""
    if isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=module.weight.shape[1] ** -0.5 if std is None else std)
        nn.init.zeros_(module.bias)
    if isinstance(module, DividedBlock):
        nn.init.zeros_(module.temporal_fc.weight)


# Public names of the tower and of its projection, and ours, as prefixes or parts of a key.
_RENAMED = (
    (f"{TOWER}cls_token", "embed.cls_token"),
    (f"{TOWER}pos_embed", "embed.pos_embed"),
    (f"{TOWER}time_embed", "embed.time_embed"),
    (f"{TOWER}patch_embed.proj.", "embed.proj."),
    (f"{TOWER}blocks.", "blocks."),
    (f"{TOWER}norm.", "norm."),
    ("vision_proj.", "head."),
    (".temporal_scaling", ".scale.temporal_scaling"),
    (".mlp.fc1.", ".mlp.0."),
    (".mlp.fc2.", ".mlp.2."),
)


def from_public_names(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tower's part of public weights under our names."""
    renamed = {}
    for key, value in state.items():
        if key.startswith((TOWER, "vision_proj.")):
            for theirs, ours in _RENAMED:
                key = key.replace(theirs, ours)
            renamed[key] = value
    return renamed


def to_public_names(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The inverse of `from_public_names`, bit for bit; a front end's state too, merging parameters left out."""
    return {public_name(key): value for key, value in tower_part(state).items()}


def public_name(key: str) -> str:
    """One of a tower's weights under its public name."""
    for theirs, ours in _RENAMED:
        if ours[0] == "." or key.startswith(ours):
            key = key.replace(ours, theirs, 1)
    return key


def config_of(
    state: Mapping[str, Tensor], heads: int, image_size: int, num_frames: int, attention: Kind = "divided"
) -> TestaConfig:
    """The configuration of a tower for the weights of a file, as far as shapes tell it.

    Args:
        state: under public names.
        num_frames: of the tower; its positions of frames are resized where the file has others.

    Raises:
        ValueError: no patch embedding or no blocks, or see `TestaConfig`.
    """
    patches = state.get(f"{TOWER}patch_embed.proj.weight")
    blocks = [key.split(".")[2] for key in state if key.startswith(f"{TOWER}blocks.")]
    if patches is None or not blocks:
        raise ValueError("expected BLIP's or TESTA's visual encoder; its patch embedding or its blocks are missing")
    width, head = patches.shape[0], state.get("vision_proj.weight")
    scaling = state.get(f"{TOWER}blocks.0.temporal_scaling")
    return TestaConfig(
        image_size=image_size,
        patch_size=patches.shape[-1],
        width=width,
        layers=1 + max(map(int, blocks)),
        heads=heads,
        embed_dim=None if head is None else head.shape[0],
        num_frames=num_frames,
        mlp_ratio=state[f"{TOWER}blocks.0.mlp.fc1.weight"].shape[0] / width,
        temporal_scaling=scaling is not None and scaling.shape[1] == num_frames and attention == "divided",
        attention=attention,
    )


_TIMES, _SCALING = "embed.time_embed", ".scale.temporal_scaling"
# what a file need not have: BLIP's has no frames, and that of question answering no projection
_OPTIONAL = (".temporal_fc.", ".scale.", "embed.time_embed", "head.")


def load(backbone: Backbone, state: Mapping[str, Tensor], source: str) -> Converted:
    """Loads the weights of a public file; attention over time, positions of frames and the projection may be missing.

    Args:
        state: under public names; others than the tower's are left alone.
        source: where they come from, for the message.

    Returns:
        what became of the file's names.

    Raises:
        ValueError: other keys missing, or other shapes.
    """
    own = backbone.state_dict()
    converted = convert(state, {name: value.shape for name, value in to_public_names(own).items()})
    weights = from_public_names(converted.state)
    wanted = {key: own[key] for key in own if key in weights or not any(part in key for part in _OPTIONAL)}
    if trouble := misfits(wanted, weights):
        raise ValueError(f"{source} does not hold the weights of this TESTA tower: {trouble}")
    backbone.load_state_dict(weights, strict=False)
    return converted


@dataclass(frozen=True, kw_only=True)
class Config(TestaConfig, TowerConfig):
    """What builds a tower, and its preprocessing."""

    family: Literal["testa"] = "testa"


def saved_config(config: TestaConfig) -> Config:
    """What builds the tower again (`build_tower`), with TESTA's preprocessing: squashed to the square."""
    preprocess = Preprocessing(config.image_size, CLIP_MEAN, CLIP_STD, "squash", "bicubic")
    return Config(**asdict(config), preprocess=preprocess)


def load_tower(
    name: str, pretrained: str | None, num_frames: int, temporal_scaling: bool = False, attention: Kind = "divided"
) -> tuple[Backbone, Config]:
    """A tower by name, with its configuration.

    Args:
        name: "mini", "tiny" or "b16".
        pretrained: the path of a public file of BLIP or TESTA or of a folder that this package wrote, for any number of
            frames; None for random weights.
        temporal_scaling, attention: see `TestaConfig`.

    Raises:
        ValueError: see `model_config`, `testa_checkpoint.read_checkpoint`, `load` and
            `tempme_vl.weights.exports.load_exported_tower`.
    """
    config = model_config(name, num_frames, temporal_scaling, attention)
    backbone = build(config)
    if pretrained is None:
        return backbone, saved_config(config)
    if export := find_export(pretrained):
        export = replace(export, state=_fitted(export.state, num_frames, backbone))
        differing = "num_frames", "temporal_scaling"
        backbone.clip_positions = load_exported_tower(backbone, saved_config(config), export, differing)
    else:
        _log.info("%s: %s", pretrained, load(backbone, read_checkpoint(pretrained), pretrained))
    return backbone, saved_config(config)


def _fitted(state: Mapping[str, Tensor], frames: int, backbone: Backbone) -> dict[str, Tensor]:
    """A folder's weights for a tower of so many frames: their positions resized; the factors of frames that
    pre-training has left out where the tower has none, and as they start where the folder has none of as many."""
    fitted = {
        key: resize_times(value, frames) if key.endswith(_TIMES) else value
        for key, value in state.items()
        if not key.endswith(_SCALING)
    }
    front = next((key.removesuffix(_TIMES) for key in state if key.endswith(_TIMES)), "")
    for name, own in backbone.state_dict().items():
        if name.endswith(_SCALING):
            key = front + name.replace(_SCALING, f".block{_SCALING}")
            given = state.get(key, own)
            fitted[key] = given if given.shape == own.shape else own
    return fitted


def build_tower(config: Config) -> Backbone:
    """The backbone of a configuration, randomly initialised."""
    return build(config)
