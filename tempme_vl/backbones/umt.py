"""UMT's vision transformer (Unmasked Teacher, ICCV 2023), with frames joint or apart over the same weights.

Joint is UMT itself: the tokens of all frames attend together. Apart is UMT4Clip (TempMe, section 4.4): every frame goes
through alone, so that TempMe has clips to join. There is no CLS token; a frame is the mean of its tokens.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Annotated, Any, Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tempme_vl.backbones.base import (
    IMAGENET_MEAN,
    IMAGENET_STD,
    Backbone,
    BlockAdapter,
    DropPath,
    PatchProjection,
    Preprocessing,
    SelfAttention,
    TowerConfig,
    TowerShape,
)
from tempme_vl.backbones.umt_checkpoint import KeyReport, convert, read_checkpoint
from tempme_vl.fit import misfits
from tempme_vl.schema import Layers, Range, Share, Size
from tempme_vl.state import AttentionContext
from tempme_vl.weights.exports import find_export, load_exported_tower, tower_part

_log = logging.getLogger(__name__)

Mode = Literal["joint", "per_frame"]
Stored = Literal["joint", "clip"]  # as files name a mode, and UMT itself; a clip is something else here
Positions = Literal["image", "joint"]
Frames = Annotated[int, Range(1, 10_000)]


def stored_mode(mode: str) -> Stored:
    """A mode, "joint" or "per_frame", as a configuration has it. The latter's older name "clip" is accepted, and noted.

    Raises:
        ValueError: another one.
    """
    if mode == "clip":
        _log.info("mode='clip' is the older name of mode='per_frame'")
    elif mode not in get_args(Mode):
        raise ValueError(f"unknown mode {mode!r}; expected one of {', '.join(get_args(Mode))}")
    return "joint" if mode == "joint" else "clip"


@dataclass(frozen=True)
class UMTConfig:
    """What builds a UMT tower.

    Attributes:
        embed_dim: E, width of the projected embedding; None leaves the pooled tokens as they are.
        num_frames: F; the position table of the joint mode needs it.
        mode: "joint" or "clip" (frames apart); see `stored_mode`.
        positions: for frames apart: "image", UMT's own table for single frames, or "joint", each frame's part of the
            table for all frames.
        pretrained_frames: frames that the joint table is made for before it is stretched linearly in time to
            `num_frames`; None makes it for `num_frames`, as UMT's fine-tuning does.
        pool_norm: whether a LayerNorm follows the pooling (retrieval has it, question answering does not).
        drop_path: rate of the last block, rising linearly from 0 (UMT: 0.2 for B, 0.3 for L in retrieval).
        init_std: deviation of random weights; None for 1 / sqrt(fan-in), with which a small model learns in minutes.
    """

    image_size: Size
    patch_size: Size
    width: Size
    layers: Layers
    heads: Size
    embed_dim: Size | None
    num_frames: Frames
    mode: Stored = "joint"
    positions: Positions = "image"
    pretrained_frames: Frames | None = None
    mlp_ratio: Annotated[float, Range(0.01, 100)] = 4.0
    pool_norm: bool = True
    drop_path: Share = 0.0
    init_std: Annotated[float, Range(0, 10)] | None = 0.02

    def __post_init__(self) -> None:
        for name, value, known in (
            ("mode", self.mode, get_args(Stored)),
            ("positions", self.positions, get_args(Positions)),
        ):
            if value not in known:
                raise ValueError(f"unknown {name} {value!r}; expected one of {', '.join(known)}")
        if self.image_size % self.patch_size or self.width % self.heads:
            raise ValueError(
                f"the patch size must divide the image size and the heads the width; got patches of "
                f"{self.patch_size} in {self.image_size} px, {self.heads} heads in width {self.width}"
            )

    @property
    def patches(self) -> int:
        """N, tokens of a frame."""
        return (self.image_size // self.patch_size) ** 2


# width, layers, heads, embed_dim, drop_path
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
    "b16": {"width": 768, "layers": 12, "heads": 12, "embed_dim": 512, "drop_path": 0.2},
    "l16": {"width": 1024, "layers": 24, "heads": 16, "embed_dim": 768, "drop_path": 0.3},
}


def model_config(name: str, num_frames: int, mode: Mode, positions: Positions = "image") -> UMTConfig:
    """The configuration of "tiny", "b16" or "l16".

    Raises:
        ValueError: another name, or see `UMTConfig`.
    """
    if name not in _MODELS:
        raise ValueError(f"UMT has no model {name!r}; expected one of {', '.join(_MODELS)}")
    shape = {"image_size": 224, "patch_size": 16, **_MODELS[name]}
    return UMTConfig(num_frames=num_frames, mode=stored_mode(mode), positions=positions, **shape)


def sinusoid_table(positions: int, width: int) -> Tensor:
    """(positions, width) float64: sine in even columns, cosine in odd ones (Vaswani et al. 2017, section 3.5)."""
    column = torch.arange(width)
    rate = 10000.0 ** (-2 * (column // 2).double() / width)
    angle = torch.arange(positions, dtype=torch.float64)[:, None] * rate
    return torch.where(column % 2 == 0, angle.sin(), angle.cos())


def position_table(config: UMTConfig) -> Tensor:
    """(1 or F, N, D) float32: the positions of a single frame, or of all frames, token t * N + i for frame t."""
    if config.mode == "clip" and config.positions == "image":
        return sinusoid_table(config.patches, config.width).float().unsqueeze(0)
    made_for = config.pretrained_frames or config.num_frames
    table_FND = sinusoid_table(made_for * config.patches, config.width).unflatten(0, (made_for, -1))
    if made_for != config.num_frames:
        table_NDF = table_FND.permute(1, 2, 0)
        table_FND = F.interpolate(table_NDF, size=config.num_frames, mode="linear").permute(2, 0, 1)
    return table_FND.float()


class UMTEmbed(nn.Module):
    """Patches and fixed positions: (B*F, 3, H, W) -> (B*F, N, D), or (B, F*N, D) if joint."""

    positions: Tensor

    def __init__(self, config: UMTConfig):
        super().__init__()
        self.joint = config.mode == "joint"
        self.proj = PatchProjection(3, config.width, config.patch_size, stride=config.patch_size)
        self.register_buffer("positions", position_table(config), persistent=False)

    def forward(self, images: Tensor) -> Tensor:
        patches = self.proj(images.to(self.proj.weight.dtype)).flatten(2).transpose(1, 2)
        frames = len(self.positions)
        x_BFND = patches.unflatten(0, (-1, frames)) + self.positions.to(patches.dtype)
        return x_BFND.flatten(1, 2) if self.joint else x_BFND.flatten(0, 1)


class UMTBlock(BlockAdapter):
    """A pre-norm block: LayerNorm of eps 1e-6, keys without bias, exact GELU, no LayerScale."""

    def __init__(self, config: UMTConfig, drop_path: float):
        super().__init__()
        hidden = int(config.width * config.mlp_ratio)
        self.norm1, self.norm2 = (nn.LayerNorm(config.width, eps=1e-6) for _ in range(2))
        self.attn = SelfAttention(config.width, config.heads, key_bias=False)
        self.mlp = nn.Sequential(nn.Linear(config.width, hidden), nn.GELU(), nn.Linear(hidden, config.width))
        self.drop_path = DropPath(drop_path)

    def attention_branch(self, x: Tensor, bias: Tensor | None) -> tuple[Tensor, AttentionContext]:
        attended, context = self.attn(self.norm1(x), bias)
        return self.drop_path(attended), context

    def mlp_branch(self, x: Tensor) -> Tensor:
        return self.drop_path(self.mlp(self.norm2(x)))


def build(config: UMTConfig) -> Backbone:
    """The randomly initialised tower of a configuration."""
    rates = torch.linspace(0, config.drop_path, config.layers, device="cpu").tolist()
    blocks: list[BlockAdapter] = [UMTBlock(config, rate) for rate in rates]
    pool_norm = nn.LayerNorm(config.width, eps=1e-6) if config.pool_norm else nn.Identity()
    proj = nn.Identity() if config.embed_dim is None else nn.Linear(config.width, config.embed_dim)
    backbone = Backbone(
        UMTEmbed(config),
        blocks,
        nn.LayerNorm(config.width, eps=1e-6),
        nn.Sequential(pool_norm, proj),
        TowerShape(
            image_size=config.image_size,
            patch_size=config.patch_size,
            width=config.width,
            heads=config.heads,
            embed_dim=config.embed_dim or config.width,
            mlp_ratio=config.mlp_ratio,
            norm_pre=False,
            num_prefix=0,
            joint=config.mode == "joint",
        ),
    )
    backbone.apply(partial(_init, std=config.init_std))
    return backbone


def _init(module: nn.Module, std: float | None) -> None:
    """Linear layers as UMT and BEiT start: truncated normal of deviation 0.02, biases zero."""
    if isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=module.weight.shape[1] ** -0.5 if std is None else std)
        if module.bias is not None:
            nn.init.zeros_(module.bias)


# Official names (of the vision encoder and its projection) and ours, as prefixes or parts of a key.
_RENAMED = (
    ("encoder.patch_embed.proj.", "embed.proj."),
    ("encoder.blocks.", "blocks."),
    ("encoder.norm.", "norm."),
    ("vision_proj.", "head.1."),
    ("pool_norm.", "head.0."),
    (".attn.q_bias", ".attn.bias.q"),
    (".attn.v_bias", ".attn.bias.v"),
    (".mlp.fc1.", ".mlp.0."),
    (".mlp.fc2.", ".mlp.2."),
)
_PATCHES = "embed.proj.weight"


def from_umt_names(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tower's part of official weights under our names; the patch embedding loses its time axis of length 1."""
    renamed = {}
    for key, value in state.items():
        for theirs, ours in _RENAMED:
            key = key.replace(theirs, ours)
        renamed[key] = value.squeeze(2) if key == _PATCHES and value.ndim == 5 else value
    return renamed


