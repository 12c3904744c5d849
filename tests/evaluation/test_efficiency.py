"""The table equals the paper and real forwards; the fusion's cost is what torch counts."""

from __future__ import annotations

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from tempme_vl import create_frontend
from tempme_vl.evaluation.efficiency import (
    PAPER_GFLOPS,
    cost_row,
    cost_table,
    format_costs,
    format_fusion,
    fusion_macs,
    fusion_table,
)
from tempme_vl.text import BertFusion, BertShape

TINY = {"r": 1, "merge_layers": (2, 3, 4), "merge_frames": (2, 2, 2), "cross_percent": 30, "intra_percent": 10}


@pytest.mark.parametrize("key", [key for key in PAPER_GFLOPS if key[1] == 12], ids=str)
def test_12_frames_cost_what_the_paper_says(key):
    row = cost_row(*key)
    fitted = {("UMT4Clip B/16", "tempme"), *(("B/32", name) for name in ("reduction_only", "diffrate", "sta"))}
    assert row.verified == ((row.backbone, row.method) not in fitted)
    assert row.gflops == pytest.approx(row.paper_gflops, rel=0.002)
    assert abs(row.deviation) <= 0.2
    if row.paper_tokens is not None:
        assert row.output_tokens == row.paper_tokens


def test_64_frames_cost_a_little_more_than_the_paper_says():
    rows = [row for row in cost_table() if row.frames == 64 and row.paper_gflops is not None]
    assert len(rows) == 3
    assert all(2 < row.deviation < 4 for row in rows)


def test_the_table_has_every_method_and_marks_guessed_settings():
    rows = cost_table()
    assert len({(row.backbone, row.frames, row.method) for row in rows}) == len(rows) == 30
    assert {(row.backbone, row.frames, row.method) for row in rows if row.paper_gflops} == set(PAPER_GFLOPS)
    unverified = [row for row in rows if not row.verified]
    assert {(row.backbone, row.method) for row in unverified if row.frames == 64} == {
        (backbone, method) for backbone in ("B/32", "B/16") for method in ("tempme", "temporal_only")
    }
    assert {(row.backbone, row.method) for row in unverified if row.frames == 12} == {
        ("UMT4Clip B/16", "tempme"),
        ("UMT4Clip B/16", "tempme as in CLIP"),
        *(("B/32", method) for method in ("reduction_only", "diffrate", "sta", "testa")),
    }
    assert {row.output_tokens for row in rows if row.method == "temporal_only"} == {600, 3200, 2364, 12608}
    shown = format_costs(rows)
    assert shown.count(" * ") == 4 and shown.count(" + ") == 2 and shown.count(" f ") == 4
    assert "unverified" in shown and "a fit, not the paper's" in shown.replace("\n", " ")


@pytest.mark.parametrize(
    "model, method, options",
    [
        ("open_clip:tiny", "none", {}),
        ("open_clip:tiny", "tome", {"r": 1}),
        ("open_clip:tiny", "tempme", TINY),
        ("umt:tiny", "none", {"mode": "joint"}),
        ("umt:tiny", "none", {"mode": "per_frame"}),
        ("umt:tiny", "tempme", TINY),
    ],
)
def test_predicted_tokens_are_those_of_a_forward(model, method, options):
    frontend = create_frontend(model, None, method, 8, **options)
    counts = []
    for block in frontend.blocks:
        block.register_forward_hook(lambda _, __, state: counts.append((state.num_clips, state.x.shape[1])))
    with torch.no_grad():
        out = frontend(torch.randn(2, 8, 3, 32, 32))
    assert counts == frontend.schedule.token_counts
    assert out.tokens.shape[1] == frontend.schedule.output_tokens


@pytest.mark.parametrize(
    "mode, backbone, method, tokens",
    [
        ("joint", "UMT B/16", "none", 2352),
        ("per_frame", "UMT4Clip B/16", "none", 2352),
        ("per_frame", "UMT4Clip B/16", "tempme", 185),
    ],
)
def test_umt_rows_are_those_of_the_real_tower(mode, backbone, method, tokens):
    with torch.device("meta"):
        frontend = create_frontend("umt:b16", None, method, mode=mode)
    row = cost_row(backbone, 12, method)
    assert frontend.gflops() == row.gflops
    assert row.input_tokens == 2352 and frontend.schedule.output_tokens == row.output_tokens == tokens


@pytest.mark.parametrize(
    "backbone, model, tokens",
    [
        ("B/32", "open_clip:ViT-B-32-quickgelu", 97),
        pytest.param("UMT4Clip B/16", "umt:b16", 185, marks=pytest.mark.slow),
    ],
)
def test_predicted_tokens_of_tempme_are_those_of_a_real_tower(backbone, model, tokens):
    row = cost_row(backbone, 12, "tempme")
    frontend = create_frontend(model)
    with torch.no_grad():
        out = frontend(torch.randn(1, 12, 3, 224, 224))
    assert out.tokens.shape[1] == row.output_tokens == tokens
    assert int(out.size.sum()) == row.input_tokens
    assert frontend.gflops() == row.gflops


@pytest.mark.parametrize("cross_width", [64, 48])
def test_fusion_costs_what_torch_counts(cross_width):
    """Attention as plain products: some versions of torch count nothing of its fused kernel for CPUs."""
    shape, pairs, words, tokens = BertShape.named("tiny", cross_width=cross_width), 3, 7, 11
    fusion = BertFusion(shape).eval()
    with torch.no_grad(), FlopCounterMode(display=False) as projected:
        keys = fusion.keys_values(torch.randn(1, tokens, cross_width))
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as fused:
        fusion(torch.randn(pairs, words, 64), torch.ones(pairs, words), keys.expand(pairs))
    cached = fusion_macs(tokens, words, shape, cached=True)
    assert fused.get_total_flops() == 2 * pairs * cached
    assert projected.get_total_flops() == 2 * (fusion_macs(tokens, words, shape) - cached)


def test_fusion_of_umt_b():
    """Per pair, and for a test split: 1000 x 128 candidates in both directions, keys of a video computed once."""
    assert fusion_macs(2352) / 1e9 == pytest.approx(9.47, abs=0.005)
    assert fusion_macs(125) / 1e9 == pytest.approx(1.26, abs=0.005)
    pairs, videos = 2 * 128 * 1000, 1000
    for tokens, anew, cached in ((2352, 2424, 301), (125, 322, 209)):
        a, c = fusion_macs(tokens), fusion_macs(tokens, cached=True)
        assert pairs * a / 1e12 == pytest.approx(anew, abs=0.5)
        assert (pairs * c + videos * (a - c)) / 1e12 == pytest.approx(cached, abs=0.5)


def test_fusion_rows_take_their_tokens_from_the_table():
    rows = fusion_table()
    assert [(row.method, row.tokens) for row in rows] == [
        ("none", 2352),
        ("none", 2352),
        ("tempme", 185),
        ("tempme as in CLIP", 125),
    ]
    assert all(row.saved == pytest.approx(100 * (row.macs - row.cached_macs) / row.macs) for row in rows)
    shown = format_fusion(rows)
    assert "9.47" in shown and "1.26" in shown and "linear layers and attention products" in shown
