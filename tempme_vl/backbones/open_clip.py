"""Models of open_clip and OpenAI: by name, with weights from a tag or a file in any layout, or from a state dict.

CLIP's towers are taken apart in `open_clip_blocks`; layouts stand in `clip_checkpoint`, which also gives weights their
public names back, bit for bit. A visual tower may be timm's, and a model may have a text tower of its own (SigLIP):
such models are called mixed here, and their files have open_clip's own layout.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeAlias

import open_clip
import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from tempme_vl.backbones.base import CLIP_MEAN, CLIP_STD, Backbone, Preprocessing, TowerConfig, square_side
from tempme_vl.backbones.clip_checkpoint import VISUAL, ClipWeights, name_clip, read_clip
from tempme_vl.backbones.open_clip_blocks import tower_shape, visual_backbone
from tempme_vl.fit import load_strictly, misfits
from tempme_vl.hub import require_hub
from tempme_vl.libraries import undocumented
from tempme_vl.messages import few
from tempme_vl.schema import LAYERS, LEFT_OUT, SIZE, ConfigError, Range, Size, read
from tempme_vl.weights.exports import Export, find_export, load_exported_tower
from tempme_vl.weights.files import read_weights

_PACKAGE = "open_clip_torch"
with undocumented(_PACKAGE):
    from open_clip.transformer import VisionTransformer

Clip: TypeAlias = open_clip.CLIP | open_clip.CustomTextCLIP

# Small towers for the embedded data set and for tests; everything else comes from open_clip's own configurations.
TINY_CONFIGS: dict[str, dict[str, Any]] = {
    "tiny": {
        "embed_dim": 64,
        "vision_cfg": {"image_size": 32, "layers": 6, "width": 64, "head_width": 16, "patch_size": 8},
        "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 64, "heads": 4, "layers": 2},
    },
}

_log = logging.getLogger(__name__)


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


class LoadedClip(NamedTuple):
    """A model, the configuration that builds it again, and what else came with its weights.

    Attributes:
        clip_positions: by layer.
        export: a folder of this package whose weights a mixed model still needs (`load_export`, `load_exported_rest`).
    """

    clip: Clip
    config: Config
    clip_positions: dict[str, Tensor]
    export: Export | None = None


def load_clip(name: str, pretrained: str | None = None) -> LoadedClip:
    """A model, both towers.

    Args:
        name: an open_clip model such as "ViT-B-16-quickgelu" or "ViT-B-16-SigLIP", or "tiny".
        pretrained: None for random weights; a tag such as "openai" or "laion2b_s34b_b79k"; or a file or folder in any
            layout of `clip_checkpoint.read_clip`, from which all of the model's weights are taken, as float32; of a
            mixed model in open_clip's own layout, or a folder of this package.

    Raises:
        ValueError: see `model_config` and `read_clip`; or weights that do not fit the model.
    """
    if pretrained is None or _is_tag(name, pretrained):
        return _load_named(name, pretrained)
    if is_mixed(model_config(name)):
        return _load_mixed(name, pretrained)
    weights = read_clip(pretrained)
    if not weights.text:
        raise ValueError(f"{weights.source}, {weights.layout}, holds no text tower, which {name!r} has")
    config = _as_trained(name, weights, with_text=True)
    clip = build_clip(config)
    _load_fitting(clip, _whole(weights), weights, name)
    return LoadedClip(clip, _saved_config(name, config, clip.visual, weights), weights.clip_positions)


def _load_mixed(name: str, path: str) -> LoadedClip:
    """Raises:
    ValueError: see `read_weights`; or weights that are missing, unknown or of other shapes.
    """
    loaded = _load_named(name, None)
    if export := find_export(path):
        preprocess = export.frontend_setting("preprocess", Preprocessing)
        return loaded._replace(config=replace(loaded.config, preprocess=preprocess), export=export)
    file = read_weights(path)
    state = {key.removeprefix("module."): value for key, value in file.state.items()}
    unused = [key for key in state if key in ("logit_bias", "text.attn_mask", "attn_mask")]
    given = {key: value for key, value in state.items() if key not in unused}
    if "logit_scale" in given:
        given["logit_scale"] = given["logit_scale"].reshape(())
    load_strictly(loaded.clip, given, f"{path} ({file.kind})")
    _log.info("%s: %s, %d weights of %s; unused: %s", path, file.kind, len(given), name, few(unused) or "nothing")
    return loaded


@undocumented(_PACKAGE)
def _load_named(name: str, tag: str | None) -> LoadedClip:
    config = model_config(name)
    if tag is None:
        clip = build_clip(config)
        if name in TINY_CONFIGS:  # from scratch within minutes: places must stand out from the start (docs/LOG.md)
            nn.init.normal_(clip.visual.positional_embedding, std=0.5)
        return LoadedClip(clip, _saved_config(name, config, clip.visual), {})
    published: dict[str, Any] = open_clip.get_pretrained_cfg(name, tag)
    if repo := published.get("hf_hub", "").rstrip("/"):
        require_hub(repo, "open_clip_model.safetensors", "open_clip_pytorch_model.bin")
    quick_gelu = bool(published.get("quick_gelu"))
    try:
        # the activation is that of the weights: open_clip itself would only warn of another one
        clip = open_clip.create_model(name, pretrained=tag, force_quick_gelu=quick_gelu)
    except (OSError, RuntimeError, SafetensorError) as error:
        raise ValueError(f"open_clip cannot load pretrained={tag!r} for {name!r}: {error}") from error
    if quick_gelu != bool(config.get("quick_gelu")):
        _log.info("%s of %s was trained with %s, which is used", tag, name, _activation(quick_gelu))
    return LoadedClip(clip, _saved_config(name, config, clip.visual), {})


def _is_tag(name: str, pretrained: str) -> bool:
    """Whether it is one of the model's tags in open_clip, and not a path.

    Raises:
        ValueError: neither; the message lists the tags.
    """
    model_config(name)
    if open_clip.get_pretrained_cfg(name, pretrained):
        return True
    if Path(pretrained).exists():
        return False
    if name in TINY_CONFIGS:
        raise ValueError(
            f"the built-in model {name!r} has no pretrained weights, and {pretrained!r} is no file or folder; leave "
            "pretrained out"
        )
    tags = open_clip.list_pretrained_tags_by_model(name)
    raise ValueError(
        f"open_clip cannot load pretrained={pretrained!r} for {name!r}: expected one of its tags "
        f"({', '.join(tags) or 'it has none'}) or the path of weights, and there is no such file or folder"
    )


def _as_trained(name: str, weights: ClipWeights, with_text: bool) -> dict[str, Any]:
    """The model's configuration with the activation that the weights were trained with.

    Raises:
        ValueError: weights of towers with another number of heads.
    """
    config = model_config(name)
    vision_cfg, text_cfg = config["vision_cfg"], config["text_cfg"]
    heads = vision_cfg["width"] // vision_cfg.get("head_width", 64), text_cfg.get("heads", 8)
    towers = list(zip(("visual", "text"), weights.heads, heads, strict=True))
    for tower, theirs, ours in towers if with_text else towers[:1]:
        if theirs not in (None, ours):
            raise ValueError(
                f"{weights.source}, {weights.layout}, does not fit {name!r}: its {tower} tower has {theirs} heads "
                f"instead of {ours}"
            )
    own = bool(config.get("quick_gelu"))
    quick_gelu = own if weights.quick_gelu is None else weights.quick_gelu
    _log.info("%s", weights.describe(with_text))
    if weights.quick_gelu is None:
        _log.info("the file does not tell its activation; %s is taken, as in %s", _activation(own), name)
    elif quick_gelu != own:
        _log.info("these weights were trained with %s, which is used; %s has another", _activation(quick_gelu), name)
    return {**config, "quick_gelu": quick_gelu}


def _activation(quick_gelu: bool) -> str:
    return "QuickGELU" if quick_gelu else "GELU"


def _load_fitting(module: nn.Module, state: dict[str, Tensor], weights: ClipWeights, name: str) -> None:
    """Raises:
    ValueError: weights that are missing, unknown, of other shapes or no finite numbers; it says whose they may be.
    """
    if trouble := misfits(module.state_dict(), state):
        alike = _models_like(weights.tower)
        looks = f"it looks like {few(alike)}" if alike else "no ViT of open_clip has its sizes"
        raise ValueError(f"{weights.source}, {weights.layout}, does not fit {name!r}: {trouble}; {looks}")
    module.load_state_dict(state)


def _models_like(visual: Mapping[str, Tensor]) -> list[str]:
    """Names of open_clip's models with visual towers of the same sizes."""
    try:
        found = _sizes(visual)
    except (ValueError, IndexError):  # not even a ViT
        return []
    names = []
    for name in [*TINY_CONFIGS, *(n for n in open_clip.list_models() if n.startswith("ViT-"))]:
        try:
            config = model_config(name)
        except ValueError:
            continue
        vision = config["vision_cfg"]
        if is_mixed(config):
            continue
        if all(vision.get(key, found[key]) == found[key] for key in ("image_size", "patch_size", "width", "layers")):
            names.append(name)
    return names