def to_umt_names(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The inverse of `from_umt_names`, bit for bit; a front end's state too, merging parameters left out."""
    exported = {}
    for key, value in tower_part(state).items():
        if key == _PATCHES:
            value = value.unsqueeze(2)
        for theirs, ours in _RENAMED:
            key = key.replace(ours, theirs) if ours[0] == "." else _replace_prefix(key, ours, theirs)
        exported[key] = value
    return exported


def _replace_prefix(key: str, old: str, new: str) -> str:
    return new + key[len(old) :] if key.startswith(old) else key


def tower_state(state: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], KeyReport]:
    """The vision encoder and its projection, where the file has one, of a checkpoint in any public form.

    Returns:
        weights under our names, and what became of every key of the file.

    Raises:
        ValueError: weights of another family (`umt_checkpoint.detect_form`), or unknown ones within the encoder.
    """
    converted = convert(state, "vision")
    strange = [key for key in converted.report.unexplained if key.startswith(("encoder.", "vision_encoder."))]
    if strange:
        raise ValueError(f"a UMT vision encoder has no such weights, and would not be itself without them: {strange}")
    projection = {key: value for key, value in state.items() if key.startswith("vision_proj.")}
    report = replace(
        converted.report,
        used=(*converted.report.used, *projection),
        unexpected=tuple(key for key in converted.report.unexpected if key not in projection),
    )
    return from_umt_names({**converted.state, **projection}), report


