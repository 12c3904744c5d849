"""open_clip's models: CLIP, and those with towers of timm and text towers of their own (SigLIP, MobileCLIP)."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import open_clip
import torch

from tempme_vl.backbones import open_clip as towers
from tempme_vl.backbones import open_clip_models as models
from tempme_vl.backbones.base import Backbone
from tempme_vl.backbones.clip_checkpoint import name_clip
from tempme_vl.backbones.openai import clip_from_openai, visual_from_openai
from tempme_vl.families.base import JSON, Family, Pair, Texts, TextSide
from tempme_vl.hub import require_hub
from tempme_vl.manifest import errors_in
from tempme_vl.text.clip import CLIPTextEncoder
from tempme_vl.text.tokenizers import TOKENIZER, CLIPWords, Tokenizing, Words


@dataclass
class _Tokenizer:
    """A text -> ids and mask, both (max_words,) int64; all places are seen, so that the mask says nothing."""

    encode: Any
    max_words: int

    def __call__(self, text: str) -> tuple[torch.Tensor, torch.Tensor]:
        ids = self.encode(text, context_length=self.max_words)[0]
        return ids, torch.ones_like(ids)


@dataclass(frozen=True)
class OpenCLIPWords:
    """The tokenizer of transformers that a model of open_clip names, with what open_clip does to texts before it.

    Attributes:
        encode: from `open_clip.get_tokenizer`.
        text_cfg: of the model, which says how to make it again.
    """

    encode: Any = field(repr=False)
    text_cfg: JSON = field(repr=False)

    def tokenizer(self, max_words: int) -> Tokenizing:
        return _Tokenizer(self.encode, max_words)

    def save(self, directory: Path) -> None:
        """A folder in transformers' format, with open_clip's own file of settings."""
        folder = directory / TOKENIZER
        self.encode.save_pretrained(str(folder))
        config = {"model_cfg": {"text_cfg": self.text_cfg}}
        (folder / "open_clip_config.json").write_text(json.dumps(config, indent=2) + "\n")


def tower_from_openai(
    state: Mapping[str, torch.Tensor], heads: int, quick_gelu: bool
) -> tuple[Backbone, models.Config]:
    """The visual tower of a state dict, with the clip positions in it; see `VisualFrontend.from_openai_state_dict`."""
    visual, config = visual_from_openai(state, heads, quick_gelu)
    backbone = models.backbone_of(visual)
    backbone.clip_positions = name_clip(state).clip_positions
    return backbone, config


def pair_from_openai(state: Mapping[str, torch.Tensor], heads: int, text_heads: int | None, quick_gelu: bool) -> Pair:
    """Both towers of a CLIP ViT on its weights; see `tempme_vl.backbones.open_clip.clip_from_openai`."""
    clip, config = clip_from_openai(state, heads, text_heads, quick_gelu)
    return _pair(towers.LoadedCLIP(clip, config, name_clip(state).clip_positions), CLIPWords())


def load_pair(name: str, pretrained: str | None, num_frames: int) -> Pair:
    """Both towers of a model; see `tempme_vl.backbones.open_clip.load_clip`."""
    loaded = towers.load_clip(name, pretrained)
    return _pair(loaded, _words(name, dict(loaded.config.text_cfg or {})))


def _pair(loaded: towers.LoadedCLIP, words: Words) -> Pair:
    clip, export, text_cfg = loaded.clip, loaded.export, dict(loaded.config.text_cfg or {})
    tower = replace(loaded.config, text_cfg=None)  # which stands beside it
    backbone = models.backbone_of(clip.visual)
    backbone.clip_positions = towers.load_export(backbone, tower, export) if export else loaded.clip_positions
    texts = Texts(CLIPTextEncoder(models.text_of(clip)), words)
    return Pair(backbone, tower, texts, text_cfg, clip.logit_scale.item(), export, loaded.beside)


def _words(name: str, text_cfg: JSON) -> Words:
    source = text_cfg.get("hf_tokenizer_name")
    if not source:
        return CLIPWords()
    try:
        require_hub(source, "tokenizer.json", "tokenizer_config.json", "spiece.model")
        return OpenCLIPWords(open_clip.get_tokenizer(name), text_cfg)
    except (OSError, ImportError) as error:
        raise ValueError(f"open_clip finds no tokenizer {source!r} for {name!r}: {error}") from error


def build_texts(config: models.Config, text_config: JSON, folder: Path) -> Texts:
    """The text tower of a saved model, randomly initialised, with its words."""
    tower = CLIPTextEncoder(models.text_of(models.build_clip({**config.model_config, "text_cfg": text_config})))
    if not text_config.get("hf_tokenizer_name"):
        return Texts(tower, CLIPWords())
    with errors_in(folder / TOKENIZER, Exception):
        encode = open_clip.get_tokenizer(f"local-dir:{folder / TOKENIZER}")
    return Texts(tower, OpenCLIPWords(encode, text_config))


FAMILY = Family(
    towers.load_tower,
    towers.build_tower,
    models.Config,
    texts=TextSide(load_pair, build_texts, models.check_text_config),
)
