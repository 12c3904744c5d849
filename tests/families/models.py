"""Small random models of two towers in the folders and registers of their libraries."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import open_clip
import torch
import transformers
from timm.models import VisionTransformer, register_model
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from tokenizers.processors import TemplateProcessing

SIDE, WORDS = 16, 8
_NAMES = ("<pad>", "<unk>", "<eos>", "a", "red", "blue", "ball", "cube", "moves")
_TEXT: dict[str, Any] = {
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "vocab_size": len(_NAMES),
    "max_position_embeddings": WORDS,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_VISION: dict[str, Any] = {
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "image_size": SIDE,
    "patch_size": 4,
}


def tokenizer() -> transformers.PreTrainedTokenizerFast:
    """Words in lower case with an end token, and padding behind."""
    made = Tokenizer(WordLevel({name: number for number, name in enumerate(_NAMES)}, unk_token="<unk>"))
    made.pre_tokenizer = Whitespace()
    made.post_processor = TemplateProcessing(single="$A <eos>", special_tokens=[("<eos>", 2)])
    special = {"pad_token": "<pad>", "unk_token": "<unk>", "eos_token": "<eos>"}
    return transformers.PreTrainedTokenizerFast(tokenizer_object=made, **special)


def save_hf(kind: str, folder: Path) -> Any:
    """A CLIP, SigLIP or SigLIP 2 with its tokenizer in a folder; returns the model."""
    torch.manual_seed(0)
    if kind == "clip":
        config: Any = transformers.CLIPConfig(text_config=_TEXT, vision_config=_VISION, projection_dim=12)
        model: Any = transformers.CLIPModel(config)
    elif kind == "siglip":
        model = transformers.SiglipModel(transformers.SiglipConfig(text_config=_TEXT, vision_config=_VISION))
    else:
        vision = {**_VISION, "num_patches": (SIDE // 4) ** 2}
        model = transformers.Siglip2Model(transformers.Siglip2Config(text_config=_TEXT, vision_config=vision))
    for name, weight in model.named_parameters():
        if "logit" not in name:
            torch.nn.init.normal_(weight, std=0.3)
    model.eval().save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return model


@register_model
def vit_nano_siglip(pretrained: bool = False, **options: Any) -> VisionTransformer:
    """SigLIP's kind of tower: no CLS token, attention pooling."""
    sizes = {"patch_size": 4, "embed_dim": 16, "depth": 3, "num_heads": 2, "class_token": False, "global_pool": "map"}
    options.pop("pretrained_cfg", None), options.pop("pretrained_cfg_overlay", None), options.pop("cache_dir", None)
    return VisionTransformer(**{"img_size": SIDE, "num_classes": 0, **sizes, **options})


def add_open_clip(name: str, folder: Path, siglip: bool = True) -> None:
    """A model of open_clip with a tower of timm: SigLIP's kind, or with CLIP's own text tower."""
    text: dict[str, Any] = {"context_length": WORDS, "vocab_size": len(_NAMES), "width": 16, "heads": 2, "layers": 2}
    config: dict[str, Any] = {"embed_dim": 16, "vision_cfg": {"timm_model_name": "vit_nano_siglip", "image_size": SIDE}}
    config["vision_cfg"] |= {"timm_pool": "map", "timm_proj": "none"}
    if siglip:
        tokenizer().save_pretrained(folder / "words")
        text |= {"no_causal_mask": True, "pool_type": "last", "proj_bias": True, "norm_kwargs": {"eps": 1e-6}}
        text |= {"hf_tokenizer_name": str(folder / "words"), "tokenizer_kwargs": {"clean": "canonicalize"}}
        config |= {"custom_text": True, "init_logit_bias": -10}
    else:
        text |= {"vocab_size": 49408, "context_length": 77}
    (folder / f"{name}.json").write_text(json.dumps({**config, "text_cfg": text}))
    open_clip.add_model_config(folder / f"{name}.json")