def config_of(
    weights: Mapping[str, Tensor],
    heads: int,
    image_size: int,
    num_frames: int,
    mode: Mode = "joint",
    positions: Positions = "image",
    pretrained_frames: int | None = None,
) -> UMTConfig:
    """The configuration that weights under our names were made with, as far as shapes tell it.

    Raises:
        ValueError: no patch embedding or no blocks, or see `UMTConfig`.
    """
    layers = 1 + max((int(key.split(".")[1]) for key in weights if key.startswith("blocks.")), default=-1)
    if _PATCHES not in weights or not layers:
        raise ValueError("expected a UMT vision encoder; its patch embedding or its blocks are missing")
    if weights[_PATCHES].ndim != 4:
        raise ValueError(
            "expected patches of one frame each, a patch embedding (D, 3, 1, P, P) or (D, 3, P, P); "
            f"got {tuple(weights[_PATCHES].shape)}"
        )
    width, _, patch_size, _ = weights[_PATCHES].shape
    head, hidden = weights.get("head.1.weight"), weights.get("blocks.0.mlp.0.weight")
    return UMTConfig(
        image_size=image_size,
        patch_size=patch_size,
        width=width,
        layers=layers,
        heads=heads,
        embed_dim=None if head is None else head.shape[0],
        num_frames=num_frames,
        mode=stored_mode(mode),
        positions=positions,
        pretrained_frames=pretrained_frames,
        mlp_ratio=4.0 if hidden is None else hidden.shape[0] / width,
        pool_norm="head.0.weight" in weights,
    )


