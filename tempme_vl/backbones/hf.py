"""Vision towers of transformers: CLIP, SigLIP, SigLIP 2, DINOv2 (with registers), InternVL, InstructBLIP's.

`backbone_of` puts a `Backbone` over the very modules of a tower that exists, such as `model.video_tower` of a
video-language model: nothing is copied or changed, so the host works on next to it, both train the same parameters,
and LoRA added to the host is seen, because children are looked up when called. Raw parameters that the library keeps on
a module which is not called here as a whole (InternVL's `lambda_1`, SigLIP's `probe`) belong to a small module of ours
too.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar, cast

import torch
import transformers
from open_clip.constants import IMAGENET_MEAN, IMAGENET_STD, OPENAI_DATASET_MEAN, OPENAI_DATASET_STD
from torch import Tensor, nn
from transformers import AutoConfig, AutoImageProcessor

from tempme_vl.backbones import timm as timm_towers
from tempme_vl.backbones.base import Backbone, BlockAdapter, Pool, TowerShape, attend, count_blocks

_HALF = (0.5, 0.5, 0.5)


def _version() -> str:
    return f"transformers {transformers.__version__}"


def _expect(module: nn.Module, children: set[str], parameters: Collection[str] = ()) -> None:
    """Raises:
    ValueError: a module with other children, or other parameters of its own, than these.
    """
    found = {name for name, _ in module.named_children()}
    own = {name for name, _ in module.named_parameters(recurse=False)}
    if found != children or own != set(parameters):
        raise ValueError(
            f"expected a {type(module).__name__} of {sorted({*children, *parameters})}; got {sorted(found | own)} "
            f"({_version()}): a change of the library, or a modified tower, which needs an adapter of its own"
        )


# ---- blocks


@dataclass(frozen=True)
class _Names:
    """Names of an attention's children: q, k and v (or one for all three), what follows attention, qk-norms."""

    qkv: tuple[str, ...]
    out: tuple[str, ...]
    norms: tuple[str, ...] = ()

    def children(self) -> set[str]:
        """Those of the attention itself, whose projections may lie one level deeper."""
        return {name.split(".")[0] for name in (*self.qkv, *self.out, *self.norms)}


_ATTENTIONS = (
    _Names(("q_proj", "k_proj", "v_proj"), ("out_proj",)),  # CLIP, SigLIP
    _Names(("q_proj", "k_proj", "v_proj"), ("o_proj",)),  # DINOv2 of transformers 5
    _Names(("attention.query", "attention.key", "attention.value"), ("output.dense", "output.dropout")),  # and of 4
    _Names(
        ("q_proj", "k_proj", "v_proj"), ("projection_layer", "projection_dropout"), ("q_norm", "k_norm")
    ),  # InternVL
    _Names(("qkv",), ("projection",)),  # InstructBLIP
)


