"""The table equals the papers and real forwards; the fusion's cost is what torch counts."""

from __future__ import annotations

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from tempme_vl import create_frontend
from tempme_vl.evaluation.efficiency import cost_row, cost_table, format_costs, format_fusion, fusion_macs, fusion_table
from tempme_vl.evaluation.papers import BACKBONES, LAYERS, Setting
from tempme_vl.merging import METHODS, Encoder, has_setting
from tempme_vl.tasks.retrieval import create_retrieval_model
from tempme_vl.text import BertFusion, BertShape
from tempme_vl.tuning import TUNINGS, Full
from tempme_vl.tuning.vop import VopFrameAndContext

TINY = {"r": 1, "merge_layers": (2, 3, 4), "merge_frames": (2, 2, 2), "cross_percent": 30, "intra_percent": 10}


@pytest.fixture(scope="module")
def rows():
    return cost_table()


def found(rows, backbone, frames, method, tuning="lora", variant=""):
    key = (backbone, frames, method, tuning, variant)
    (row,) = [row for row in rows if (row.backbone, row.frames, row.method, row.tuning, row.variant) == key]
    return row


def test_what_is_sure_costs_what_the_papers_say(rows):
    """Fits to a paper's GFLOPs do, too; what is marked unverified need not."""
    sure = [row for row in rows if row.status != "unverified"]
    compared = [row for row in sure if row.paper_gflops is not None]
    assert len(compared) == 28 and all(abs(row.deviation) <= 0.3 for row in compared)
    counted = [row for row in sure if row.paper_tokens is not None]
    assert len(counted) == 9 and all(row.tokens == row.paper_tokens for row in counted)
    # rounded, or cut off, to a hundredth of a million
    weights = [row for row in sure if None not in (row.paper_params, row.trainable_params)]
    assert all(
        abs(row.trainable_params / 1e6 - row.paper_params) < 0.01 for row in weights if row.tuning != "mv_adapter"
    )


# GFLOPs as the papers' code computes them, for B/32 and B/16 with 12 frames, and weights that train
TUNED = [
    ("clip4clip", "", 53.03, 211.29, 123_540_993),
    ("lora", "", 53.03, 211.29, 491_520),
    ("dgl", "linear", 67.50, 251.29, 827_392),
    ("dgl", "linear, as run here", None, None, 827_392),
    ("dgl", "transformer", 67.50, 251.29, 9_575_168),
    ("vop", "basic", 61.39, 220.18, 122_880),
    ("vop", "basic, 4 + 4 prompts", 57.21, 215.73, 61_440),
    ("vop", "F+C", 58.00, 246.20, None),
    ("prompt", "", 58.25, 216.84, 76_800),
    ("adapter", "", 53.12, 211.66, 261_312),
    ("mv_adapter", "", 53.76, 214.12, 3_496_704),
    ("plevu", "", 53.10, 211.37, 6_350_336),
]


@pytest.mark.parametrize(("tuning", "variant", "b32", "b16", "weights"), TUNED, ids=str)
def test_tunings_cost_what_their_code_computes(rows, tuning, variant, b32, b16, weights):
    for backbone, gflops in (("B/32", b32), ("B/16", b16)):
        row = found(rows, backbone, 12, "none", tuning, variant)
        assert row.trainable_params == weights
        if gflops is not None:
            assert row.gflops == pytest.approx(gflops, abs=0.006)
        else:
            assert row.paper_gflops is None
            assert row.gflops < found(rows, backbone, 12, "none", tuning, "linear").gflops


def test_weights_that_a_method_learns_count_with_those_of_the_tuning(rows):
    assert found(rows, "B/32", 12, "tempme").trainable_params == 507_648
    assert found(rows, "B/32", 64, "tempme").trainable_params == 556_032
    assert found(rows, "B/16", 12, "tempme", "clip4clip").trainable_params == 123_540_993 + 21 * 768
    assert found(rows, "B/32", 12, "testa", "testa_clip").trainable_params == 589_824


def test_learnt_tokens_are_among_those_that_the_papers_count(rows):
    tokens = {"prompt": 2369, "vop": 2368, "dgl": 2416, "adapter": 2364}
    variants = {"vop": "F+C", "dgl": "linear"}
    for tuning, expected in tokens.items():
        assert found(rows, "B/16", 12, "none", tuning, variants.get(tuning, "")).tokens == expected
    assert found(rows, "B/16", 12, "none", "prompt", "as run here").tokens == 2364


