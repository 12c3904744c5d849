"""Small towers with random weights, and one that shows which input tokens every output token holds."""

from __future__ import annotations

from typing import Any

import open_clip
import torch
import transformers
from torch import Tensor, nn

from tempme_vl import MergeSchedule, VisualFrontend
from tempme_vl.backbones.base import Backbone, BlockAdapter, TowerShape
from tempme_vl.backbones.open_clip import load_clip
from tempme_vl.backbones.open_clip_blocks import visual_backbone
from tempme_vl.merging import METHODS
from tempme_vl.scheduling import schedule_for
from tempme_vl.state import AttentionContext

TINY = "open_clip:tiny"  # 6 layers, 17 tokens of width 64 a frame
TINY_SHAPE = TowerShape(image_size=32, patch_size=8, width=64, heads=4, embed_dim=64)
# options that make another of a method's ways than the one without options
OTHER_WAYS: dict[str, list[dict[str, Any]]] = {
    "uniform": [{"drop": 5, "layer": 1}],
    "random": [{"drop": 10, "seed": 3}],
    "pool": [{"side": 3}, {"side": 4, "join": 2}],
    "testa": [
        {"r_temporal": 1, "r_spatial": 2, "strategy": "importance"},
        {"r_temporal": 1, "r_spatial": 2, "strategy": "prune"},
        {"r_temporal": 1, "r_spatial": 3},
    ],
    "centerclip": [
        {"clusters": 12, "merge_layers": (1,), "merge_frames": (1,), "centers": "mean"},
        {"clusters": 10, "algorithm": "spectral", "neighbours": -1},
    ],
}


# of few patches they cannot leave as few as the usual budget asks
FIRST_WAY: dict[str, dict[str, Any]] = {"sta": {"budget": 0.8}, "diffrate": {"budget": 0.8}}


def every_way(
    layers: int = 6, frames: int = 6, shape: TowerShape = TINY_SHAPE, others: bool = True
) -> list[MergeSchedule]:
    """Schedules of all methods for a tower: of their settings or the usual budget, and of `OTHER_WAYS`."""
    names = [
        name
        for name, method in METHODS.items()
        if (method.joint or not shape.joint) and (shape.num_prefix or "cls_rows" not in method.reads)
    ]
    return [
        schedule_for(name, layers, shape, frames, **options)
        for name in names
        for options in [FIRST_WAY.get(name, {}), *(OTHER_WAYS.get(name, []) if others else [])]
    ]


def way(schedule: MergeSchedule) -> str:
    """A name for a test."""
    return f"{schedule.method}-{schedule.frames}x{schedule.tokens}-{schedule.output_tokens}"


def small_clip(quick_gelu: bool = False, **vision: object) -> open_clip.CLIP:
    """A CLIP of 4 visual layers and 17 tokens of width 32; `vision` changes its vision_cfg."""
    torch.manual_seed(0)
    vision_cfg = {"image_size": 32, "layers": 4, "width": 32, "head_width": 16, "patch_size": 8, **vision}
    text_cfg = {"context_length": 12, "vocab_size": 100, "width": 32, "heads": 2, "layers": 2}
    return open_clip.CLIP(16, vision_cfg, text_cfg, quick_gelu)


def tiny_frontend(schedule: MergeSchedule) -> VisualFrontend:
    """The built-in tiny tower, its clip positions random."""
    torch.manual_seed(0)
    clip, config, *_ = load_clip("tiny")
    frontend = VisualFrontend(visual_backbone(clip.visual), schedule, config)
    frontend.init_clip_positions(0.1)
    return frontend


def tempme_schedule(frames: int = 6) -> MergeSchedule:
    """All steps of TempMe on the tiny tower: ImgMe, two joins, later blocks."""
    return MergeSchedule.tempme(6, frames, 17, 2, (2, 4), (2, frames // 2), 40, 20)


def random_video(frames: int, side: int = 32, videos: int = 2, dtype: torch.dtype = torch.float32) -> Tensor:
    """(videos, frames, 3, side, side) standard normal pixels, the same ones each time."""
    return torch.randn(videos, frames, 3, side, side, generator=torch.Generator().manual_seed(1), dtype=dtype)


class _CodedEmbed(nn.Module):
    """Every input token of a video as its own unit vector, beside its pixels (for CLS: the frame's mean patch)."""

    def __init__(self, frames: int, side: int):
        super().__init__()
        self.frames, self.side = frames, side

    def forward(self, images: Tensor) -> Tensor:
        patches = nn.functional.unfold(images, 2, stride=2).transpose(1, 2)
        pixels = torch.cat([patches.mean(1, keepdim=True), patches], dim=1)
        rows, tokens, _ = pixels.shape
        codes = torch.eye(self.frames * tokens, dtype=images.dtype).view(self.frames, tokens, -1)
        return torch.cat([codes.repeat(rows // self.frames, 1, 1), 9 * pixels], dim=-1)


class _IdleBlock(BlockAdapter):
    """Adds nothing; its keys are random projections of the tokens."""

    def __init__(self, width: int):
        super().__init__()
        self.register_buffer("projection", torch.randn(width, 8, dtype=torch.float64))

    def attention_branch(self, x: Tensor, bias: Tensor | None) -> tuple[Tensor, AttentionContext]:
        keys = (x @ self.projection).unflatten(-1, (2, -1)).transpose(1, 2)
        return torch.zeros_like(x), AttentionContext(keys, keys)

    def mlp_branch(self, x: Tensor) -> Tensor:
        return torch.zeros_like(x)


def coded_frontend(schedule: MergeSchedule) -> VisualFrontend:
    """A front end in float64 whose output tokens, times their size, begin with a 1 for each input token they hold."""
    torch.manual_seed(0)
    side = round((schedule.tokens - 1) ** 0.5)
    width = schedule.frames * schedule.tokens + 12
    blocks: list[BlockAdapter] = [_IdleBlock(width) for _ in schedule.plan]
    shape = TowerShape(image_size=2 * side, patch_size=2, width=width, heads=2, embed_dim=width)
    return VisualFrontend(
        Backbone(_CodedEmbed(schedule.frames, side), blocks, nn.Identity(), nn.Identity(), shape), schedule
    ).double()


def qwen_tower(config_class: Any, attention: str = "sdpa", **sizes: Any) -> nn.Module:
    """The vision tower of one of Qwen's models. Alone it has no public class in all versions of transformers, so it is
    taken from a whole model.

    Args:
        config_class: of the whole model.
        sizes: of the tower.
    """
    text: dict[str, Any] = {
        "num_hidden_layers": 1,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 32,
    }
    rotary = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 1, 1]}
    text |= {"hidden_size": 32, "intermediate_size": 32, "rope_parameters": rotary, "rope_scaling": rotary}
    config = config_class(vision_config=sizes, text_config=text)
    return transformers.AutoModel.from_config(config, attn_implementation=attention).visual.eval()
