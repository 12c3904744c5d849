"""Every method on towers of every family: as many tokens as predicted, sizes and sources that add up, gradients."""

from __future__ import annotations

from copy import deepcopy

import pytest
import timm
import torch
import transformers
from towers import every_way, random_video, small_clip, way

from tempme_vl import VisualFrontend, create_frontend
from tempme_vl.backbones import hf
from tempme_vl.backbones.base import Backbone
from tempme_vl.backbones.open_clip_blocks import visual_backbone
from tempme_vl.backbones.timm import backbone_of
from tempme_vl.merging import METHODS
from tempme_vl.scheduling import schedule_for

FRAMES = 4
SIZE = {"hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 4, "image_size": 32, "patch_size": 8}
TIMM = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 4, "num_heads": 4, "num_classes": 0}
HF = {
    "clip": (transformers.CLIPVisionModel, transformers.CLIPVisionConfig),
    "siglip": (transformers.SiglipVisionModel, transformers.SiglipVisionConfig),
}
SLOW = ("open_clip", "timm", "hf clip")  # each like one of the others, or a tower of other tests
TOWERS = (
    "umt apart",
    "umt joint",
    "timm registers",
    "hf siglip",
    *(pytest.param(name, marks=pytest.mark.slow) for name in SLOW),
)


def tower(name: str) -> Backbone:
    torch.manual_seed(0)
    family, _, kind = name.partition(" ")
    if family == "open_clip":
        return visual_backbone(small_clip().visual)
    if family == "umt":
        mode = "joint" if kind == "joint" else "per_frame"
        frontend = create_frontend("umt:tiny", method="none", num_frames=FRAMES, mode=mode)
        blocks = [block.block for block in frontend.blocks]
        return Backbone(frontend.embed, blocks, frontend.norm, frontend.head, frontend.shape)
    if family == "timm":
        options = {**TIMM, "reg_tokens": 4} if kind else TIMM
        return backbone_of(timm.create_model("vit_tiny_patch16_224", **options))[0]
    model, config = HF[kind]
    return hf.backbone_of(model(config(**SIZE, intermediate_size=64)))[0]


@pytest.mark.parametrize("name", TOWERS)
def test_every_method_on_a_tower(name: str) -> None:
    backbone, video = tower(name), random_video(FRAMES)
    shape, inputs = backbone.shape, FRAMES * backbone.shape.tokens
    if not shape.num_prefix:
        for method in (name for name, record in METHODS.items() if "cls_rows" in record.reads):
            with pytest.raises(ValueError, match=r"this tower has none|a joint encoder's are one clip"):
                schedule_for(method, len(backbone.blocks), shape, FRAMES)
    for schedule in every_way(len(backbone.blocks), FRAMES, shape):
        frontend = VisualFrontend(deepcopy(backbone), schedule)
        output, last = (
            frontend(video, torch.tensor([[1, 1, 1, 0], [1] * 4]), trace_source=True),
            schedule.layer_counts[-1],
        )
        assert output.tokens.shape[1] == last.clips * last.out == schedule.output_tokens, way(schedule)
        dropped = (output.source < 0).sum(1)
        assert torch.equal(output.size.sum((1, 2)).long() + dropped, torch.full((2,), inputs)), way(schedule)
        held = output.source[0][output.source[0] >= 0].bincount(minlength=schedule.output_tokens)
        assert torch.equal(held, output.size[0].flatten().long()), way(schedule)
        output.pooled.sum().backward()
        gradients = [p.grad for block in frontend.blocks for p in block.parameters() if p.grad is not None]
        assert gradients and all(gradient.isfinite().all() for gradient in gradients), way(schedule)
