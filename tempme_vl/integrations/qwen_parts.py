"""What a Qwen vision tower consists of, and what goes into its first block: Qwen2-VL, Qwen2.5-VL, Qwen3-VL and its MoE.

Letters: N blocks of 2x2 patches of all videos, u patches of a block; D the tower's width, d that of a head.
"""

from __future__ import annotations

import inspect
from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from tempme_vl.libraries import undocumented

Grid: TypeAlias = tuple[int, int, int]  # of a video: temporal patches, rows and columns of patches

# classes whose forward is written out here, and what their towers have
_PLAIN = {"patch_embed", "rotary_pos_emb", "blocks", "merger"}
_PLACED = {*_PLAIN, "pos_embed"}
_DEEP = {*_PLACED, "deepstack_merger_list"}
_CHILDREN = {
    "Qwen2VisionTransformerPretrainedModel": _PLAIN,
    "Qwen2_5_VisionTransformerPretrainedModel": _PLAIN,
    "Qwen3VLVisionModel": _DEEP,
    "Qwen3VLMoeVisionModel": _DEEP,
    "Qwen3_5VisionModel": _PLACED,
    "Qwen3_5MoeVisionModel": _PLACED,
}
_BLOCK = {"norm1", "norm2", "attn", "mlp"}
_ATTENTION = {"qkv", "proj"}


@dataclass(frozen=True)
class Layout:
    """The blocks of all videos as the tower orders them.

    Attributes:
        order: (N,) int64, the number that each has in the order of the pixels; None where that is the same.
        lengths: of segments before anything merges, in blocks: "full", each slot, and "windows".
        longest: of each.
        full_at: blocks of the tower that see whole slots.
    """

    order: Tensor | None
    lengths: Mapping[str, Tensor]
    longest: Mapping[str, int]
    full_at: Container[int]


@undocumented("transformers")
def check_tower(tower: Any) -> None:
    """Whether `run_tower` knows all that a tower does.

    Raises:
        ValueError: another forward, children that are unknown or missing, or an older transformers.
    """
    kind = next(kind.__name__ for kind in type(tower).__mro__ if "forward" in vars(kind))
    if kind not in _CHILDREN:
        raise ValueError(
            f"expected a tower with the forward of {', '.join(_CHILDREN)}; got {type(tower).__name__} with that of "
            f"{kind}: merge behind this tower"
        )
    _check_children(tower, _CHILDREN[kind])
    for block in tower.blocks:
        _check_children(block, _BLOCK)
        _check_children(block.attn, _ATTENTION)
    if "position_ids" not in inspect.signature(tower.rotary_pos_emb.forward).parameters:
        raise ValueError(
            f"rotary_pos_emb of {type(tower).__name__} takes no position_ids in this transformers; update transformers "
            "to merge inside the tower"
        )


def _check_children(module: nn.Module, wanted: set[str]) -> None:
    there = {name for name, _ in module.named_children()}
    if there != wanted:
        raise ValueError(
            f"expected {type(module).__name__} with {', '.join(sorted(wanted))}; got "
            f"{', '.join(sorted(there))}. What another child does is unknown: merge behind this tower"
        )


def layout_of(tower: Any, grids: Sequence[Grid], device: torch.device) -> Layout:
    """The host's order and windows. On CPU, where its functions count in Python."""
    from transformers import vision_utils

    unit = tower.spatial_merge_size**2
    full = torch.tensor([h * w // unit for t, h, w in grids for _ in range(t)])
    if not hasattr(tower, "fullatt_block_indexes"):
        return Layout(None, {"full": full.to(device)}, {"full": int(full.max())}, range(len(tower.blocks)))
    order, ends = vision_utils.get_vision_window_index(
        torch.tensor(grids), tower.spatial_merge_size, tower.window_size, tower.patch_size
    )
    windows = ends.long().diff() // unit
    lengths, longest = {"full": full, "windows": windows}, {"full": int(full.max()), "windows": int(windows.max())}
    return Layout(
        order.to(device),
        {name: each.to(device) for name, each in lengths.items()},
        longest,
        tower.fullatt_block_indexes,
    )


def embedded(tower: Any, pixels: Tensor, grids: Sequence[Grid], order: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """What goes into the first block.

    Args:
        order: of the blocks; see `Layout`.

    Returns:
        (N * u, D), and cosines and sines of the angles of each patch, (N * u, 1, 1, d) float.
    """
    x = tower.patch_embed(pixels)
    if hasattr(tower, "pos_embed"):
        x = x + _learned_positions(tower, torch.tensor(grids, device=x.device)).to(x.dtype)
    return ordered(x, order, tower), *patch_angles(tower, x, grids, order)


def patch_angles(tower: Any, x: Tensor, grids: Sequence[Grid], order: Tensor | None) -> tuple[Tensor, Tensor]:
    """Cosines and sines of the angles of each patch, (N * u, 1, 1, d) float.

    Args:
        x: (N * u, ...), of the device and type that the tower computes in.
        order: see `embedded`.
    """
    from transformers import vision_utils

    grid = torch.tensor(grids, device=x.device)
    positions = vision_utils.get_vision_position_ids(grid, tower.spatial_merge_size)
    cosines, sines = (ordered(t, order, tower) for t in _angles(tower.rotary_pos_emb, x, positions))
    return cosines[:, None, None].float(), sines[:, None, None].float()


def ordered(x: Tensor, order: Tensor | None, tower: Any) -> Tensor:
    """Patches (N * u, ...) with their blocks in another order."""
    return x if order is None else x.unflatten(0, (-1, tower.spatial_merge_size**2))[order].flatten(0, 1)


def _learned_positions(tower: Any, grid: Tensor) -> Tensor:
    """(N, D), the table of positions at the size of each grid."""
    from transformers import vision_utils

    side, merge = tower.num_grid_per_side, tower.spatial_merge_size
    if hasattr(vision_utils, "get_vision_interpolation_indices_and_weights"):
        index, weight = vision_utils.get_vision_interpolation_indices_and_weights(
            grid,
            num_grid_per_side=side,
            mode=tower.interpolation_mode,
            align_corners=tower.interpolation_align_corners,
            spatial_merge_size=merge,
        )
        return (tower.pos_embed(index) * weight[:, :, None]).sum(1)
    index, weight = vision_utils.get_vision_bilinear_indices_and_weights(grid, side, merge)
    return (tower.pos_embed(index) * weight[:, :, None]).sum(0)


def _angles(rotary: Any, x: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
    """Cosines and sines, (N, d) each; older modules give the angles of one half of d."""
    if "x" in inspect.signature(rotary.forward).parameters:
        return rotary(x, positions)
    half = rotary(positions).reshape(len(x), -1)
    angles = torch.cat((half, half), dim=-1)
    return angles.cos(), angles.sin()
