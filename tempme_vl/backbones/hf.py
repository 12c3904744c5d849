"""Vision towers of transformers: CLIP, SigLIP, SigLIP 2, DINOv2 (with registers), InternVL, InstructBLIP's.

`backbone_of` puts a `Backbone` over the very modules of a tower that exists, such as `model.video_tower` of a
video-language model: nothing is copied or changed, so the host works on next to it, both train the same parameters,
and LoRA added to the host is seen, because children are looked up when called. Raw parameters that the library keeps on
a module which is not called here as a whole (InternVL's `lambda_1`, SigLIP's `probe`) belong to a small module of ours
too.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Annotated, Any, Literal, cast

import torch
import transformers
from safetensors import SafetensorError
from torch import nn
from transformers import AutoConfig, AutoImageProcessor

from tempme_vl.backbones.base import (
    CLIP_MEAN,
    CLIP_STD,
    IMAGENET_MEAN,
    IMAGENET_STD,
    Backbone,
    BlockAdapter,
    Pool,
    Preprocessing,
    TowerConfig,
    TowerShape,
    count_blocks,
)
from tempme_vl.backbones.hf_blocks import (
    VERSION,
    CLIPLayer,
    Dinov2Layer,
    HFLayer,
    InternVLLayer,
    check_children,
    refusal,
)
from tempme_vl.backbones.hf_embed import ImageEmbed, PackedEmbed, SiglipPool
from tempme_vl.hub import require_hub
from tempme_vl.libraries import undocumented
from tempme_vl.schema import THEIR_LAYERS, Range, Size, check_plain
from tempme_vl.weights.exports import find_export, load_exported_tower

_HALF = (0.5, 0.5, 0.5)


@dataclass(frozen=True)
class _Family:
    """What differs between the families; its numbers of preprocessing hold where a folder gives none."""

    layer: type[HFLayer]
    norm: str
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    resize: Literal["shortest", "squash"]
    norm_pre: str | None = None
    siglip: bool = False  # no CLS token, attention pooling
    packed: bool = False  # the embeddings take patches

    @property
    def layers(self) -> str:
        """The encoder's only child."""
        return "layers" if self.layer is CLIPLayer else "layer"


_OPENAI: dict[str, Any] = {"mean": CLIP_MEAN, "std": CLIP_STD}
_IMAGENET: dict[str, Any] = {"mean": IMAGENET_MEAN, "std": IMAGENET_STD}
_CLIP = _Family(CLIPLayer, "post_layernorm", **_OPENAI, resize="shortest", norm_pre="pre_layrnorm")
_BLIP = _Family(CLIPLayer, "post_layernorm", **_OPENAI, resize="squash")
_SIGLIP = _Family(CLIPLayer, "post_layernorm", mean=_HALF, std=_HALF, resize="squash", siglip=True)
_SIGLIP2 = replace(_SIGLIP, packed=True)
_DINOV2 = _Family(Dinov2Layer, "layernorm", **_IMAGENET, resize="shortest")
_INTERNVL = _Family(InternVLLayer, "layernorm", **_IMAGENET, resize="squash")
# By class name, so that only the families in use are imported; the public class that builds each, and the family.
_TOWERS: dict[str, tuple[str, _Family]] = {
    "CLIPVisionModel": ("CLIPVisionModel", _CLIP),
    "CLIPVisionTransformer": ("CLIPVisionModel", _CLIP),
    "CLIPVisionModelWithProjection": ("CLIPVisionModelWithProjection", _CLIP),
    "SiglipVisionModel": ("SiglipVisionModel", _SIGLIP),
    "SiglipVisionTransformer": ("SiglipVisionModel", _SIGLIP),
    "Siglip2VisionModel": ("Siglip2VisionModel", _SIGLIP2),
    "Siglip2VisionTransformer": ("Siglip2VisionModel", _SIGLIP2),
    "Dinov2Model": ("Dinov2Model", _DINOV2),
    "Dinov2WithRegistersModel": ("Dinov2WithRegistersModel", _DINOV2),
    "InternVLVisionModel": ("InternVLVisionModel", _INTERNVL),
    "InstructBlipVideoVisionModel": ("InstructBlipVideoVisionModel", _BLIP),
}
# The class for a configuration's model_type; CLIP's depends on whether the weights have a projection.
_MODELS = {
    "clip": "CLIPVisionModelWithProjection",
    "clip_vision_model": "CLIPVisionModel",
    "siglip": "SiglipVisionModel",
    "siglip_vision_model": "SiglipVisionModel",
    "siglip2": "Siglip2VisionModel",
    "siglip2_vision_model": "Siglip2VisionModel",
    "dinov2": "Dinov2Model",
    "dinov2_with_registers": "Dinov2WithRegistersModel",
    "internvl_vision": "InternVLVisionModel",
}


