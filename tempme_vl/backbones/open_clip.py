"""Models of open_clip by name, with weights from a tag or a file in any layout.

CLIP's towers are taken apart in `open_clip_blocks`; layouts stand in `clip_checkpoint`, which also gives weights their
public names back, bit for bit. Files of mixed models (`open_clip_models`) have open_clip's own layout.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import open_clip
from safetensors import SafetensorError
from torch import Tensor, nn

from tempme_vl.backbones.base import Backbone, Preprocessing
from tempme_vl.backbones.clip_checkpoint import CLIPWeights, read_clip
from tempme_vl.backbones.open_clip_blocks import tower_shape
from tempme_vl.backbones.open_clip_models import (
    TINY_CONFIGS,
    CLIPModel,
    Config,
    backbone_of,
    build_clip,
    build_visual,
    is_mixed,
    model_config,
    preprocess_of,
    untrained,
)
from tempme_vl.backbones.openai import by_model_names, sizes_of
from tempme_vl.fit import load_strictly, misfits
from tempme_vl.hub import require_hub
from tempme_vl.libraries import undocumented
from tempme_vl.messages import few
from tempme_vl.weights.exports import Export, find_export, load_exported_tower
from tempme_vl.weights.files import read_weights

_PACKAGE = "open_clip_torch"

_log = logging.getLogger(__name__)


class LoadedCLIP(NamedTuple):
    """A model, the configuration that builds it again, and what else came with its weights.

    Attributes:
        clip_positions: by layer.
        export: a folder of this package whose weights a mixed model still needs (`load_export`, `load_exported_rest`).
        beside: what lay beside CLIP in the file (`CLIPWeights`).
    """

    clip: CLIPModel
    config: Config
    clip_positions: dict[str, Tensor]
    export: Export | None = None
    beside: Mapping[str, Tensor] = {}


def load_clip(name: str, pretrained: str | None = None) -> LoadedCLIP:
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
    _load_fitting(clip, by_model_names(weights), weights, name)
    saved = _saved_config(name, config, clip.visual, weights)
    return LoadedCLIP(clip, saved, weights.clip_positions, beside=weights.beside)


def _load_mixed(name: str, path: str) -> LoadedCLIP:
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
def _load_named(name: str, tag: str | None) -> LoadedCLIP:
    config = model_config(name)
    if tag is None:
        clip = build_clip(config)
        if name in TINY_CONFIGS:  # from scratch within minutes: places must stand out from the start (docs/LOG.md)
            nn.init.normal_(clip.visual.positional_embedding, std=0.5)
        return LoadedCLIP(clip, _saved_config(name, config, clip.visual), {})
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
    return LoadedCLIP(clip, _saved_config(name, config, clip.visual), {})


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


def _as_trained(name: str, weights: CLIPWeights, with_text: bool) -> dict[str, Any]:
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


def _load_fitting(module: nn.Module, state: dict[str, Tensor], weights: CLIPWeights, name: str) -> None:
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
        found = sizes_of(visual)
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
    name: str, config: Mapping[str, Any], visual: nn.Module, weights: CLIPWeights | None = None
) -> Config:
    return Config(
        name=name,
        embed_dim=config["embed_dim"],
        vision_cfg=untrained(config["vision_cfg"]),
        text_cfg=config["text_cfg"],
        # what was built counts, not the name
        quick_gelu=bool(config.get("quick_gelu")) if is_mixed(config) else tower_shape(visual).quick_gelu,
        custom_text=bool(config.get("custom_text")),
        preprocess=weights.preprocess if weights and weights.preprocess else preprocess_of(visual),
    )


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
