"""Schedules for a budget of GFLOPs or of tokens: never above it, close below it, the paper's where it has one."""

from __future__ import annotations

import itertools
import logging
from typing import Any

import pytest
import torch

from tempme_vl import MergeSchedule, VisualFrontend, create_frontend
from tempme_vl.backbones.base import Backbone, BlockAdapter, TowerShape
from tempme_vl.merging import make_schedule
from tempme_vl.scheduling import schedule_for, tower_gflops


def tower(
    layers: int, image: int, patch: int, width: int, heads: int, prefix: int = 1, joint: bool = False
) -> Backbone:
    """The shape of a tower, without weights."""
    shape = TowerShape(image, patch, width, heads, 512, norm_pre=False, num_prefix=prefix, joint=joint)
    nothing = torch.nn.Identity()
    return Backbone(nothing, [BlockAdapter() for _ in range(layers)], nothing, nothing, shape)


TOWERS = {
    "S/16": tower(12, 224, 16, 384, 6),
    "B/32": tower(12, 224, 32, 768, 12),
    "B/16": tower(12, 224, 16, 768, 12),
    "L/14": tower(24, 224, 14, 1024, 16),
    "L/14 336": tower(24, 336, 14, 1024, 16),
    "H/14": tower(32, 224, 14, 1280, 16),
    "g/14": tower(40, 224, 14, 1408, 16),
    "SigLIP B/16": tower(12, 224, 16, 768, 12, prefix=0),
    "SigLIP so400m": tower(27, 384, 14, 1152, 16, prefix=0),
    "DINOv2 B/14 with registers": tower(12, 518, 14, 768, 12, prefix=5),
    "UMT L/16": tower(24, 224, 16, 1024, 16, prefix=0),
    "tiny": tower(6, 32, 8, 64, 4),
}
PAPER = [(tokens, frames) for tokens in ("B/32", "B/16") for frames in (12, 64)]


def schedule_of(backbone: Backbone, method: str, frames: int, **options: Any) -> MergeSchedule:
    return schedule_for(method, len(backbone.blocks), backbone.shape, frames, **options)


def share(schedule: MergeSchedule, backbone: Backbone) -> float:
    """Its GFLOPs beside those without merging."""
    shape = backbone.shape
    whole = MergeSchedule.identity(len(backbone.blocks), schedule.frames, shape.tokens, shape.num_prefix, shape.joint)
    return tower_gflops(schedule, shape) / tower_gflops(whole, shape)


@pytest.mark.parametrize("method", ["tempme", "tome"])
@pytest.mark.parametrize("name", TOWERS)
def test_a_budget_is_kept_and_nearly_used(name: str, method: str) -> None:
    backbone = TOWERS[name]
    for frames, budget in itertools.product((4, 12, 32), (0.35, 0.5, 0.8)):
        found = share(schedule_of(backbone, method, frames, budget=budget), backbone)
        assert budget - 0.04 < found <= budget, (frames, budget)


@pytest.mark.parametrize("name", ["B/32", "L/14", "DINOv2 B/14 with registers", "tiny"])
@pytest.mark.parametrize("method", ["evit", "diffrate", "sta"])
def test_methods_that_drop_keep_a_budget_and_a_number_of_tokens(method: str, name: str) -> None:
    """The first slot of STA keeps half of its patches, so that it cannot cost less than some 0.45."""
    backbone = TOWERS[name]
    for budget in (0.5 if method == "sta" else 0.4, 0.6, 0.8):
        found = share(schedule_of(backbone, method, 12, budget=budget), backbone)
        assert budget - 0.05 < found <= budget, budget
    most = 12 * backbone.shape.tokens // 3
    schedule = schedule_of(backbone, method, 12, tokens=most)
    assert most * 0.8 < schedule.output_tokens <= most


@pytest.mark.parametrize("method", ["reduction_only", "centerclip", "testa", "random", "uniform", "pool"])
def test_other_methods_keep_a_budget(method: str) -> None:
    for name, budget in itertools.product(("B/32", "UMT L/16"), (0.35, 0.8)):
        schedule = schedule_of(TOWERS[name], method, 12, budget=budget)
        assert budget - 0.04 < share(schedule, TOWERS[name]) <= budget, (name, budget)
        few = schedule_of(TOWERS[name], method, 12, tokens=12 * 40).output_tokens
        assert 300 < few <= 480, name


