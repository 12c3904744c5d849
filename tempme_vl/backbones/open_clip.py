"""CLIP towers of open_clip and OpenAI: loading, conversion to Linear attention, export back.

A block's `nn.MultiheadAttention` becomes a `SelfAttention` on the same parameters once, at load; every other child
of the block is used as it is. Exporting renames the parameters back, bit for bit.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import open_clip
import torch
from torch import Tensor, nn

from tempme_vl.backbones.base import (
    CLIP_MEAN,
    CLIP_STD,
    Backbone,
    BlockAdapter,
    QuickGELU,
    SelfAttention,
    TowerShape,
    square_side,
)
from tempme_vl.libraries import describe, undocumented
from tempme_vl.pretrained import require_hub

_PACKAGE = "open_clip_torch"
with undocumented(_PACKAGE):
    from open_clip.transformer import QuickGELU as OpenClipQuickGELU
    from open_clip.transformer import ResidualAttentionBlock, VisionTransformer

# Small towers for the embedded data set and for tests; everything else comes from open_clip's own configurations.
TINY_CONFIGS: dict[str, dict[str, Any]] = {
    "tiny": {
        "embed_dim": 64,
        "vision_cfg": {"image_size": 32, "layers": 6, "width": 64, "head_width": 16, "patch_size": 8},
        "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 64, "heads": 4, "layers": 2},
    },
}
_BLOCK_CHILDREN = {"ln_1", "attn", "ls_1", "ln_2", "mlp", "ls_2"}
_RENAMED = {
    "attn.in_proj_weight": "attn.qkv.weight",
    "attn.in_proj_bias": "attn.qkv.bias",
    "attn.out_proj.weight": "attn.proj.weight",
    "attn.out_proj.bias": "attn.proj.bias",
}


def model_config(name: str) -> dict[str, Any]:
    """The configuration of an open_clip model: embed_dim, vision_cfg, text_cfg, quick_gelu.

    Raises:
        ValueError: an unknown name, or a model that is not a plain CLIP ViT with its own text transformer.
    """
    config = TINY_CONFIGS.get(name) or open_clip.get_model_config(name)
    if config is None:
        known = [*TINY_CONFIGS, *(n for n in open_clip.list_models() if n.startswith("ViT-"))]
        raise ValueError(f"open_clip has no model {name!r}; known ViTs: {', '.join(known)}")
    vision, text = config["vision_cfg"], config["text_cfg"]
    foreign = {"timm_model_name"} & set(vision) | {"hf_model_name"} & set(text)
    if foreign or config.get("custom_text") or not isinstance(vision.get("layers", 12), int):
        instead = "expected a model such as 'ViT-B-32-quickgelu' or 'ViT-B-16'"
        tower = vision.get("timm_model_name", "")
        if "_siglip_" in tower or "_clip_" in tower:  # the plain ViTs among them
            instead = (
                f"its visual tower is timm's: use 'timm:{tower}', or give the `visual` of open_clip's model to "
                "tempme_vl.backbones.timm.backbone_of"
            )
        raise ValueError(
            f"{name!r} is not a plain CLIP ViT ({', '.join(foreign) or 'custom text tower or ResNet'}); {instead}"
        )
    return config


@undocumented(_PACKAGE)
def load_clip(name: str, pretrained: str | None = None) -> tuple[open_clip.CLIP, dict[str, Any]]:
    """A CLIP model and the JSON configuration that builds it again.

    Args:
        name: an open_clip model such as "ViT-B-16-quickgelu", or "tiny".
        pretrained: None for random weights, a tag such as "openai" or "laion2b_s34b_b79k", or a file's path.

    Raises:
        ValueError: see `model_config`; or weights that open_clip does not know or that do not fit.
    """
    config = model_config(name)
    if pretrained is None:
        clip = build_clip(config)
        if name in TINY_CONFIGS:  # from scratch within minutes: places must stand out from the start (docs/LOG.md)
            nn.init.normal_(clip.visual.positional_embedding, std=0.5)
    elif name in TINY_CONFIGS:
        raise ValueError(f"the built-in model {name!r} has no pretrained weights; leave pretrained out")
    else:
        if repo := (open_clip.get_pretrained_cfg(name, pretrained) or {}).get("hf_hub", "").rstrip("/"):
            require_hub(repo, "open_clip_model.safetensors", "open_clip_pytorch_model.bin")
        try:
            clip = open_clip.create_model(name, pretrained=pretrained)
        except RuntimeError as error:
            raise ValueError(
                f"open_clip cannot load pretrained={pretrained!r} for {name!r}, expected a tag of this model or the "
                f"path of its weights: {error}"
            ) from error
    # what was built counts, not the name: OpenAI weights make open_clip switch to QuickGELU by itself
    quick_gelu = isinstance(clip.visual.transformer.resblocks[0].mlp.gelu, OpenClipQuickGELU)
    built = {key: config[key] for key in ("embed_dim", "vision_cfg", "text_cfg")}
    return clip, {"family": "open_clip", "name": name, **built, "quick_gelu": quick_gelu, **_preprocess(clip.visual)}


def build_clip(config: Mapping[str, Any]) -> open_clip.CLIP:
    """A randomly initialised CLIP from a configuration with embed_dim, vision_cfg, text_cfg, quick_gelu."""
    names = ("embed_dim", "vision_cfg", "text_cfg", "quick_gelu")
    return open_clip.CLIP(**{key: config[key] for key in names if key in config})


@undocumented(_PACKAGE)
def build_visual(config: Mapping[str, Any]) -> VisionTransformer:
    """The randomly initialised visual tower of a configuration; it needs no text_cfg."""
    no_text = {"context_length": 1, "vocab_size": 1, "width": 8, "heads": 1, "layers": 1}
    return build_clip({**config, "text_cfg": no_text}).visual


def _preprocess(visual: VisionTransformer) -> dict[str, Any]:
    """How pixels become input, in the words of `tempme_vl.data.transforms.Preprocess`."""
    given = getattr(visual, "preprocess_cfg", {})
    return {
        "preprocess": {
            "image_size": visual.image_size[0],
            "mean": list(given.get("mean", CLIP_MEAN)),
            "std": list(given.get("std", CLIP_STD)),
            "resize": given.get("resize_mode", "shortest"),
            "interpolation": given.get("interpolation", "bicubic"),
        }
    }


class OpenClipBlock(BlockAdapter):
    """open_clip's ResidualAttentionBlock, its attention converted, its other children kept.

    Raises:
        ValueError: a block that is not built of the known children.
    """

    def __init__(self, block: nn.Module):
        super().__init__()
        children = {name for name, _ in block.named_children()}
        if not isinstance(block, ResidualAttentionBlock) or children != _BLOCK_CHILDREN:
            raise ValueError(
                f"expected open_clip's ResidualAttentionBlock with {sorted(_BLOCK_CHILDREN)}; got "
                f"{type(block).__name__} with {sorted(children)} ({describe(_PACKAGE)})"
            )
        self.ln_1, self.ls_1 = block.ln_1, block.ls_1
        self.ln_2, self.mlp, self.ls_2 = block.ln_2, block.mlp, block.ls_2
        if isinstance(self.mlp.gelu, OpenClipQuickGELU):
            self.mlp.gelu = QuickGELU()
        self.attn = SelfAttention(block.attn.embed_dim, block.attn.num_heads)
        self.attn.qkv.weight, self.attn.qkv.bias = block.attn.in_proj_weight, block.attn.in_proj_bias
        self.attn.proj.weight, self.attn.proj.bias = block.attn.out_proj.weight, block.attn.out_proj.bias

    def attention_branch(self, x: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
        attended, keys = self.attn(self.ln_1(x), bias)
        return self.ls_1(attended), keys

    def mlp_branch(self, x: Tensor) -> Tensor:
        return self.ls_2(self.mlp(self.ln_2(x)))


class ClipEmbed(nn.Module):
    """Patches, CLS token, spatial positions and ln_pre of a CLIP ViT: (R, 3, H, W) -> (R, N, D)."""

    def __init__(self, visual: VisionTransformer):
        super().__init__()
        self.conv1, self.ln_pre = visual.conv1, visual.ln_pre
        self.class_embedding, self.positional_embedding = visual.class_embedding, visual.positional_embedding

    def forward(self, images: Tensor) -> Tensor:
        patches = self.conv1(images.to(self.conv1.weight.dtype)).flatten(2).transpose(1, 2)
        cls = self.class_embedding.to(patches.dtype).expand(patches.shape[0], 1, -1)
        x = torch.cat([cls, patches], dim=1) + self.positional_embedding.to(patches.dtype)
        return self.ln_pre(x)


class ClipHead(nn.Module):
    """The projection of normed CLS tokens: (..., D) -> (..., E)."""

    def __init__(self, visual: VisionTransformer):
        super().__init__()
        self.proj = visual.proj

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.proj


@undocumented(_PACKAGE)
def visual_backbone(visual: nn.Module) -> Backbone:
    """Takes an open_clip VisionTransformer over as a backbone; the given module must not be used afterwards.

    Raises:
        ValueError: a tower with other pooling than the CLS token, patch dropout, or unknown blocks.
    """
    if not isinstance(visual, VisionTransformer):
        raise ValueError(f"expected open_clip's VisionTransformer; got {type(visual).__name__}")
    if visual.attn_pool is not None or visual.pool_type != "tok":
        raise ValueError(f"expected CLS pooling ('tok'); this tower pools by {visual.pool_type!r} or attention")
    if not isinstance(visual.patch_dropout, nn.Identity):
        raise ValueError("patch dropout changes token counts; build the tower with patch_dropout=0")
    if visual.image_size[0] != visual.image_size[1]:
        raise ValueError(f"expected a tower for square images; this one takes {visual.image_size} px")
    shape = tower_shape(visual)
    blocks: list[BlockAdapter] = [OpenClipBlock(block) for block in visual.transformer.resblocks]
    return Backbone(ClipEmbed(visual), blocks, visual.ln_post, ClipHead(visual), shape)


@undocumented(_PACKAGE)
def tower_shape(visual: VisionTransformer) -> TowerShape:
    """The numbers of an open_clip tower."""
    first, width = visual.transformer.resblocks[0], visual.conv1.out_channels
    return TowerShape(
        image_size=visual.image_size[0],
        patch_size=visual.patch_size[0],
        width=width,
        heads=first.attn.num_heads,
        embed_dim=visual.output_dim,
        mlp_ratio=first.mlp.c_fc.out_features / width,
        quick_gelu=isinstance(first.mlp.gelu, OpenClipQuickGELU),
        norm_pre=not isinstance(visual.ln_pre, nn.Identity),
    )


def visual_from_openai(
    state: Mapping[str, Tensor], heads: int, quick_gelu: bool
) -> tuple[VisionTransformer, dict[str, Any]]:
    """The tower of OpenAI-named visual weights and the configuration that builds it again.

    Args:
        state: with or without the "visual." prefix; with it, keys of other parts are left alone.

    Raises:
        ValueError: keys missing or unknown for a CLIP ViT, or heads that do not divide the width.
    """
    prefix = "visual." if any(key.startswith("visual.") for key in state) else ""
    state = {key[len(prefix) :]: value for key, value in state.items() if key.startswith(prefix)}
    needed = ("conv1.weight", "positional_embedding", "proj", "transformer.resblocks.0.mlp.c_fc.weight")
    missing = [key for key in needed if key not in state]
    if missing:
        raise ValueError(f"not the visual tower of an OpenAI CLIP ViT: keys {missing} are missing")
    width, _, patch_size, _ = state["conv1.weight"].shape
    _check_heads(width, heads)
    vision_cfg = {
        "image_size": patch_size * square_side(state["positional_embedding"].shape[0] - 1),
        "patch_size": patch_size,
        "width": width,
        "head_width": width // heads,
        "layers": _count_blocks(state),
        "mlp_ratio": state["transformer.resblocks.0.mlp.c_fc.weight"].shape[0] / width,
    }
    config = {"embed_dim": state["proj"].shape[1], "vision_cfg": vision_cfg, "quick_gelu": quick_gelu}
    visual = build_visual(config)
    _load_all(visual, state)
    return visual, {"family": "open_clip", **config, **_preprocess(visual)}


def clip_from_openai(
    state: Mapping[str, Tensor], heads: int, text_heads: int | None = None, quick_gelu: bool = True
) -> tuple[open_clip.CLIP, dict[str, Any]]:
    """A whole OpenAI-named CLIP ViT, both towers, and the configuration that builds it again.

    Args:
        heads, text_heads: of the visual and the text tower; text default: width // 64, as in OpenAI's models.

    Raises:
        ValueError: see `visual_from_openai`.
    """
    _, config = visual_from_openai(state, heads, quick_gelu)
    needed = ("token_embedding.weight", "positional_embedding", "transformer.resblocks.0.ln_1.weight", "logit_scale")
    missing = [key for key in needed if key not in state]
    if missing:
        raise ValueError(f"not a whole OpenAI CLIP: keys {missing} of the text tower are missing")
    vocab_size, text_width = state["token_embedding.weight"].shape
    text_heads = text_width // 64 if text_heads is None else text_heads
    _check_heads(text_width, text_heads)
    config["text_cfg"] = {
        "context_length": state["positional_embedding"].shape[0],
        "vocab_size": vocab_size,
        "width": text_width,
        "heads": text_heads,
        "layers": _count_blocks(state),
    }
    clip = build_clip(config)
    sizes = ("input_resolution", "context_length", "vocab_size")  # numbers that OpenAI's files hold beside weights
    weights = {key: value for key, value in state.items() if key not in sizes}
    _load_all(clip, {**weights, "logit_scale": state["logit_scale"].reshape(())})
    return clip, config


def _check_heads(width: int, heads: int) -> None:
    if heads < 1 or width % heads:
        raise ValueError(f"a tower of width {width} cannot have {heads} heads; give a number that divides it")


def _count_blocks(state: Mapping[str, Tensor]) -> int:
    return 1 + max(int(key.split(".")[2]) for key in state if key.startswith("transformer.resblocks."))


def _load_all(module: nn.Module, state: Mapping[str, Tensor]) -> None:
    try:
        module.load_state_dict(state)
    except RuntimeError as error:
        raise ValueError(f"not the weights of an OpenAI CLIP ViT: {error}") from error


def to_openai_names(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A converted tower's parameters (`embed`, `blocks.N[.block]`, `norm`, `head`, ...) under open_clip's names."""
    parts = {"embed.": "", "norm.": "ln_post.", "head.": "", "blocks.": "transformer.resblocks."}
    exported = {}
    for key, value in state.items():
        for part, theirs in parts.items():
            if key.startswith(part):
                key = theirs + key[len(part) :].replace(".block.", ".", 1)
                break
        for theirs, ours in _RENAMED.items():
            if key.endswith(ours):
                key = key[: -len(ours)] + theirs
        exported[key] = value
    return exported


TOWER_OPTIONS = ()


def load_tower(name: str, pretrained: str | None, num_frames: int) -> tuple[Backbone, dict[str, Any]]:
    """The visual part of `load_clip` as a backbone, with its configuration; it takes any number of frames."""
    clip, config = load_clip(name, pretrained)
    return visual_backbone(clip.visual), config


def build_tower(config: Mapping[str, Any]) -> Backbone:
    """The backbone of a configuration, randomly initialised."""
    return visual_backbone(build_visual(config))