def _saved_config(
    name: str, config: Mapping[str, Any], visual: nn.Module, weights: ClipWeights | None = None
) -> Config:
    return Config(
        name=name,
        embed_dim=config["embed_dim"],
        vision_cfg=_untrained(config["vision_cfg"]),
        text_cfg=config["text_cfg"],
        # what was built counts, not the name
        quick_gelu=bool(config.get("quick_gelu")) if is_mixed(config) else tower_shape(visual).quick_gelu,
        custom_text=bool(config.get("custom_text")),
        preprocess=weights.preprocess if weights and weights.preprocess else _preprocess(visual),
    )


def _untrained(vision_cfg: Mapping[str, Any]) -> dict[str, Any]:
    """A tower's configuration without weights of timm, which would be looked for on its hub."""
    return {**vision_cfg, **({"timm_model_pretrained": False} if "timm_model_name" in vision_cfg else {})}


@undocumented(_PACKAGE)
def build_clip(config: Mapping[str, Any]) -> Clip:
    """A randomly initialised model from a configuration with embed_dim, vision_cfg, text_cfg, quick_gelu, custom_text.

    Raises:
        ValueError: towers that cannot be taken apart; of timm's that is said before their weights are drawn.
    """
    given = {key: config[key] for key in ("embed_dim", "text_cfg", "quick_gelu") if key in config}
    given["vision_cfg"] = _untrained(config["vision_cfg"])
    kind = open_clip.CustomTextCLIP if config.get("custom_text") else open_clip.CLIP
    if "timm_model_name" in config["vision_cfg"]:
        with torch.device("meta"):
            backbone_of(kind(**given).visual)
    return kind(**given)


