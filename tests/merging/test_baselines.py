"""The plain baselines and the two halves of TempMe: what each leaves, where it works, and what it refuses."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.nn.functional import avg_pool2d
from towers import TINY, coded_frontend, random_video

from tempme_vl import create_frontend, make_schedule
from tempme_vl.compressors import FrameFeatures
from tempme_vl.integrations.reduction import make_plan, merge
from tempme_vl.recipes.build import merging
from tempme_vl.recipes.options.shared import MergeOptions, RunOptions
from tempme_vl.state import AttentionContext, TokenState

VIDEO = random_video(4, dtype=torch.float64)


def kept(method: str, frames: int = 4, prefix: int = 1, **options: Any) -> torch.Tensor:
    """(2, F, 16) bool: the patches of a video of 8 x 8 pixels that stay in each frame."""
    schedule = make_schedule(method, 2, frames, 17, 1, **options)
    source = coded_frontend(schedule)(random_video(frames, 8, dtype=torch.float64), trace_source=True).source
    return source.unflatten(1, (frames, 17))[:, :, 1:] >= 0


def test_uniform_keeps_the_middle_of_equal_parts() -> None:
    for drop, places in ((12, [2, 6, 10, 14]), (13, [2, 8, 13]), (15, [8]), (0, list(range(16)))):
        found = kept("uniform", drop=drop)
        assert all(frame.nonzero().flatten().tolist() == places for video in found for frame in video), drop


def test_random_choices_follow_from_the_seed_and_the_frame_alone() -> None:
    first = kept("random", drop=12)
    assert torch.equal(first, kept("random", drop=12)) and torch.equal(first[0], first[1]), "any video, any time"
    assert [frame.nonzero().flatten().tolist() for frame in first[0]] == DRAWN, "on any machine"
    assert len({tuple(frame.tolist()) for frame in first[0]}) == 4, "each frame its own"
    assert not torch.equal(first, kept("random", drop=12, seed=1))
    assert (kept("random", drop=9).sum(2) == 7).all()


# what seed 0 leaves of 4 frames of 16 patches: not to change
DRAWN = [[1, 8, 11, 15], [1, 6, 11, 15], [1, 5, 11, 12], [4, 7, 8, 11]]


def test_random_choices_are_even() -> None:
    """Of 16 patches 8 stay 400 times: each 200 times, with a standard deviation of 10 (binomial)."""
    counts = sum(kept("random", frames=8, drop=8, seed=seed)[0].sum(0) for seed in range(50))
    assert counts.sum() == 3200 and (counts - 200).abs().max() < 40


def test_pooled_patches_are_the_mean_of_their_windows() -> None:
    frontend = create_frontend(TINY, method="pool", num_frames=2, side=2, layer=0).double()
    start = torch.randn(4, 17, 64, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    state = frontend.blocks[0].before_attention(TokenState.start(start, 2, 1), AttentionContext.of_tokens(start))
    grid = start[:, 1:].transpose(1, 2).unflatten(2, (4, 4))
    torch.testing.assert_close(state.x[:, 1:], avg_pool2d(grid, 2).flatten(2).transpose(1, 2))
    assert torch.equal(state.x[:, 0], start[:, 0]) and (state.size[:, 1:] == 4).all()


def test_windows_of_a_grid_that_does_not_divide() -> None:
    schedule = make_schedule("pool", 1, 1, 17, side=3)
    output = coded_frontend(schedule)(random_video(1, 8, dtype=torch.float64), trace_source=True)
    assert output.source[0].tolist() == [0, 1, 1, 2, 3, 1, 1, 2, 3, 4, 4, 5, 6, 7, 7, 8, 9]
    assert output.size[0].flatten().tolist() == [1, 4, 2, 2, 2, 1, 1, 2, 1, 1]


@pytest.mark.parametrize("method", ["random", "uniform", "pool"])
def test_a_joint_encoder_has_the_same_of_every_frame(method: str) -> None:
    options = {"side": 2} if method == "pool" else {"drop": 12}
    torch.manual_seed(0)
    frontend = create_frontend("umt:tiny", method=method, num_frames=4, mode="joint", **options)
    patches = frontend.shape.tokens
    output = frontend(random_video(4), trace_source=True)
    assert output.tokens.shape[1] == frontend.schedule.output_tokens == 4 * (4 if method == "pool" else patches - 12)
    source = output.source.unflatten(1, (4, patches))
    each = [len(frame[frame >= 0].unique()) for frame in source[0]]
    assert each == [output.tokens.shape[1] // 4] * 4
    if method != "random":  # the same places in each frame, one behind the other
        step = output.tokens.shape[1] // 4
        assert all(
            torch.equal(source[0, i], torch.where(source[0, 0] < 0, -1, source[0, 0] + i * step)) for i in range(4)
        )


def test_baselines_behind_a_tower() -> None:
    torch.manual_seed(0)
    frames = FrameFeatures(torch.randn(3, 20, 8), (4, 5), (torch.randn(3, 20, 6),))
    pooled = merge(frames, make_plan("pool", 3, (4, 5), {}))  # windows of 2 x 2, the last column alone
    expected = avg_pool2d(frames.x.transpose(1, 2).unflatten(2, (4, 5)), 2, ceil_mode=True)
    assert pooled.x.shape == (18, 8) and pooled.deeper[0].shape == (18, 6)
    torch.testing.assert_close(pooled.x.unflatten(0, (3, 6))[:, [0, 3]], expected.flatten(2).transpose(1, 2)[:, [0, 3]])
    for method in ("random", "uniform"):
        clips = merge(frames, make_plan(method, 3, (4, 5), {"percent": 75}))
        assert clips.x.shape == (15, 8) and torch.equal(clips.x, frames.x.flatten(0, 1)[clips.source])
        assert torch.equal(clips.deeper[0], frames.deeper[0].flatten(0, 1)[clips.source])


def test_temporal_modelling_alone_attends_across_frames_to_all_tokens() -> None:
    schedule = make_schedule("temporal_only", 12, 12, 50)
    assert schedule.token_counts == [(12, 50)] * 8 + [(6, 100), (3, 200), (1, 600), (1, 600)]
    assert schedule.gflops() == pytest.approx(54.23, abs=0.005)
    frontend = create_frontend(TINY, method="temporal_only", num_frames=6, merge_layers=(1, 4), merge_frames=(2, 3))
    assert {layer: tuple(p.shape) for layer, p in frontend.clip_positions.items()} == {"1": (6, 64), "4": (3, 64)}
    video = random_video(6)
    other = torch.cat([video[:, :5], video[:, 5:] + 1], dim=1)
    before, after = frontend(video).frames, frontend(other).frames
    assert ((before - after).abs().amax((0, 2)) > 1e-6).all(), "every frame sees the last one"


def test_token_reduction_alone_never_leaves_a_frame() -> None:
    schedule = make_schedule("reduction_only", 12, 12, 50)
    assert [clips for clips, _ in schedule.token_counts] == [12] * 12
    assert schedule.gflops() == pytest.approx(34.7, abs=0.01), "as published; the percentage is a fit to it"
    frontend = create_frontend(TINY, method="reduction_only", num_frames=6, budget=0.5)
    assert not frontend.clip_positions
    video = random_video(6)
    other = torch.cat([video[:, :5], video[:, 5:] + 1], dim=1)
    assert torch.equal(frontend(video).frames[:, :5], frontend(other).frames[:, :5])
    clips = merge(FrameFeatures(torch.randn(4, 9, 6), (3, 3)), make_plan("reduction_only", 4, (3, 3), {"steps": 1}))
    assert clips.x.shape == (24, 6)


@pytest.mark.parametrize(
    ("method", "options", "message"),
    [
        ("random", {"drop": 16}, "each frame has 16 patches, of which at least 1 has to stay; got 16 fewer"),
        ("uniform", {"drop": 3, "layer": 6}, r"layer is one of the blocks 0\.\.5; got 6"),
        ("random", {"drop": 3, "seed": -1}, "method 'random', 'seed': expected a whole number from 0"),
        ("uniform", {"drop": 0.5}, "method 'uniform', 'drop': expected a whole number"),
        ("pool", {"side": 5}, "pool makes a square grid coarser; got side=5 for 16 patches"),
        ("temporal_only", {"budget": 0.5}, "budget=0.5 cannot be reached by temporal_only"),
        ("temporal_only", {"merge_layers": (1,), "merge_frames": (4,)}, r"6 frames do not divide by the joins \[4\]"),
        ("reduction_only", {"r": 1, "merge_layers": (9,), "cross_percent": 1, "intra_percent": 1}, "within 0..5"),
    ],
)
def test_refusals(method: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        create_frontend(TINY, method=method, num_frames=6, **options)


def test_temporal_modelling_is_refused_where_nothing_attends() -> None:
    with pytest.raises(
        ValueError, match="'temporal_only' does not work behind a tower: it changes which tokens attend"
    ):
        make_plan("temporal_only", 4, (2, 5), {})
    with pytest.raises(ValueError, match="'reduction_only' keeps frames apart or joins frames step by step"):
        create_frontend("umt:tiny", method="reduction_only", num_frames=4, mode="joint", budget=0.5)


def test_the_seed_of_training_is_no_methods() -> None:
    options = SimpleNamespace(**{**vars(MergeOptions(method="random")), "seed": RunOptions.seed + 7})
    assert "seed" not in merging(options, 4)
    given = SimpleNamespace(**{**vars(options), "method_options": ("seed=3",)})
    assert merging(given, 4)["seed"] == 3
