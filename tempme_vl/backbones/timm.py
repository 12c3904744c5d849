"""Vision transformers of timm, also the ones inside open_clip (SigLIP and others) and transformers.

`backbone_of` puts a `Backbone` over the very modules of a model that exists; nothing is copied or changed. Children are
looked up when called, so LoRA added to the model is seen. Class, register and position embeddings are parameters of
timm's model itself; the embed module holds the same ones.
"""

from __future__ import annotations

import inspect
import json
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import timm
from timm.data import resolve_model_data_config
from timm.layers import PatchEmbed
from timm.models import VisionTransformer
from torch import Tensor, cat, nn

from tempme_vl.backbones.attention import attend
from tempme_vl.backbones.base import Backbone, BlockAdapter, Pool, Preprocessing, TowerConfig, TowerShape, count_blocks
from tempme_vl.fit import load_strictly
from tempme_vl.hub import require_hub
from tempme_vl.libraries import describe, undocumented
from tempme_vl.messages import few
from tempme_vl.schema import THEIR_LAYERS, Range, check_plain
from tempme_vl.state import AttentionContext
from tempme_vl.weights.exports import find_export, load_exported_tower
from tempme_vl.weights.files import read_weights

with undocumented("timm"):
    from timm.models.vision_transformer import Attention, Block

_log = logging.getLogger(__name__)

_BLOCK = {"norm1", "attn", "ls1", "drop_path1", "norm2", "mlp", "ls2", "drop_path2"}
_ATTENTION = {"qkv", "q_norm", "k_norm", "attn_drop", "norm", "proj", "proj_drop"}


class TimmBlock(BlockAdapter):
    """timm's Block, held as it is.

    Raises:
        ValueError: another block or attention, or unknown children.
    """

    block: Any

    def __init__(self, block: nn.Module):
        super().__init__()
        attention = getattr(block, "attn", nn.Identity())
        for module, known, children in ((block, Block, _BLOCK), (attention, Attention, _ATTENTION)):
            found = {name for name, _ in module.named_children()}
            if type(module) is not known or found != children:
                raise ValueError(
                    f"expected timm's {known.__name__} of {sorted(children)}; got {type(module).__name__} of "
                    f"{sorted(found)} ({describe('timm')}). {_INSTEAD}"
                )
        self.block = block

    def attention_branch(self, x: Tensor, bias: Tensor | None) -> tuple[Tensor, AttentionContext]:
        block, attention = self.block, self.block.attn
        q, k, v = attention.qkv(block.norm1(x)).unflatten(-1, (3, attention.num_heads, -1)).permute(2, 0, 3, 1, 4)
        q, k = attention.q_norm(q), attention.k_norm(k)
        dropout = attention.attn_drop.p if attention.training else 0.0
        delta = attention.norm(attend(q, k, v, bias, dropout, attention.scale))
        delta = block.drop_path1(block.ls1(attention.proj_drop(attention.proj(delta))))
        return delta, AttentionContext(k, q, bias, attention.scale)

    def mlp_branch(self, x: Tensor) -> Tensor:
        block = self.block
        return block.drop_path2(block.ls2(block.mlp(block.norm2(x))))


class TimmEmbed(nn.Module):
    """Patches, CLS and register tokens, positions and the norm before the blocks: (R, 3, H, W) -> (R, N, D)."""

    def __init__(self, tower: Any):
        super().__init__()
        self.patch_embed, self.pos_drop, self.norm_pre = tower.patch_embed, tower.pos_drop, tower.norm_pre
        self.cls_token, self.reg_token, self.pos_embed = tower.cls_token, tower.reg_token, tower.pos_embed
        self.prefix_has_positions = not tower.no_embed_class

    def forward(self, images: Tensor) -> Tensor:
        x = self.patch_embed(images)
        if x.ndim == 4:  # (R, rows, columns, D) of a tower made for images of any size
            x = x.flatten(1, 2)
        prefix = [t.to(x.dtype).expand(x.shape[0], -1, -1) for t in (self.cls_token, self.reg_token) if t is not None]
        if self.pos_embed is None:
            return self.norm_pre(cat([*prefix, x], dim=1))
        positions = self.pos_embed.to(x.dtype)
        if self.prefix_has_positions:
            x = cat([*prefix, x], dim=1) + positions
        else:
            x = cat([*prefix, x + positions], dim=1)
        return self.norm_pre(self.pos_drop(x))


class TimmAttentionPool(nn.Module):
    """Attention pooling and the head: (R, n, D) normed tokens and their sizes (R, n, 1) -> (R, E)."""

    def __init__(self, pool: nn.Module, head: nn.Module):
        super().__init__()
        self.pool, self.head = pool, head

    def forward(self, x: Tensor, size: Tensor | None) -> Tensor:
        bias = None if size is None else size.log().to(x.dtype).transpose(1, 2).unsqueeze(1)
        return self.head(self.pool(x, attn_mask=bias))