def text_of(clip: Clip) -> nn.Module:
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
def _preprocess(visual: nn.Module) -> Preprocessing:
    tower: Any = visual
    given = getattr(tower, "preprocess_cfg", {})
    return Preprocessing(
        tower.image_size[0],
        tuple(given.get("mean", CLIP_MEAN)),
        tuple(given.get("std", CLIP_STD)),
        given.get("resize_mode", "shortest"),
        given.get("interpolation", "bicubic"),
    )


def visual_from_openai(state: Mapping[str, Tensor], heads: int, quick_gelu: bool) -> tuple[VisionTransformer, Config]:
    """The tower of CLIP's visual weights and the configuration that builds it again.

    Args:
        state: in any layout of `clip_checkpoint.LAYOUTS`, such as OpenAI's names with or without "visual.".

    Raises:
        ValueError: keys missing or unknown for a CLIP ViT, or heads that do not divide the width.
    """
    weights = name_clip(state)
    vision_cfg = _sizes(weights.tower)
    _check_heads(vision_cfg["width"], heads)
    vision_cfg["head_width"] = vision_cfg["width"] // heads
    config: dict[str, Any] = {"embed_dim": weights.tower["proj"].shape[1], "vision_cfg": vision_cfg}
    config["quick_gelu"] = quick_gelu
    visual = build_visual(config)
    _load_all(visual, weights.tower)
    return visual, Config(**config, preprocess=_preprocess(visual))


