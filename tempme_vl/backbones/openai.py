"""Models of OpenAI's CLIP from a state dict alone, whose shapes tell their sizes, but for the numbers of heads."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import open_clip
from torch import Tensor, nn

from tempme_vl.backbones.base import square_side
from tempme_vl.backbones.clip_checkpoint import VISUAL, CLIPWeights, name_clip
from tempme_vl.backbones.open_clip_models import Config, build_clip, build_visual, preprocess_of
from tempme_vl.fit import misfits


def visual_from_openai(state: Mapping[str, Tensor], heads: int, quick_gelu: bool) -> tuple[nn.Module, Config]:
    """The tower of CLIP's visual weights and the configuration that builds it again.

    Args:
        state: in any layout of `clip_checkpoint.LAYOUTS`, such as OpenAI's names with or without "visual.".

    Raises:
        ValueError: keys missing or unknown for a CLIP ViT, or heads that do not divide the width.
    """
    weights = name_clip(state)
    vision_cfg = sizes_of(weights.tower)
    _check_heads(vision_cfg["width"], heads)
    vision_cfg["head_width"] = vision_cfg["width"] // heads
    config: dict[str, Any] = {"embed_dim": weights.tower["proj"].shape[1], "vision_cfg": vision_cfg}
    config["quick_gelu"] = quick_gelu
    visual = build_visual(config)
    _load_all(visual, weights.tower)
    return visual, Config(**config, preprocess=preprocess_of(visual))


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
    _load_all(clip, by_model_names(weights))
    return clip, config


def sizes_of(visual: Mapping[str, Tensor]) -> dict[str, Any]:
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


def by_model_names(weights: CLIPWeights) -> dict[str, Tensor]:
    """Both towers' weights by the names of open_clip's model, whose scale is a scalar."""
    scale = {key: value.reshape(()) for key, value in weights.text.items() if key == "logit_scale"}
    return {**{f"{VISUAL}{key}": value for key, value in weights.tower.items()}, **weights.text, **scale}


def _load_all(module: nn.Module, state: Mapping[str, Tensor]) -> None:
    if trouble := misfits(module.state_dict(), state):
        raise ValueError(f"not the weights of an OpenAI CLIP ViT: {trouble}")
    module.load_state_dict(state)
