"""What compressors read of a tower, against reference towers: attention that is received, and what sums up a frame."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from parity.cases import FOLDER, Case, assert_close
from torch import Tensor, nn
from torch.nn import functional as F
from towers import qwen_tower

from tempme_vl.backbones import hf
from tempme_vl.frontend import VisualFrontend
from tempme_vl.integrations.qwen_readings import last_attention, readings, watched
from tempme_vl.integrations.readings import Watch, pooling_head, read_videos
from tempme_vl.merging import MergeSchedule

CASES = [Case(path) for path in sorted((FOLDER / "videollm").glob("scores_*.json"))]
QWEN = [case for case in CASES if str(case).startswith("scores_qwen")]  # none in tests/parity/data: they are large
SIGLIP = [case for case in CASES if str(case).startswith("scores_siglip")]


def tower_of(case: Case) -> Any:
    given, weights = case.config["config"], case.group("w.")
    sizes: dict[str, Any] = {
        "depth": given["depth"],
        "hidden_size": given["hidden"],
        "num_heads": given["heads"],
        "out_hidden_size": given["out"],
        "patch_size": given["patch"],
    }
    if "window" in given:
        kind: Any = transformers.Qwen2_5_VLConfig
        sizes |= {"window_size": given["window"], "fullatt_block_indexes": given["fullatt"]}
        sizes["intermediate_size"] = len(weights["blocks.0.mlp.gate_proj.weight"])
    else:
        kind = transformers.Qwen3VLConfig
        sizes |= {"deepstack_visual_indexes": given["deepstack"]}
        sizes |= {"num_position_embeddings": given["num_position_embeddings"]}
        sizes["intermediate_size"] = len(weights["blocks.0.mlp.linear_fc1.weight"])
    model = qwen_tower(kind, **sizes)
    model.load_state_dict(weights)
    return model


@pytest.mark.parametrize("case", QWEN, ids=str)
@torch.no_grad()
def test_qwen(case: Case) -> None:
    grid, expected, tolerance = case.config["config"]["grid_thw"], case.tensors, case.config["tol"]
    tower = tower_of(case)
    with watched(tower) as seen:
        output = tower(expected["in.pixels"], grid_thw=torch.tensor([grid]))
    x = output.pooler_output
    assert_close(x, expected["out.features"], "features", tolerance)
    (attention,) = last_attention(tower, seen[0], [tuple(grid)])
    known = readings(("received", "summary", "keys"), attention, x.unflatten(0, (grid[0], -1)), 4)
    assert_close(known["received"], expected["out.flashvid"], "received", tolerance)
    if "out.fastvid" in expected:
        assert_close(known["summary"][1], expected["out.fastvid"], "summary", tolerance)


@pytest.mark.parametrize("case", SIGLIP, ids=str)
@torch.no_grad()
def test_siglip(case: Case) -> None:
    given, expected, weights = case.config["config"], case.tensors, case.group("w.")
    config = transformers.SiglipVisionConfig(
        hidden_size=given["D"],
        intermediate_size=len(weights["encoder.layers.0.mlp.fc1.weight"]),
        num_hidden_layers=given["layers"],
        num_attention_heads=given["heads"],
        image_size=given["image"],
        patch_size=given["patch"],
    )
    tower = transformers.SiglipVisionModel(config).eval()
    inner: nn.Module = getattr(tower, "vision_model", tower)
    inner.load_state_dict(weights)
    images, side = expected["in.images"], given["image"] // given["patch"]

    backbone, _ = hf.backbone_of(tower, -2)  # the layer that LLaVA's hosts take
    frames = len(images)
    frontend = VisualFrontend(backbone, MergeSchedule.identity(len(backbone.blocks), frames, side**2, 0))
    watch = Watch()
    frontend.blocks[-1].after_attention = watch
    tokens = frontend(images.unsqueeze(0)).tokens.unflatten(1, (frames, -1))
    assert_close(tokens[0], expected["out.features"], "features", case.config["tol"])

    def pool(values: Tensor) -> Tensor:
        image = values.transpose(1, 2).unflatten(2, (side, side))
        half = -(-side // 2)
        return F.interpolate(image, (half, half), mode="bilinear").flatten(2).transpose(1, 2)

    assert watch.seen is not None and pooling_head(tower) is not None
    for ending, by in (("", lambda values: values), ("_pooled", pool)):
        (known,) = read_videos(("received", "summary"), watch.seen, tokens, 0, tower, by)
        vector, weight = known["summary"]
        assert_close(known["received"], expected[f"out.mean_attention{ending}"], "received", case.config["tol"])
        assert_close(weight, expected[f"out.head_attention{ending}"], "head", case.config["tol"])
        assert_close(vector, expected["out.head_pooled"], "summary", case.config["tol"])
