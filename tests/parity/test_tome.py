"""ToMe equals its original implementation: the matching by itself, and inside a ViT."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from open_clip.transformer import ResidualAttentionBlock
from parity.cases import Case, assert_close, find
from torch import Tensor, nn

from tempme_vl import MergeSchedule, VisualFrontend
from tempme_vl.backbones.base import Backbone, TowerShape
from tempme_vl.backbones.open_clip_blocks import OpenClipBlock
from tempme_vl.matching import bipartite_match

MERGES = [(case, part) for case in find("compressors", "tome_merge*") for part in case.config["cases"]]
VITS = [(case, part) for case in find("compressors", "tome_vit*") for part in case.config["cases"] if part["prop_attn"]]


def name(value: object) -> str:
    return value["key"] if isinstance(value, dict) else str(value)


@pytest.mark.parametrize(("case", "part"), MERGES, ids=name)
def test_matching(case: Case, part: dict) -> None:
    t, key, tolerance = case.tensors, part["key"], case.config["tol"]
    num_prefix = int(part["class_token"]) + int(part["distill_token"])
    order = "position" if num_prefix else "similarity"
    merge = bipartite_match(t["metric"], part["r_effective"], num_prefix, order)

    merged, size = merge.weighted_mean(t["x"], t["size"])
    unsized, ones = merge.weighted_mean(t["x"], torch.ones_like(t["size"]))
    source = torch.nn.functional.one_hot(merge.assignment, merged.shape[1]).transpose(1, 2)
    actual = {
        "x": merged,
        "size": size,
        "x_unsized": unsized,
        "size_unsized": ones,
        "source": source,
        "mean": merge.mean(t["x"]),
        "unmerge": merge.unmerge(t[f"{key}.x"]),
    }
    for what, value in actual.items():
        assert_close(value, t[f"{key}.{what}"], what, tolerance)


class Embed(nn.Module):
    """A timm ViT's patch embedding, CLS token and positions from a reference file's weights."""

    def __init__(self, weights: dict[str, Tensor]):
        super().__init__()
        self.weights = weights

    def forward(self, images: Tensor) -> Tensor:
        w, b = self.weights["patch_embed.proj.weight"], self.weights["patch_embed.proj.bias"]
        patches = nn.functional.conv2d(images, w, b, stride=w.shape[-1]).flatten(2).transpose(1, 2)
        cls = self.weights["cls_token"].expand(len(images), -1, -1)
        return torch.cat([cls, patches], dim=1) + self.weights["pos_embed"]


@pytest.mark.parametrize(("case", "part"), VITS, ids=name)
def test_inside_a_vit(case: Case, part: dict) -> None:
    arch, t, w = case.config["arch"], case.tensors, case.group("w.")
    names = {
        "norm1": "ln_1",
        "norm2": "ln_2",
        "attn.proj": "attn.out_proj",
        "mlp.fc1": "mlp.c_fc",
        "mlp.fc2": "mlp.c_proj",
    }
    blocks = []
    for layer in range(arch["depth"]):
        norm = partial(nn.LayerNorm, eps=arch["ln_eps"])
        block = ResidualAttentionBlock(arch["dim"], arch["heads"], arch["mlp_ratio"], norm_layer=norm)
        state = {}
        for key, value in case.group(f"w.blocks.{layer}.").items():
            for theirs, ours in names.items():
                key = key.replace(theirs, ours)
            state[key.replace("attn.qkv.", "attn.in_proj_")] = value
        block.load_state_dict(state)
        blocks.append(OpenClipBlock(block))
    shape = TowerShape(arch["img"], arch["patch"], arch["dim"], arch["heads"], arch["num_classes"], arch["mlp_ratio"])
    norm = nn.LayerNorm(arch["dim"], eps=arch["ln_eps"])
    norm.load_state_dict({"weight": w["norm.weight"], "bias": w["norm.bias"]})
    linear = nn.Linear(arch["dim"], arch["num_classes"])
    linear.load_state_dict({"weight": w["head.weight"], "bias": w["head.bias"]})
    schedule = MergeSchedule.tome(arch["depth"], frames=1, tokens=shape.tokens, r=part["r_list"])
    frontend = VisualFrontend(Backbone(Embed(w), blocks, norm, linear, shape), schedule)

    output = frontend(t["image"].unsqueeze(1), trace_source=True)
    key, tolerance = part["key"], case.config["tol"]
    assert output.tokens.shape[1] == part["n_tokens"] == schedule.output_tokens
    assert_close(output.tokens, t[f"{key}.tokens"], "tokens", tolerance)
    assert torch.equal(output.size, t[f"{key}.size"])
    source = torch.nn.functional.one_hot(output.source, part["n_tokens"]).transpose(1, 2)
    assert torch.equal(source, t[f"{key}.source"].long())
    assert_close(output.frames.squeeze(1), t[f"{key}.logits"], "logits", tolerance)
