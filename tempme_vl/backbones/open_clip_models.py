"""Models of open_clip by their configurations: what builds them, with random weights.

A visual tower may be timm's, and a model may have a text tower of its own (SigLIP): such models are called mixed here.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, TypeAlias

import open_clip
import torch
from torch import nn

from tempme_vl.backbones.base import CLIP_MEAN, CLIP_STD, Backbone, Preprocessing, TowerConfig
from tempme_vl.backbones.open_clip_blocks import visual_backbone
from tempme_vl.libraries import undocumented
from tempme_vl.schema import LAYERS, LEFT_OUT, SIZE, ConfigError, Range, Size, read

_PACKAGE = "open_clip_torch"
with undocumented(_PACKAGE):
    from open_clip.transformer import VisionTransformer

CLIPModel: TypeAlias = open_clip.CLIP | open_clip.CustomTextCLIP

# Small towers for the embedded data set and for tests; everything else comes from open_clip's own configurations.
TINY_CONFIGS: dict[str, dict[str, Any]] = {
    "tiny": {
        "embed_dim": 64,
        "vision_cfg": {"image_size": 32, "layers": 6, "width": 64, "head_width": 16, "patch_size": 8},
        "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 64, "heads": 4, "layers": 2},
    },
}

_LIMITS = {
    **dict.fromkeys(("image_size", "width", "head_width", "patch_size", "heads", "context_length", "vocab_size"), SIZE),
    "layers": LAYERS,
    "mlp_ratio": Range(0.01, 100),
}


@dataclass(frozen=True, kw_only=True)
class Config(TowerConfig):
    """What builds a tower; `vision_cfg` and `text_cfg` are open_clip's own. The text tower is not needed."""

    family: Literal["open_clip"] = "open_clip"
    name: str | None = field(default=None, metadata=LEFT_OUT)
    embed_dim: Size
    vision_cfg: Mapping[str, Any]
    text_cfg: Mapping[str, Any] | None = field(default=None, metadata=LEFT_OUT)
    quick_gelu: bool = False
    custom_text: bool = field(default=False, metadata=LEFT_OUT)

    def __post_init__(self) -> None:
        vision = read(open_clip.CLIPVisionCfg, self.vision_cfg, "'vision_cfg'", _LIMITS)
        if vision.timm_model_name:
            if vision.timm_model_pretrained:
                raise ValueError("'vision_cfg': expected timm_model_pretrained false; weights come from the folder")
        elif not isinstance(vision.width, int) or vision.width % vision.head_width:
            raise ValueError(
                f"'vision_cfg': expected a head_width that divides {vision.width}; got {vision.head_width}"
            )
        if self.text_cfg is not None:
            check_text_config(self.text_cfg, "'text_cfg'")

    @property
    def model_config(self) -> dict[str, Any]:
        """In open_clip's form."""
        names = ("embed_dim", "vision_cfg", "text_cfg", "quick_gelu", "custom_text")
        return {name: getattr(self, name) for name in names}

    @property
    def is_mixed(self) -> bool:
        """See `is_mixed`."""
        return is_mixed(self.model_config)


def check_text_config(values: object, place: str) -> None:
    """Raises:
    ConfigError: unknown keys, values that are no sizes, or heads that do not divide the width.
    """
    text = read(open_clip.CLIPTextCfg, values, place, _LIMITS)
    if text.width % text.heads:
        raise ConfigError(f"{place}: expected heads that divide the width {text.width}; got {text.heads}")


def model_config(name: str) -> dict[str, Any]:
    """The configuration of an open_clip model: embed_dim, vision_cfg, text_cfg, quick_gelu and, in some, custom_text.

    Raises:
        ValueError: an unknown name, or a model whose towers are not taken apart here.
    """
    config = TINY_CONFIGS.get(name) or open_clip.get_model_config(name)
    if config is None:
        known = [*TINY_CONFIGS, *(n for n in open_clip.list_models() if n.startswith("ViT-"))]
        raise ValueError(f"open_clip has no model {name!r}; known ViTs: {', '.join(known)}")
    vision, text = config["vision_cfg"], config["text_cfg"]
    foreign = ""
    if "hf_model_name" in text:
        foreign = f"its text tower is {text['hf_model_name']!r} of transformers"
    elif "multimodal_cfg" in config:
        foreign = "CoCa has a text tower with a class token, and a decoder"
    elif not isinstance(vision.get("layers", 12), int):
        foreign = "its visual tower is a ResNet"
    if foreign:
        raise ValueError(f"{name!r} cannot be taken apart: {foreign}. Expected a ViT such as 'ViT-B-16' or SigLIP's")
    return config


def is_mixed(config: Mapping[str, Any]) -> bool:
    """Whether a model's visual tower is timm's or its text tower its own, by its configuration."""
    return "timm_model_name" in config["vision_cfg"] or bool(config.get("custom_text"))


def untrained(vision_cfg: Mapping[str, Any]) -> dict[str, Any]:
    """A tower's configuration without weights of timm, which would be looked for on its hub."""
    return {**vision_cfg, **({"timm_model_pretrained": False} if "timm_model_name" in vision_cfg else {})}


@undocumented(_PACKAGE)
def build_clip(config: Mapping[str, Any]) -> CLIPModel:
    """A randomly initialised model from a configuration with embed_dim, vision_cfg, text_cfg, quick_gelu, custom_text.

    Raises:
        ValueError: towers that cannot be taken apart; of timm's that is said before their weights are drawn.
    """
    given = {key: config[key] for key in ("embed_dim", "text_cfg", "quick_gelu") if key in config}
    given["vision_cfg"] = untrained(config["vision_cfg"])
    kind = open_clip.CustomTextCLIP if config.get("custom_text") else open_clip.CLIP
    if "timm_model_name" in config["vision_cfg"]:
        with torch.device("meta"):
            backbone_of(kind(**given).visual)
    return kind(**given)


def text_of(clip: CLIPModel) -> nn.Module:
    """What holds the text tower of a model."""
    return clip if isinstance(clip, open_clip.CLIP) else clip.text


@undocumented(_PACKAGE)
def build_visual(config: Mapping[str, Any]) -> nn.Module:
    """The randomly initialised visual tower of a configuration; it needs no text_cfg."""
    no_text = {"context_length": 1, "vocab_size": 1, "width": 8, "heads": 1, "layers": 1}
    return build_clip({**config, "text_cfg": no_text}).visual


@undocumented(_PACKAGE)
def backbone_of(visual: nn.Module) -> Backbone:
    """A backbone over a visual tower of open_clip, its own or timm's.

    Raises:
        ValueError: see `visual_backbone` and `tempme_vl.backbones.timm.backbone_of`.
    """
    if isinstance(visual, VisionTransformer):
        return visual_backbone(visual)
    from tempme_vl.backbones import timm

    return timm.backbone_of(visual)[0]


@undocumented(_PACKAGE)
def preprocess_of(visual: nn.Module) -> Preprocessing:
    tower: Any = visual
    given = getattr(tower, "preprocess_cfg", {})
    return Preprocessing(
        tower.image_size[0],
        tuple(given.get("mean", CLIP_MEAN)),
        tuple(given.get("std", CLIP_STD)),
        given.get("resize_mode", "shortest"),
        given.get("interpolation", "bicubic"),
    )