class HFLayer(BlockAdapter):
    """A layer of transformers, held as it is.

    Raises:
        ValueError: a layer or an attention that is not built of known children.
    """

    children_: ClassVar[set[str]]
    parameters_: ClassVar[set[str]] = set()
    attention: ClassVar[str] = "attention"
    layer: Any

    def __init__(self, layer: nn.Module, config: Any):
        super().__init__()
        _expect(layer, self.children_, self.parameters_)
        attention: Any = layer.get_submodule(self.attention)
        found = {name for name, _ in attention.named_children()}
        known = [names for names in _ATTENTIONS if names.children() == found]
        if not known:
            raise ValueError(f"unknown {type(attention).__name__} of {sorted(found)} ({_version()})")
        self.layer, self.names, self.heads = layer, known[0], config.num_attention_heads
        inner = getattr(attention, "attention", attention)
        self.scale: float | None = getattr(inner, "scale", getattr(inner, "scaling", None))
        self.dropout: float = getattr(config, "attention_dropout", getattr(config, "attention_probs_dropout_prob", 0.0))

    def attend(self, x: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
        """(R, N, D) normed tokens -> attention's output (R, N, D), keys after their norm (R, heads, N, D_head)."""
        attention, names = self.layer.get_submodule(self.attention), self.names
        projected = [attention.get_submodule(name)(x) for name in names.qkv]
        q, k, v = projected if len(projected) == 3 else projected[0].chunk(3, dim=-1)
        if names.norms:
            q, k = attention.get_submodule(names.norms[0])(q), attention.get_submodule(names.norms[1])(k)
        q, k, v = (t.unflatten(-1, (self.heads, -1)).transpose(1, 2) for t in (q, k, v))
        x = attend(q, k, v, bias, self.dropout if attention.training else 0.0, self.scale)
        for name in names.out:
            x = attention.get_submodule(name)(x)
        return x, k


class ClipLayer(HFLayer):
    """CLIP, SigLIP, SigLIP 2, InstructBLIP: nothing but norms, attention and MLP."""

    children_: ClassVar = {"layer_norm1", "self_attn", "layer_norm2", "mlp"}
    attention = "self_attn"

    def attention_branch(self, x: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
        return self.attend(self.layer.layer_norm1(x), bias)

    def mlp_branch(self, x: Tensor) -> Tensor:
        return self.layer.mlp(self.layer.layer_norm2(x))


class Dinov2Layer(HFLayer):
    """DINOv2, with or without registers: LayerScale and DropPath as modules."""

    children_: ClassVar = {"norm1", "attention", "layer_scale1", "drop_path", "norm2", "mlp", "layer_scale2"}

    def attention_branch(self, x: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
        delta, keys = self.attend(self.layer.norm1(x), bias)
        return self.layer.drop_path(self.layer.layer_scale1(delta)), keys

    def mlp_branch(self, x: Tensor) -> Tensor:
        return self.layer.drop_path(self.layer.layer_scale2(self.layer.mlp(self.layer.norm2(x))))


class Scale(nn.Module):
    """LayerScale on a parameter that exists: (..., D) -> (..., D)."""

    def __init__(self, weight: nn.Parameter):
        super().__init__()
        self.weight = weight

    def forward(self, x: Tensor) -> Tensor:
        return self.weight * x


class InternVLLayer(HFLayer):
    """InternVL's ViT: LayerScale as raw parameters of the layer, qk-norm over all heads together."""

    children_: ClassVar = {"attention", "mlp", "layernorm_before", "layernorm_after", "dropout"}
    parameters_: ClassVar = {"lambda_1", "lambda_2"}

    def __init__(self, layer: nn.Module, config: Any):
        super().__init__(layer, config)
        self.layer = nn.ModuleDict(dict(layer.named_children()))
        scales: Any = layer
        self.scale_1, self.scale_2 = Scale(scales.lambda_1), Scale(scales.lambda_2)

    def attention_branch(self, x: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
        delta, keys = self.attend(self.layer.layernorm_before(x), bias)
        return self.scale_1(delta), keys

    def mlp_branch(self, x: Tensor) -> Tensor:
        return self.scale_2(self.layer.dropout(self.layer.mlp(self.layer.layernorm_after(x))))


# ---- embedding and pooling


class ImageEmbed(nn.Module):
    """The tower's own embeddings and the norm behind them, if any: (R, 3, H, W) -> (R, N, D).

    Args:
        options: further keywords of the embeddings' forward.
    """

    def __init__(self, embeddings: nn.Module, norm_pre: nn.Module, options: dict[str, Any]):
        super().__init__()
        self.embeddings, self.norm_pre, self.options = embeddings, norm_pre, options

    def forward(self, images: Tensor) -> Tensor:
        return self.norm_pre(self.embeddings(images, **self.options))


class PackedEmbed(nn.Module):
    """SigLIP 2's (NaFlex) embeddings, which take patches and not images: (R, 3, H, W) -> (R, N, D)."""

    def __init__(self, embeddings: nn.Module, patch_size: int):
        super().__init__()
        self.embeddings, self.patch_size = embeddings, patch_size

    def forward(self, images: Tensor) -> Tensor:
        p = self.patch_size
        patches = images.unflatten(3, (-1, p)).unflatten(2, (-1, p))  # (R, 3, rows, p, columns, p)
        rows, columns = patches.shape[2], patches.shape[4]
        patches = patches.permute(0, 2, 4, 3, 5, 1).flatten(3).flatten(1, 2)
        # all images have one shape, so their positions are resized once and broadcast
        return self.embeddings(patches, torch.tensor([[rows, columns]]))


class SiglipPool(nn.Module):
    """SigLIP's attention pooling: (R, n, D) normed tokens and their sizes (R, n, 1) -> (R, D)."""

    def __init__(self, head: Any):
        super().__init__()
        _expect(head, {"attention", "layernorm", "mlp"}, {"probe"})
        self.attention, self.layernorm, self.mlp, self.probe = head.attention, head.layernorm, head.mlp, head.probe

    def forward(self, x: Tensor, size: Tensor | None) -> Tensor:
        bias = None
        if size is not None:
            bias = size.log().to(x.dtype).transpose(1, 2).repeat_interleave(self.attention.num_heads, dim=0)
        probe = self.probe.to(x.dtype).expand(len(x), -1, -1)
        x = self.attention(probe, x, x, attn_mask=bias)[0]
        return (x + self.mlp(self.layernorm(x)))[:, 0]


# ---- towers


@dataclass(frozen=True)
class _Family:
    """What differs between the families; its numbers of preprocessing hold where a folder gives none."""

    layer: type[HFLayer]
    norm: str
    mean: tuple[float, ...]
    std: tuple[float, ...]
    resize: str
    norm_pre: str | None = None
    siglip: bool = False  # no CLS token, attention pooling
    packed: bool = False  # the embeddings take patches

    @property
    def layers(self) -> str:
        """The encoder's only child."""
        return "layers" if self.layer is ClipLayer else "layer"


_OPENAI = {"mean": OPENAI_DATASET_MEAN, "std": OPENAI_DATASET_STD}
_IMAGENET = {"mean": IMAGENET_MEAN, "std": IMAGENET_STD}
_CLIP = _Family(ClipLayer, "post_layernorm", **_OPENAI, resize="shortest", norm_pre="pre_layrnorm")
_BLIP = _Family(ClipLayer, "post_layernorm", **_OPENAI, resize="squash")
_SIGLIP = _Family(ClipLayer, "post_layernorm", mean=_HALF, std=_HALF, resize="squash", siglip=True)
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


def backbone_of(tower: nn.Module, layer: int = -1, image_size: int | None = None) -> tuple[Backbone, dict[str, Any]]:
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
        the backbone, and the JSON configuration that builds the tower again (`build_tower`).

    Raises:
        ValueError: a family that is not known, that rotates by position or attends in windows; unknown children;
            images that are not square.
    """
    if hasattr(tower, "timm_model"):
        if image_size is not None:
            raise ValueError("a timm tower's image size is fixed when it is built; leave image_size out")
        return timm_towers.backbone_of(cast(nn.Module, tower.timm_model), layer)
    if type(tower).__name__ not in _TOWERS:
        raise ValueError(_refusal(tower))
    architecture, family = _TOWERS[type(tower).__name__]
    inner: Any = getattr(tower, "vision_model", tower)  # nested in transformers 4, and where a projection follows
    config: Any = tower.config
    if inner is not tower:
        _expect(tower, {"vision_model", *({"visual_projection"} if "Projection" in architecture else ())})
    optional = {"head"} if family.siglip and hasattr(inner, "head") else set()
    _expect(
        inner, {"embeddings", "encoder", family.norm, *optional} | ({family.norm_pre} if family.norm_pre else set())
    )
    _expect(inner.encoder, {family.layers})
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
    return Backbone(embed, blocks, norm, head, shape), _json_config(architecture, config, family, layer, shape)


def _embed(inner: Any, family: _Family, shape: TowerShape, interpolate: bool) -> nn.Module:
    if family.packed:
        if shape.image_size % shape.patch_size:
            raise ValueError(
                f"SigLIP 2 takes whole patches of {shape.patch_size} px; got image_size={shape.image_size}"
            )
        return PackedEmbed(inner.embeddings, shape.patch_size)
    # the other families interpolate without being asked
    options = {"interpolate_pos_encoding": True} if interpolate and family.layer is ClipLayer else {}
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


def _refusal(tower: nn.Module) -> str:
    """Why a tower of an unknown class is refused, and what to use instead."""
    name = type(tower).__name__
    words = {word.lower() for key, module in tower.named_modules() for word in (key, type(module).__name__)}
    rotary = any("rotary" in word or "rope" in word for word in words)
    windows = any("window" in word or "swin" in word for word in words)
    windows = windows or getattr(getattr(tower, "config", None), "window_size", None) is not None
    if rotary or windows:
        why = "rotates queries and keys by position" if rotary else "attends within windows"
        why += (
            ", and a merged token has no single position" if rotary else " of neighbouring tokens, which merging breaks"
        )
        instead = "keep this tower whole and merge the tokens that it gives, behind it"
    else:
        why = "is no family that is known here"
        instead = (
            "pass the vision tower itself (such as model.video_tower), or add its blocks as docs/add_a_backbone.md says"
        )
    return (
        f"{name} ({_version()}) {why}: {instead}; towers that can merge inside: {', '.join(dict.fromkeys(_TOWERS))}, "
        "and timm's VisionTransformer"
    )


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


def _json_config(architecture: str, config: Any, family: _Family, layer: int, shape: TowerShape) -> dict[str, Any]:
    vision_config = json.loads(config.to_json_string(use_diff=False))
    vision_config.pop("_name_or_path", None)
    return {
        "family": "hf",
        "architecture": architecture,
        "vision_config": vision_config,
        "layer": layer,
        "image_size": shape.image_size,
        "preprocess": {
            "image_size": shape.image_size,
            "mean": list(family.mean),
            "std": list(family.std),
            "resize": family.resize,
            "interpolation": "bilinear" if family.packed else "bicubic",
        },
    }


def _read_config(name: str) -> tuple[str, Any]:
    """The class and the vision configuration of a hub id or folder."""
    try:
        config = AutoConfig.from_pretrained(name)
    except (OSError, ValueError) as error:
        raise ValueError(f"transformers finds no configuration for {name!r}, a hub id or a folder: {error}") from error
    if config.model_type not in _MODELS:
        raise ValueError(
            f"{name!r} is a {config.model_type!r} of {_version()}; expected one of {', '.join(_MODELS)}. For a "
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


def _preprocess(name: str, default: dict[str, Any]) -> dict[str, Any]:
    """The numbers of the folder's own image processor, where it has one."""
    try:
        given = AutoImageProcessor.from_pretrained(name).to_dict()
    except (OSError, ValueError):
        return default
    interpolation = {2: "bilinear", 3: "bicubic"}.get(given.get("resample"), default["interpolation"])
    mean, std = given.get("image_mean") or default["mean"], given.get("image_std") or default["std"]
    return {**default, "mean": list(mean), "std": list(std), "interpolation": interpolation}


def _load(architecture: str, config: Any, source: str) -> nn.Module:
    """Raises:
    ValueError: no safetensors, or weights that lack some of the tower's.
    """
    model_class = getattr(transformers, architecture)
    try:
        model, info = model_class.from_pretrained(
            source, config=config, use_safetensors=True, dtype=torch.float32, output_loading_info=True
        )
    except (OSError, RuntimeError) as error:
        raise ValueError(f"no safetensors of a {architecture} can be loaded from {source!r}: {error}") from error
    missing = sorted(info["missing_keys"])
    if missing:
        raise ValueError(f"{source!r} lacks {len(missing)} weights of a {architecture}: {', '.join(missing[:5])}, ...")
    return model


TOWER_OPTIONS = ("layer", "image_size")


def load_tower(
    name: str, pretrained: str | None, num_frames: int, layer: int = -1, image_size: int | None = None
) -> tuple[Backbone, dict[str, Any]]:
    """A tower by name, float32, with its JSON configuration.

    Args:
        name: a hub id or a local folder with config.json, of the vision tower or of the whole CLIP or SigLIP.
        pretrained: None for random weights on that configuration; "default" for the weights of the same name; or
            another hub id or folder. Only safetensors are read.
        layer, image_size: see `backbone_of`.

    Raises:
        ValueError: another family, weights that are missing or not safetensors, or see `backbone_of`.
    """
    architecture, config = _read_config(name)
    if pretrained is None:
        tower = getattr(transformers, architecture)(config)
    else:
        tower = _load(architecture, config, name if pretrained == "default" else pretrained)
    backbone, data = backbone_of(tower, layer, image_size)
    return backbone, {**data, "preprocess": _preprocess(name, data["preprocess"])}


def build_tower(config: Mapping[str, Any]) -> Backbone:
    """The backbone of a JSON configuration, randomly initialised, without looking anything up."""
    model_class = getattr(transformers, config["architecture"])
    tower = model_class(model_class.config_class.from_dict(config["vision_config"]))
    return backbone_of(tower, config["layer"], config["image_size"])[0]