def clip_from_openai(
    state: Mapping[str, Tensor], heads: int, text_heads: int | None = None, quick_gelu: bool = True
) -> tuple[open_clip.CLIP, Config]:
    """A whole CLIP ViT, both towers, and the configuration that builds it again.

    Args:
        state: as in `visual_from_openai`.
        heads, text_heads: of the visual and the text tower; text default: width // 64, as in OpenAI's models.

    Raises:
        ValueError: see `visual_from_openai`.
    """
    _, config = visual_from_openai(state, heads, quick_gelu)
    weights = name_clip(state)
    needed = ("token_embedding.weight", "positional_embedding", "transformer.resblocks.0.ln_1.weight", "logit_scale")
    missing = [key for key in needed if key not in weights.text]
    if missing:
        raise ValueError(f"not a whole OpenAI CLIP: keys {missing} of the text tower are missing")
    vocab_size, text_width = weights.text["token_embedding.weight"].shape
    text_heads = text_width // 64 if text_heads is None else text_heads
    _check_heads(text_width, text_heads)
    text_cfg = {
        "context_length": weights.text["positional_embedding"].shape[0],
        "vocab_size": vocab_size,
        "width": text_width,
        "heads": text_heads,
        "layers": _count_blocks(weights.text),
    }
    config = replace(config, text_cfg=text_cfg)
    clip = build_clip(config.model_config)
    _load_all(clip, _whole(weights))
    return clip, config


def _sizes(visual: Mapping[str, Tensor]) -> dict[str, Any]:
    """What of a vision_cfg the weights tell: all but the heads."""
    needed = ("conv1.weight", "positional_embedding", "proj", "transformer.resblocks.0.mlp.c_fc.weight")
    if missing := [key for key in needed if key not in visual]:
        raise ValueError(f"not the visual tower of an OpenAI CLIP ViT: keys {missing} are missing")
    width, _, patch_size, _ = visual["conv1.weight"].shape
    return {
        "image_size": patch_size * square_side(visual["positional_embedding"].shape[0] - 1),
        "patch_size": patch_size,
        "width": width,
        "layers": _count_blocks(visual),
        "mlp_ratio": visual["transformer.resblocks.0.mlp.c_fc.weight"].shape[0] / width,
    }


def _check_heads(width: int, heads: int) -> None:
    if heads < 1 or width % heads:
        raise ValueError(f"a tower of width {width} cannot have {heads} heads; give a number that divides it")


def _count_blocks(state: Mapping[str, Tensor]) -> int:
    return 1 + max(int(key.split(".")[2]) for key in state if key.startswith("transformer.resblocks."))


def _whole(weights: ClipWeights) -> dict[str, Tensor]:
    """Both towers' weights by the names of open_clip's model, whose scale is a scalar."""
    scale = {key: value.reshape(()) for key, value in weights.text.items() if key == "logit_scale"}
    return {**{f"{VISUAL}{key}": value for key, value in weights.tower.items()}, **weights.text, **scale}


def _load_all(module: nn.Module, state: Mapping[str, Tensor]) -> None:
    if trouble := misfits(module.state_dict(), state):
        raise ValueError(f"not the weights of an OpenAI CLIP ViT: {trouble}")
    module.load_state_dict(state)


def load_tower(name: str, pretrained: str | None, num_frames: int) -> tuple[Backbone, Config]:
    """A visual tower as a backbone, with its configuration; it takes any number of frames.

    Args:
        name, pretrained: as in `load_clip`, with its errors; a file of CLIP without a text tower will do.
    """
    named = pretrained is None or _is_tag(name, pretrained)
    if pretrained is None or named or is_mixed(model_config(name)):
        loaded = _load_named(name, pretrained) if named else _load_mixed(name, str(pretrained))
        backbone = backbone_of(loaded.clip.visual)
        if loaded.export:
            backbone.clip_positions = load_export(backbone, loaded.config, loaded.export)
        return backbone, loaded.config
    weights = read_clip(pretrained)
    config = _as_trained(name, weights, with_text=False)
    visual = build_visual(config)
    _load_fitting(visual, weights.tower, weights, name)
    saved = _saved_config(name, config, visual, weights)  # before the tower is taken apart
    backbone = backbone_of(visual)
    backbone.clip_positions = weights.clip_positions
    return backbone, saved


def load_export(backbone: Backbone, config: Config, export: Export) -> dict[str, Tensor]:
    """A mixed model's visual tower from a folder of this package; see `load_exported_tower`."""
    return load_exported_tower(backbone, config, export, ("name", "text_cfg"))


def build_tower(config: Config) -> Backbone:
    """The backbone of a configuration, randomly initialised."""
    return backbone_of(build_visual(config.model_config))