def load(backbone: Backbone, weights: Mapping[str, Tensor], source: str) -> list[str]:
    """Loads weights under our names; the projection and its norm may be missing (stage-1 files have none).

    Args:
        source: where they come from, for the message.

    Returns:
        the keys of the head that keep their random start.

    Raises:
        ValueError: other keys missing or unknown, or other shapes.
    """
    start = {key: value for key, value in backbone.state_dict().items() if key.startswith("head.")}
    kept = sorted(set(start) - set(weights))
    state = {**{key: start[key] for key in kept}, **weights}
    if trouble := misfits(backbone.state_dict(), state):
        alike = _model_like(weights)
        looks = f"it looks like {alike}" if alike else "no model of UMT has its sizes"
        raise ValueError(f"{source} does not hold the weights of this UMT tower: {trouble}; {looks}")
    backbone.load_state_dict(state)
    return kept


def _model_like(weights: Mapping[str, Tensor]) -> str | None:
    """The model that weights under our names may be of."""
    layers = len({key.split(".")[1] for key in weights if key.startswith("blocks.")})
    widths = {len(value) for key, value in weights.items() if key == "norm.weight"}
    sizes = ({"width": width, "layers": layers} for width in widths)
    return next((name for own in sizes for name, sized in _MODELS.items() if own.items() <= sized.items()), None)


@dataclass(frozen=True, kw_only=True)
class Config(UMTConfig, TowerConfig):
    """What builds a tower, and its preprocessing."""

    family: Literal["umt"] = "umt"


def saved_config(config: UMTConfig) -> Config:
    """What builds the tower again (`build_tower`), with UMT's preprocessing: squashed to the square."""
    preprocess = Preprocessing(config.image_size, IMAGENET_MEAN, IMAGENET_STD, "squash", "bicubic")
    return Config(**asdict(config), preprocess=preprocess)


def load_tower(
    name: str, pretrained: str | None, num_frames: int, mode: Mode = "per_frame", positions: Positions = "image"
) -> tuple[Backbone, Config]:
    """A tower by name, with its configuration.

    Args:
        name: "tiny", "b16" or "l16".
        pretrained: the path of a public checkpoint (any form) or of a folder that this package wrote; None for random
            weights.

    Raises:
        ValueError: see `model_config`, `umt_checkpoint.read_checkpoint`, `tower_state`, `load` and
            `tempme_vl.weights.exports.load_exported_tower`.
    """
    config = model_config(name, num_frames, mode, positions)
    backbone = build(config)
    if pretrained is None:
        return backbone, saved_config(config)
    if export := find_export(pretrained):
        free = ("num_frames", "mode", "positions", "pretrained_frames")
        backbone.clip_positions = load_exported_tower(backbone, saved_config(config), export, free)
    else:
        weights, report = tower_state(read_checkpoint(pretrained))
        kept = load(backbone, weights, pretrained)
        _log.info("%s\nrandom: %s", report, ", ".join(kept) or "nothing")
    return backbone, saved_config(config)


def build_tower(config: Config) -> Backbone:
    """The backbone of a configuration, randomly initialised."""
    return build(config)