_INSTEAD = (
    "Towers that rotate by position (EVA02, RoPE), attend in windows (Swin, SAM) or run their branches in parallel "
    "cannot merge inside: keep them whole and merge the tokens that they give, or use a plain one such as "
    "'timm:vit_base_patch16_224'"
)


@undocumented("timm")
def backbone_of(tower: nn.Module, layer: int = -1) -> tuple[Backbone, Config | None]:
    """A backbone over the modules of an existing timm model, which stays as it is.

    Args:
        tower: a timm VisionTransformer, or open_clip's wrapper of one (`model.visual`). Embeddings of frames are what
            it returns for an image, projection or classifier included.
        layer: as in `backbones.hf.backbone_of`: -1 for all blocks, -2 for all but the last; then neither the final
            norm nor the head is used.

    Returns:
        the backbone, and the configuration that builds the tower again; None where timm does not tell, that is
        for models that `timm.create_model` did not make and for open_clip's with a projection of their own.

    Raises:
        ValueError: another class than VisionTransformer, unknown blocks, images that are not square, patch dropout, or
            pooling other than by CLS token, mean or attention.
    """
    projection: Any = nn.Identity()
    if type(tower).__name__ == "TimmModel":  # open_clip's, which is not imported for its sake
        wrapper: Any = tower
        tower, projection = wrapper.trunk, wrapper.head
        if hasattr(projection, "pool"):
            raise ValueError(f"open_clip's {type(projection.pool).__name__} pools a whole grid, which merging breaks")
    _check(tower)
    vit: Any = tower
    count = count_blocks(layer, len(vit.blocks))
    blocks: list[BlockAdapter] = [TimmBlock(block) for block in vit.blocks[:count]]
    norm, pool, head = _output(vit, projection, whole=count == len(vit.blocks))
    first = vit.blocks[0]
    widths = [module.out_features for module in head.modules() if isinstance(module, nn.Linear)]
    shape = TowerShape(
        image_size=vit.patch_embed.img_size[0],
        patch_size=vit.patch_embed.patch_size[0],
        width=vit.embed_dim,
        heads=first.attn.num_heads,
        embed_dim=widths[-1] if widths else vit.embed_dim,
        mlp_ratio=first.mlp.fc2.in_features / vit.embed_dim,
        quick_gelu=type(first.mlp.act).__name__ == "QuickGELU",
        norm_pre=not isinstance(vit.norm_pre, nn.Identity),
        num_prefix=vit.num_prefix_tokens,
        pool=pool,
    )
    config = None if len(list(projection.children())) else _config(vit, layer)
    return Backbone(TimmEmbed(vit), blocks, norm, head, shape), config


def _output(vit: Any, projection: nn.Module, whole: bool) -> tuple[nn.Module, Pool, nn.Module]:
    """The final norm, how frames are pooled, and the head; for an earlier layer they do nothing."""
    by_cls = vit.global_pool == "token" or (vit.global_pool == "" and vit.has_class_token)
    pool: Pool = "cls" if by_cls else "mean"
    if not whole:
        return nn.Identity(), pool, nn.Identity()
    head: nn.Module = nn.Sequential(vit.fc_norm, vit.head_drop, vit.head, projection)
    if vit.global_pool == "map":
        pool, head = "attention", TimmAttentionPool(vit.attn_pool, head)
    return vit.norm, pool, head


def _check(tower: Any) -> None:
    """Raises:
    ValueError: see `backbone_of`.
    """
    name = type(tower).__name__
    if type(tower) is not VisionTransformer:
        raise ValueError(f"expected timm's VisionTransformer; got {name} ({describe('timm')}). {_INSTEAD}")
    if type(tower.patch_embed) is not PatchEmbed or tower.patch_embed.img_size is None:
        raise ValueError(f"expected timm's PatchEmbed of a fixed image size; got {type(tower.patch_embed).__name__}")
    if len({*tower.patch_embed.img_size}) != 1 or len({*tower.patch_embed.patch_size}) != 1:
        raise ValueError(
            f"expected a tower for square images and patches; this one takes {tower.patch_embed.img_size} px in "
            f"patches of {tower.patch_embed.patch_size}"
        )
    if not isinstance(tower.patch_drop, nn.Identity):
        raise ValueError("patch dropout changes token counts; build the tower with patch_drop_rate=0")
    if tower.global_pool not in ("", "token", "avg", "map"):
        raise ValueError(
            f"a tower that pools by {tower.global_pool!r} is not known ({describe('timm')}); expected 'token', "
            "'avg', 'map' or ''"
        )
    if tower.pool_include_prefix and tower.global_pool in ("avg", "map"):
        raise ValueError("this tower pools its CLS tokens and registers too; build it with pool_include_prefix=False")