@undocumented("transformers")
def backbone_of(
    tower: nn.Module, layer: int = -1, image_size: int | None = None
) -> tuple[Backbone, TowerConfig | None]:
    """A backbone over the modules of an existing vision tower, which stays as it is.

    Args:
        tower: a vision model of transformers; a timm one inside transformers goes to `backbones.timm`.
        layer: the hidden state that becomes `FrontendOutput.tokens`, numbered as in the host's `hidden_states` (and
            `vision_feature_layer`): -1 is behind all blocks, -2 behind all but the last, which is not run then. The
            final norm belongs to the last block, so `norm` and `head` do nothing for an earlier layer; for the last
            one, a host that wants normed tokens calls `frontend.norm` on them.
        image_size: pixels of the square frames, where they are not the tower's own; its positions are interpolated by
            the library, as the host does it.

    Returns:
        the backbone, and the configuration that builds the tower again (`build_tower`), as far as timm tells it.

    Raises:
        ValueError: a family that is not known, that rotates by position or attends in windows; unknown children;
            images that are not square.
    """
    if hasattr(tower, "timm_model"):
        if image_size is not None:
            raise ValueError("a timm tower's image size is fixed when it is built; leave image_size out")
        from tempme_vl.backbones import timm as timm_towers

        return timm_towers.backbone_of(cast(nn.Module, tower.timm_model), layer)
    if type(tower).__name__ not in _TOWERS:
        raise ValueError(refusal(tower, _TOWERS))
    architecture, family = _TOWERS[type(tower).__name__]
    inner: Any = getattr(tower, "vision_model", tower)  # nested in transformers 4, and where a projection follows
    config: Any = tower.config
    if inner is not tower:
        check_children(tower, {"vision_model", *({"visual_projection"} if "Projection" in architecture else ())})
    optional = {"head"} if family.siglip and hasattr(inner, "head") else set()
    check_children(
        inner, {"embeddings", "encoder", family.norm, *optional} | ({family.norm_pre} if family.norm_pre else set())
    )
    check_children(inner.encoder, {family.layers})
    layers = list(getattr(inner.encoder, family.layers))
    count = count_blocks(layer, len(layers))
    blocks: list[BlockAdapter] = [family.layer(block, config) for block in layers[:count]]
    norm, pool, head = _output(tower, inner, family, whole=count == len(layers))

    own_size, patch_size = _image_size(config, family), _square(config.patch_size, "patches")
    shape = TowerShape(
        image_size=image_size or own_size,
        patch_size=patch_size,
        width=config.hidden_size,
        heads=config.num_attention_heads,
        embed_dim=getattr(head, "out_features", config.hidden_size),
        mlp_ratio=getattr(config, "mlp_ratio", 0) or config.intermediate_size / config.hidden_size,
        quick_gelu=config.hidden_act == "quick_gelu",
        norm_pre=family.norm_pre is not None,
        num_prefix=0 if family.siglip else 1 + getattr(config, "num_register_tokens", 0),
        pool=pool,
    )
    embed = _embed(inner, family, shape, interpolate=shape.image_size != own_size)
    return Backbone(embed, blocks, norm, head, shape), _config(architecture, config, family, layer, shape)


