"""CLIP's visual tower taken apart: blocks, embedding and head of open_clip under the names of this package.

A block's `nn.MultiheadAttention` becomes a `SelfAttention` on the same parameters once, at load; every other child
of the block is used as it is.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from tempme_vl.backbones.base import Backbone, BlockAdapter, PatchProjection, QuickGELU, SelfAttention, TowerShape
from tempme_vl.libraries import describe, undocumented
from tempme_vl.state import AttentionContext

_PACKAGE = "open_clip_torch"
with undocumented(_PACKAGE):
    from open_clip.transformer import QuickGELU as OpenCLIPQuickGELU
    from open_clip.transformer import ResidualAttentionBlock, VisionTransformer

_BLOCK_CHILDREN = {"ln_1", "attn", "ls_1", "ln_2", "mlp", "ls_2"}


class OpenCLIPBlock(BlockAdapter):
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
        if isinstance(self.mlp.gelu, OpenCLIPQuickGELU):
            self.mlp.gelu = QuickGELU()
        self.attn = SelfAttention(block.attn.embed_dim, block.attn.num_heads)
        self.attn.qkv.weight, self.attn.qkv.bias = block.attn.in_proj_weight, block.attn.in_proj_bias
        self.attn.proj.weight, self.attn.proj.bias = block.attn.out_proj.weight, block.attn.out_proj.bias

    def attention_branch(self, x: Tensor, bias: Tensor | None) -> tuple[Tensor, AttentionContext]:
        attended, context = self.attn(self.ln_1(x), bias)
        return self.ls_1(attended), context

    def mlp_branch(self, x: Tensor) -> Tensor:
        return self.ls_2(self.mlp(self.ln_2(x)))


class CLIPEmbed(nn.Module):
    """Patches, CLS token, spatial positions and ln_pre of a CLIP ViT: (R, 3, H, W) -> (R, N, D)."""

    def __init__(self, visual: VisionTransformer):
        super().__init__()
        self.conv1, self.ln_pre = PatchProjection.of(visual.conv1), visual.ln_pre
        self.class_embedding, self.positional_embedding = visual.class_embedding, visual.positional_embedding

    def forward(self, images: Tensor) -> Tensor:
        patches = self.conv1(images.to(self.conv1.weight.dtype)).flatten(2).transpose(1, 2)
        cls = self.class_embedding.to(patches.dtype).expand(patches.shape[0], 1, -1)
        x = torch.cat([cls, patches], dim=1) + self.positional_embedding.to(patches.dtype)
        return self.ln_pre(x)


class CLIPHead(nn.Module):
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
    blocks: list[BlockAdapter] = [OpenCLIPBlock(block) for block in visual.transformer.resblocks]
    return Backbone(CLIPEmbed(visual), blocks, visual.ln_post, CLIPHead(visual), shape)


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
        quick_gelu=isinstance(first.mlp.gelu, OpenCLIPQuickGELU),
        norm_pre=not isinstance(visual.ln_pre, nn.Identity),
    )