@dataclass(frozen=True, kw_only=True)
class Config(TowerConfig):
    """What builds a tower; `options` are those of timm's VisionTransformer."""

    family: Literal["timm"] = "timm"
    name: str
    options: Mapping[str, Any]
    layer: Annotated[int, Range(-1000, 1000)]

    def __post_init__(self) -> None:
        if not timm.is_model(self.name):
            raise ValueError(f"'name': timm {timm.__version__} has no model {self.name!r}")
        # not all that create_model takes: it loads files, too
        known = list(inspect.signature(VisionTransformer.__init__).parameters)[1:]
        if unknown := [name for name in self.options if name not in known]:
            raise ValueError(f"'options': unknown keys {unknown[:5]}; expected some of {', '.join(known)}")
        check_plain(self.options, "'options'", THEIR_LAYERS)


def _config(tower: Any, layer: int) -> Config | None:
    """What `timm.create_model` was called with, as it remembers it, and what may have changed since."""
    name = getattr(tower, "pretrained_cfg", {}).get("architecture")
    if not name or not hasattr(tower, "_model_args"):
        return None
    options = {**tower._model_args, "num_classes": tower.num_classes, "global_pool": tower.global_pool}
    options["img_size"] = tower.patch_embed.img_size[0]
    try:
        options = json.loads(json.dumps(options))
        return Config(name=name, options=options, layer=layer, preprocess=_preprocess(tower))
    except (TypeError, ValueError):  # classes and functions, which JSON cannot hold; what no tower can be built of
        return None


def _preprocess(tower: Any) -> Preprocessing:
    given = resolve_model_data_config(tower)
    return Preprocessing(
        tower.patch_embed.img_size[0],
        tuple(given["mean"]),
        tuple(given["std"]),
        "squash" if given["crop_mode"] == "squash" else "shortest",
        given["interpolation"] if given["interpolation"] in ("bilinear", "bicubic") else "bicubic",
    )


def load_tower(
    name: str,
    pretrained: str | None,
    num_frames: int,
    layer: int = -1,
    image_size: int | None = None,
    num_classes: int = 0,
) -> tuple[Backbone, Config]:
    """A tower by timm's name, with its configuration.

    Args:
        name: "vit_base_patch16_224", "vit_base_patch16_siglip_224.webli", ...
        pretrained: None for random weights, "default" for timm's own of that name, or the path of weights in timm's
            names (`tempme_vl.weights.files.read_weights`) or of a folder that this package wrote.
        layer: see `backbone_of`.
        image_size: pixels, where they are not the model's own; timm resizes the positions when it loads weights.
        num_classes: width of the model's own head, such as 512 for the projection of a CLIP; 0 goes without it.

    Raises:
        ValueError: a name that timm does not know, weights that do not fit, or see `backbone_of`.
    """
    if not timm.is_model(name):
        known = ", ".join(timm.list_models(f"{name.split('_')[0]}*")[:8] or ["vit_base_patch16_224"])
        raise ValueError(f"timm {timm.__version__} has no model {name!r}; known, for example: {known}")
    options: dict[str, Any] = {"num_classes": num_classes}
    if image_size is not None:
        options["img_size"] = image_size
    if pretrained == "default":
        _require_published(name)
    tower = timm.create_model(name, pretrained=pretrained == "default", **options)
    backbone, config = backbone_of(tower, layer)
    config = config or Config(name=name, options=options, layer=layer, preprocess=_preprocess(tower))
    if pretrained not in (None, "default"):
        if export := find_export(str(pretrained)):
            backbone.clip_positions = load_exported_tower(backbone, config, export)
        else:
            _load_file(tower, str(pretrained))
    return backbone, config


def _require_published(name: str) -> None:
    """Says at once where timm would try for a minute to reach the hub.

    Raises:
        ValueError: its weights are not in the cache and the hub cannot be reached.
    """
    published: Any = timm.get_pretrained_cfg(name)
    repo = getattr(published, "hf_hub_id", None) or ""
    if repo and "@" not in repo:  # a revision, which would have to be looked for by its own name
        own = [file for file in (published.hf_hub_filename,) if file]
        require_hub(repo, *own, "model.safetensors", "pytorch_model.bin", "open_clip_model.safetensors")


def _load_file(tower: nn.Module, path: str) -> None:
    """Raises:
    ValueError: see `read_weights`; or other weights than the tower's; a classifier that it does not have may be there.
    """
    if not Path(path).exists():
        raise ValueError(f"expected pretrained=None, 'default' or the path of weights in timm's names; got {path!r}")
    file = read_weights(path)
    unused = [key for key in file.state if key.startswith("head.")] if isinstance(tower.head, nn.Identity) else []
    state = {key: value for key, value in file.state.items() if key not in unused}
    load_strictly(tower, state, f"{path} ({file.kind})")
    _log.info("%s: %s, %d weights in timm's names; unused: %s", path, file.kind, len(state), few(unused) or "nothing")


def build_tower(config: Config) -> Backbone:
    """The backbone of a configuration, randomly initialised, without looking anything up."""
    tower = timm.create_model(config.name, pretrained=False, **config.options)
    return backbone_of(tower, config.layer)[0]