def _embed(inner: Any, family: _Family, shape: TowerShape, interpolate: bool) -> nn.Module:
    if family.packed:
        if shape.image_size % shape.patch_size:
            raise ValueError(
                f"SigLIP 2 takes whole patches of {shape.patch_size} px; got image_size={shape.image_size}"
            )
        return PackedEmbed(inner.embeddings, shape.patch_size)
    # the other families interpolate without being asked
    options = {"interpolate_pos_encoding": True} if interpolate and family.layer is CLIPLayer else {}
    return ImageEmbed(inner.embeddings, getattr(inner, family.norm_pre) if family.norm_pre else nn.Identity(), options)


def _output(tower: Any, inner: Any, family: _Family, whole: bool) -> tuple[nn.Module, Pool, nn.Module]:
    """The final norm, how frames are pooled, and the head; for an earlier layer they do nothing."""
    pool: Pool = "mean" if family.siglip or getattr(tower.config, "use_mean_pooling", False) else "cls"
    if not whole:
        return nn.Identity(), pool, nn.Identity()
    norm = getattr(inner, family.norm)
    if family.siglip and hasattr(inner, "head"):
        return norm, "attention", SiglipPool(inner.head)
    return norm, pool, getattr(tower, "visual_projection", nn.Identity())


def _square(value: Any, what: str) -> int:
    sides = set(value) if isinstance(value, (list, tuple)) else {value}
    if len(sides) != 1:
        raise ValueError(f"expected a tower for square {what}; this one takes {tuple(value)} px")
    return sides.pop()


def _image_size(config: Any, family: _Family) -> int:
    if not family.packed:
        return _square(config.image_size, "images")
    side = round(config.num_patches**0.5)
    return side * _square(config.patch_size, "patches")


# ---- configurations and weights


@dataclass(frozen=True, kw_only=True)
class Config(TowerConfig):
    """What builds a tower; `vision_config` is transformers' own."""

    family: Literal["hf"] = "hf"
    architecture: str
    vision_config: Mapping[str, Any]
    layer: Annotated[int, Range(-1000, 1000)]
    image_size: Size

    def __post_init__(self) -> None:
        known = sorted({architecture for architecture, _ in _TOWERS.values()})
        if self.architecture not in known:
            raise ValueError(f"'architecture': expected one of {', '.join(known)}; got {self.architecture!r}")
        check_plain(self.vision_config, "'vision_config'", THEIR_LAYERS)


def _config(architecture: str, config: Any, family: _Family, layer: int, shape: TowerShape) -> Config:
    vision_config = json.loads(config.to_json_string(use_diff=False))
    vision_config.pop("_name_or_path", None)
    interpolation: Literal["bicubic", "bilinear"] = "bilinear" if family.packed else "bicubic"
    preprocess = Preprocessing(shape.image_size, family.mean, family.std, family.resize, interpolation)
    return Config(
        architecture=architecture,
        vision_config=vision_config,
        layer=layer,
        image_size=shape.image_size,
        preprocess=preprocess,
    )