@pytest.mark.parametrize("frames", [1, 2, 5, 7, 8, 12, 16, 30, 64])
def test_all_frames_end_in_one_clip(frames: int) -> None:
    for name in ("B/16", "L/14", "tiny"):
        schedule = schedule_of(TOWERS[name], "tempme", frames, budget=0.6)
        assert schedule.token_counts[-1][0] == 1 and schedule.frames == frames
        assert all(plan.join is None for plan in schedule.plan[: len(schedule.plan) // 3])


@pytest.mark.parametrize(("name", "frames"), PAPER)
@pytest.mark.parametrize("method", ["tempme", "tome"])
def test_the_papers_setting_is_found_at_its_own_cost(name: str, frames: int, method: str) -> None:
    backbone = TOWERS[name]
    paper = make_schedule(method, 12, frames, backbone.shape.tokens)
    assert schedule_of(backbone, method, frames, budget=share(paper, backbone)) == paper
    assert schedule_of(backbone, method, frames) == paper
    if method == "tempme":  # fewer tokens cost less; ToMe may reach the same number by another r a block
        assert schedule_of(backbone, method, frames, tokens=paper.output_tokens) == paper


def test_the_joins_of_the_paper_are_those_of_the_rule() -> None:
    joins = {
        frames: [plan.join for plan in make_schedule("tempme", 12, frames, 197).plan if plan.join is not None]
        for frames in (4, 6, 8, 12, 16, 24, 32, 64)
    }
    assert joins[12] == [2, 2, 3] and joins[64] == [4, 4, 4]
    assert joins == {**joins, 4: [2, 2], 6: [2, 3], 8: [2, 2, 2], 16: [2, 2, 4], 24: [2, 3, 4], 32: [2, 4, 4]}


@pytest.mark.parametrize("method", ["tempme", "tome"])
def test_a_number_of_tokens_is_kept_and_nearly_used(method: str) -> None:
    for name, frames, tokens in itertools.product(("B/32", "L/14", "SigLIP B/16"), (8, 16), (64, 128, 512)):
        wanted = min(tokens, frames * TOWERS[name].shape.tokens)
        found = schedule_of(TOWERS[name], method, frames, tokens=tokens).output_tokens
        assert wanted * 0.8 - frames < found <= wanted, (name, frames, tokens)


def test_more_of_a_budget_merges_less() -> None:
    costs = [share(schedule_of(TOWERS["L/14"], "tempme", 8, budget=b / 100), TOWERS["L/14"]) for b in range(30, 90, 3)]
    assert costs == sorted(costs) and len(set(costs)) == len(costs)


def test_given_options_stay() -> None:
    schedule = schedule_of(TOWERS["B/16"], "tempme", 8, budget=0.6, r=3, merge_layers=(5, 6, 7))
    assert [plan.after for plan in schedule.plan[:5]] == [3] * 5
    assert [layer for layer, plan in enumerate(schedule.plan) if plan.join] == [5, 6, 7]


def test_without_setting_or_budget_it_is_three_fifths(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        schedule = schedule_of(TOWERS["L/14"], "tempme", 8)
    assert 0.58 < share(schedule, TOWERS["L/14"]) <= 0.6
    told = f"8 x 257 tokens -> 1 x {schedule.output_tokens}, {tower_gflops(schedule, TOWERS['L/14'].shape):.4g} of "
    assert told in caplog.text and "2 at block 16, 2 at block 18, 2 at block 20" in caplog.text


def test_a_joint_tower_has_a_budget_for_tome() -> None:
    backbone = tower(12, 224, 16, 768, 12, prefix=0, joint=True)
    assert 0.45 < share(schedule_of(backbone, "tome", 8, budget=0.5), backbone) <= 0.5
    with pytest.raises(ValueError, match=r"joins frames step by step"):
        schedule_of(backbone, "tempme", 8, budget=0.5)


@pytest.mark.parametrize(
    ("method", "options", "message"),
    [
        ("none", {"budget": 0.5}, r"budget=0.5 cannot be reached by none on 12 layers.*the lowest is 1$"),
        ("tempme", {"budget": 0.5, "tokens": 3}, r"a budget or a number of tokens; got budget=0.5, tokens=3"),
        ("tempme", {"budget": 50}, r"budget is a share of the GFLOPs without merging, 0 to 1; got 50"),
        ("tempme", {"tokens": 0}, r"tokens counts what leaves the encoder, 1 or more; got 0"),
        (
            "tempme",
            {"tokens": 8},
            r"tokens=8 cannot be reached by tempme .* 12 frames of 197 tokens: the lowest is",
        ),
        ("tome", {"budget": 0.4, "r": 2}, r"with r as given: the lowest is 0\.9"),
    ],
)
def test_limits_that_cannot_be_kept_are_refused(method: str, options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        schedule_of(TOWERS["B/16"], method, 12, **options)


def test_a_front_end_by_budget_runs_and_keeps_its_schedule(tmp_path: object) -> None:
    torch.manual_seed(0)
    frontend = create_frontend("open_clip:tiny", None, "tempme", num_frames=4, budget=0.5)
    shape = frontend.shape
    output = frontend(torch.rand(2, 4, 3, shape.image_size, shape.image_size))
    assert output.tokens.shape[1] == frontend.schedule.output_tokens < 4 * shape.tokens
    frontend.save_pretrained(str(tmp_path))
    assert VisualFrontend.from_pretrained(str(tmp_path)).schedule == frontend.schedule
    few = create_frontend("open_clip:tiny", None, "tome", num_frames=4, tokens=20)
    assert few.schedule.output_tokens == few(torch.rand(1, 4, 3, *[shape.image_size] * 2)).tokens.shape[1] <= 20