def test_64_frames_cost_a_little_more_than_the_paper_says(rows):
    long = [row for row in rows if row.frames == 64 and row.paper_gflops is not None]
    assert len(long) == 3
    assert all(2 < row.deviation < 4 and row.status == "unverified" for row in long)


def test_the_table_has_every_method_and_tuning_and_says_what_is_a_fit(rows):
    keys = {(row.backbone, row.frames, row.method, row.tuning, row.variant) for row in rows}
    assert len(keys) == len(rows)
    for backbone in ("B/32", "B/16"):
        encoder = Encoder(LAYERS, 12, BACKBONES[backbone].tokens)
        with_setting = {method for method in METHODS if has_setting(method, encoder, ())}
        assert {row.method for row in rows if row.backbone == backbone} == with_setting
        # that of TESTA stands beside its merging, which has a setting of B/32
        tunings = {row.tuning for row in rows if row.backbone == backbone}
        assert tunings == {*TUNINGS} - ({"testa_clip"} if backbone == "B/16" else set()) | (tunings & {"rap"})
    of_status = {
        status: {(row.backbone, row.method, row.tuning) for row in rows if row.status == status and row.frames == 12}
        for status in ("fitted", "unverified")
    }
    layouts = {(backbone, "none", name) for backbone in ("B/32", "B/16") for name in ("prompt", "adapter", "vop")}
    settings = {("B/32", name, "lora") for name in ("reduction_only", "diffrate", "sta", "testa")}
    more = {("B/32", "testa", "testa_clip"), ("UMT4Clip B/16", "tempme", "full")}
    assert of_status["fitted"] == layouts | settings | more
    assert of_status["unverified"] == {
        ("B/16", "reduction_only", "lora"),
        ("UMT4Clip B/16", "tempme", "full"),
        ("B/16", "none", "rap"),
    }
    assert {row.tokens for row in rows if row.method == "temporal_only"} == {600, 3200, 2364, 12608}
    shown = format_costs(rows)
    for words in ("a fit, not the paper's setting", "plausible guess", "RAP has no public code", "14.10 M weights"):
        assert words in shown
    assert len(shown.splitlines()) > len(rows)


def test_what_nobody_can_compute_has_its_row(rows):
    row = found(rows, "B/16", 12, "none", "rap")
    assert (row.gflops, row.tokens, row.trainable_params, row.paper_gflops, row.deviation) == (None,) * 5
    assert row.paper_params == 1.06 and "no public code" in row.note
    with pytest.raises(ValueError, match="has no public code: choose vop"):
        create_retrieval_model("open_clip:tiny", None, "none", 4, VopFrameAndContext())


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
    row = cost_row(Setting(backbone, 12, method, Full()))
    assert frontend.gflops() == row.gflops
    assert row.input_tokens == 2352 and frontend.schedule.output_tokens == row.tokens == tokens


@pytest.mark.parametrize(
    "backbone, model, tokens",
    [
        ("B/32", "open_clip:ViT-B-32-quickgelu", 97),
        pytest.param("UMT4Clip B/16", "umt:b16", 185, marks=pytest.mark.slow),
    ],
)
def test_predicted_tokens_of_tempme_are_those_of_a_real_tower(backbone, model, tokens):
    row = cost_row(Setting(backbone, 12, "tempme"))
    frontend = create_frontend(model)
    with torch.no_grad():
        out = frontend(torch.randn(1, 12, 3, 224, 224))
    assert out.tokens.shape[1] == row.tokens == tokens
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


def test_fusion_rows_take_their_tokens_from_the_table(rows):
    pairs = fusion_table(rows)
    assert [(row.method, row.variant, row.tokens) for row in pairs] == [
        ("none", "", 2352),
        ("none", "", 2352),
        ("tempme", "", 185),
        ("tempme", "as in CLIP", 125),
    ]
    assert all(row.saved == pytest.approx(100 * (row.macs - row.cached_macs) / row.macs) for row in pairs)
    shown = format_fusion(pairs)
    assert "9.47" in shown and "1.26" in shown and "linear layers and attention products" in shown