def read_config(name: str) -> Any:
    """transformers' configuration of a hub id or folder.

    Raises:
        ValueError: there is none.
    """
    try:
        require_hub(name)
        return AutoConfig.from_pretrained(name, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise ValueError(f"transformers finds no configuration for {name!r}, a hub id or a folder: {error}") from error


def _read_tower_config(name: str) -> tuple[str, Any]:
    """The class and the vision configuration of a hub id or folder."""
    config = read_config(name)
    if config.model_type not in _MODELS:
        raise ValueError(
            f"{name!r} is a {config.model_type!r} of {VERSION}; expected one of {', '.join(_MODELS)}. For a "
            "video-language model, load it and give its vision tower to tempme_vl.backbones.hf.backbone_of; for a timm "
            "model, use 'timm:NAME'"
        )
    architecture = _MODELS[config.model_type]
    if "CLIPVisionModelWithProjection" in (config.architectures or []):
        architecture = "CLIPVisionModelWithProjection"
    if not hasattr(config, "vision_config"):
        return architecture, config
    vision = config.vision_config
    if hasattr(config, "projection_dim"):  # a whole CLIP's own number counts, and may differ from its tower's
        vision.projection_dim = config.projection_dim
    return architecture, vision


def read_preprocess(name: str, default: Preprocessing) -> Preprocessing:
    """The numbers of the folder's own image processor, where it has one."""
    try:
        given = AutoImageProcessor.from_pretrained(name, trust_remote_code=False).to_dict()
    except (OSError, ValueError):
        return default
    ways: dict[Any, Literal["bicubic", "bilinear"]] = {2: "bilinear", 3: "bicubic"}
    return replace(
        default,
        mean=tuple(given.get("image_mean") or default.mean),
        std=tuple(given.get("image_std") or default.std),
        interpolation=ways.get(given.get("resample"), default.interpolation),
    )


def load_model(architecture: str, config: Any, source: str) -> nn.Module:
    """A model of a class of transformers, float32, from a hub id or folder.

    Raises:
        ValueError: no safetensors, or weights that lack some of the model's.
    """
    model_class = getattr(transformers, architecture)
    try:
        model, info = model_class.from_pretrained(
            source,
            config=config,
            use_safetensors=True,
            dtype=torch.float32,
            trust_remote_code=False,
            output_loading_info=True,
        )
    except (OSError, RuntimeError, SafetensorError) as error:
        raise ValueError(f"no safetensors of a {architecture} can be loaded from {source!r}: {error}") from error
    missing = sorted(info["missing_keys"])
    if missing:
        raise ValueError(f"{source!r} lacks {len(missing)} weights of a {architecture}: {', '.join(missing[:5])}, ...")
    return model


def load_tower(
    name: str, pretrained: str | None, num_frames: int, layer: int = -1, image_size: int | None = None
) -> tuple[Backbone, TowerConfig]:
    """A tower by name, float32, with its configuration.

    Args:
        name: a hub id or a local folder with config.json, of the vision tower or of the whole CLIP or SigLIP.
        pretrained: None for random weights on that configuration; "default" for the weights of the same name; or
            another hub id or folder, also one that this package wrote. Only safetensors are read.
        layer, image_size: see `backbone_of`.

    Raises:
        ValueError: another family, weights that are missing or not safetensors, or see `backbone_of`.
    """
    architecture, settings = _read_tower_config(name)
    export = None if pretrained in (None, "default") else find_export(str(pretrained))
    if pretrained is None or export:
        tower = getattr(transformers, architecture)(settings)
    else:
        tower = load_model(architecture, settings, name if pretrained == "default" else pretrained)
    backbone, built = backbone_of(tower, layer, image_size)
    config = with_own_preprocess(name, built)
    if export:
        backbone.clip_positions = load_exported_tower(backbone, config, export)
    return backbone, config


def with_own_preprocess(name: str, config: TowerConfig | None) -> TowerConfig:
    """A tower's configuration with the preprocessing of the folder that it comes from."""
    assert config is not None  # timm's towers are no models of transformers' own
    return replace(config, preprocess=read_preprocess(name, config.preprocess))


def build_tower(config: Config) -> Backbone:
    """The backbone of a configuration, randomly initialised, without looking anything up."""
    model_class = getattr(transformers, config.architecture)
    vision_config = dict(config.vision_config)  # transformers up to 5.0 write into what they are given
    tower = model_class(model_class.config_class.from_dict(vision_config))
    return backbone_of(tower, config.layer, config.image_size)[0]
