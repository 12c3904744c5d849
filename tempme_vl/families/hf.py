"""Vision towers of transformers; CLIP, SigLIP and SigLIP 2 with their text towers."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn

from tempme_vl.backbones import hf as towers
from tempme_vl.families.base import JSON, Family, Pair, Texts, TextSide
from tempme_vl.hub import require_hub
from tempme_vl.libraries import describe, undocumented
from tempme_vl.manifest import errors_in
from tempme_vl.schema import THEIR_LAYERS, check_plain, read, write
from tempme_vl.text.hf import HFTextEncoder
from tempme_vl.text.tokenizers import TOKENIZER, PretrainedWords, Words
from tempme_vl.weights.exports import find_export, load_exported_tower


@dataclass(frozen=True)
class _Model:
    """The classes of a model with two towers, and of its text tower alone."""

    whole: str
    text: str
    lower: bool = False


# by a configuration's model_type
_MODELS = {
    "clip": _Model("CLIPModel", "CLIPTextModelWithProjection"),
    "siglip": _Model("SiglipModel", "SiglipTextModel"),
    "siglip2": _Model("Siglip2Model", "Siglip2TextModel", lower=True),
}
_BY_TEXT = {model.text: model for model in _MODELS.values()}


@dataclass(frozen=True)
class _TextConfig:
    """The JSON configuration of a text tower; `text_config` is transformers' own."""

    architecture: str
    text_config: Mapping[str, Any]

    def __post_init__(self) -> None:
        if self.architecture not in _BY_TEXT:
            raise ValueError(f"'architecture': expected one of {', '.join(_BY_TEXT)}; got {self.architecture!r}")
        check_plain(self.text_config, "'text_config'", THEIR_LAYERS)


@undocumented("transformers")
def load_pair(name: str, pretrained: str | None, num_frames: int, image_size: int | None = None) -> Pair:
    """Both towers of a model by name, float32.

    Args:
        name, pretrained, image_size: as in `backbones.hf.load_tower`. The tokenizer is that of `name`.

    Raises:
        ValueError: a model without a text tower, no tokenizer, or see `load_tower`.
    """
    config = towers.read_config(name)
    if config.model_type not in _MODELS:
        raise ValueError(
            f"{name!r} is a {config.model_type!r} of {describe('transformers')}: no text tower of it is known; "
            f"retrieval takes whole models of the types {', '.join(_MODELS)}"
        )
    kind = _MODELS[config.model_type]
    export = None if pretrained in (None, "default") else find_export(str(pretrained))
    if pretrained is None or export:
        model: Any = getattr(transformers, kind.whole)(config)
    else:
        model = towers.load_model(kind.whole, config, name if pretrained == "default" else pretrained)
    backbone, built = towers.backbone_of(_vision(model), image_size=image_size)
    tower = towers.with_own_preprocess(name, built)
    if export:
        backbone.clip_positions = load_exported_tower(backbone, tower, export)
    text = HFTextEncoder(model.text_model, getattr(model, "text_projection", None))
    plain = json.loads(config.text_config.to_json_string(use_diff=False))
    if hasattr(config, "projection_dim"):  # a whole CLIP's own number counts, and may differ from its tower's
        plain["projection_dim"] = config.projection_dim
    text_config = write(_TextConfig(kind.text, plain))
    return Pair(backbone, tower, Texts(text, _words(name, kind)), text_config, model.logit_scale.item(), export)


def _vision(model: Any) -> nn.Module:
    """The visual tower of a whole model, CLIP's with its projection."""
    if not hasattr(model, "visual_projection"):
        return model.vision_model
    config = model.config.vision_config
    config.projection_dim = model.config.projection_dim
    with torch.device("meta"):
        tower: Any = transformers.CLIPVisionModelWithProjection(config)
    tower.vision_model, tower.visual_projection = model.vision_model, model.visual_projection
    return tower


def _words(source: str, kind: _Model) -> Words:
    """Raises:
    ValueError: no tokenizer there.
    """
    files = ("tokenizer.json", "tokenizer.model", "spiece.model", "vocab.json")
    if Path(source).is_dir() and not any((Path(source) / name).is_file() for name in files):
        # transformers would make one without words
        raise ValueError(f"expected a tokenizer ({', '.join(files)}) in {source}; save the model's processor there")
    try:
        require_hub(source, *files)
        tokenizer = transformers.AutoTokenizer.from_pretrained(source, trust_remote_code=False)
    except (OSError, ValueError, ImportError) as error:
        raise ValueError(f"transformers finds no tokenizer for {source!r}, a hub id or a folder: {error}") from error
    return PretrainedWords(tokenizer, kind.lower)


@undocumented("transformers")
def build_texts(config: towers.Config, text_config: JSON, folder: Path) -> Texts:
    """The text tower of a saved model, randomly initialised, with its tokenizer."""
    kind = _BY_TEXT[text_config["architecture"]]
    model_class = getattr(transformers, kind.text)
    model = model_class(model_class.config_class.from_dict(dict(text_config["text_config"])))
    tower = getattr(model, "text_model", model)  # nested in transformers 4, and where a projection follows
    with errors_in(folder / TOKENIZER, Exception):
        words = _words(str(folder / TOKENIZER), kind)
    return Texts(HFTextEncoder(tower, getattr(model, "text_projection", None)), words)


def check_texts(text_config: object, place: str) -> None:
    read(_TextConfig, text_config, place)


FAMILY = Family(
    towers.load_tower,
    towers.build_tower,
    towers.Config,
    ("layer", "image_size"),
    TextSide(load_pair, build_texts, check_texts, ("image_size",)),
)
