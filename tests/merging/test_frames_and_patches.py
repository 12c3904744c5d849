"""TESTA's aggregation of frames and patches: votes, order, sizes, masks, and where it works."""

from __future__ import annotations

import pytest
import torch
from towers import TINY, coded_frontend, random_video

from tempme_vl import create_frontend, make_schedule
from tempme_vl.compressors import FrameFeatures
from tempme_vl.integrations.reduction import make_plan, merge
from tempme_vl.merging import MergeSchedule
from tempme_vl.merging.testa import match_frames, match_least
from tempme_vl.pooling import masked_mean
from tempme_vl.state import TokenState


def test_frames_go_where_most_patches_want() -> None:
    """Frames 0 and 2 may go to 1 or 3: of three patches two of frame 0 choose 3, with the similarities 1 and 0.8."""
    angle = torch.tensor([[0, 1.2, 3, 0], [0, 0, 3, 1.2], [0, 1.2, 3, 0.6435]])  # L, T
    metric = torch.stack([angle.cos(), angle.sin()], -1).unsqueeze(0)
    merge = match_frames(metric, 1)
    assert (merge.src.tolist(), merge.base.tolist(), merge.dst.tolist()) == ([[0]], [[2, 1, 3]], [[2]])
    assert match_frames(metric[:, :2], 1).dst.tolist() == [[1]], "of as many votes the first frame"


def test_the_least_important_merge_into_their_most_similar_others() -> None:
    scores = torch.tensor([[5.0, 1, 4, 2, 3]])
    metric = torch.tensor([[[1.0, 0], [0, 1], [0.1, 1], [1, 0.1], [-1, 0]]]).unsqueeze(1)
    merge = match_least(scores, metric, 2)
    assert (merge.base.tolist(), merge.src.tolist(), merge.dst.tolist()) == ([[0, 2, 4]], [[1, 3]], [[1, 0]])


def test_published_settings() -> None:
    for frames, clips, patches in (
        (32, 20, 52),
        (96, 48, 100),
    ):  # T and L after 12 blocks, and a CLS token a frame here
        assert make_schedule("testa", 12, frames, 197).token_counts[-1] == (clips, patches + 1)
    few = make_schedule("testa", 12, 12, 50, r_temporal=9, r_spatial=99)
    assert [clips for clips, _ in few.token_counts] == [7, 4, 3, 2] + [2] * 8, "no more than half, and two stay"


@pytest.mark.parametrize("strategy", ["geometry", "importance", "prune"])
def test_frames_come_out_in_time_and_hold_what_source_says(strategy: str) -> None:
    schedule = make_schedule("testa", 3, 8, 17, r_temporal=[2, 1, 1], r_spatial=[0, 3, 2], strategy=strategy)
    output = coded_frontend(schedule)(random_video(8, 8, dtype=torch.float64), trace_source=True)
    clips, tokens = schedule.token_counts[-1]
    assert clips == 4 and output.frames.shape[1] == 4
    frames = output.source.unflatten(1, (8, 17))
    clip = torch.where(frames < 0, -1, frames // tokens)
    for video in clip:
        for frame in video:
            assert len(frame[frame >= 0].unique()) <= 1, "a frame is in one clip"
        of_frame = video.amax(1)
        first = [of_frame.tolist().index(number) for number in range(4)]
        assert first == sorted(first), "clips by the first frame that they hold"
        assert bool((of_frame < 0).any()) == (strategy == "prune")


def test_a_merged_frame_is_real_if_one_of_its_frames_is() -> None:
    torch.manual_seed(0)
    frontend = create_frontend(TINY, method="testa", num_frames=6, r_temporal=[2, 0, 0, 0, 0, 0], r_spatial=0)
    video, states = random_video(6), []
    frontend.blocks[0].register_forward_hook(lambda *given: states.append(given[2]))
    mask = torch.tensor([[1, 1, 0, 0, 0, 0], [1] * 6])
    output = frontend(video, mask)
    held = [sorted(set(of.tolist())) for of in (states[0].clip_of[0, :2], states[0].clip_of[1])]
    unit = torch.nn.functional.normalize(output.frames, dim=-1)
    torch.testing.assert_close(output.pooled, torch.stack([unit[0, held[0]].mean(0), unit[1, held[1]].mean(0)]))
    dropped = torch.tensor([[0, -1, 1]])
    frames = torch.tensor([[[1.0], [3.0]]])
    assert masked_mean(frames, torch.tensor([[1, 1, 0]]), dropped).tolist() == [[1.0]]


def test_clips_merge_by_weighted_means_and_origins_follow() -> None:
    x = torch.arange(12.0).view(4, 3, 1)
    state = TokenState.start(x, 4, 1, trace_source=True)
    metric = torch.tensor([[[[1.0, 0], [1, 0.1], [0, 1], [-1, 0]]]])
    once = state.merge_clips(match_frames(metric, 1))  # 0 into 1: left are 2, 1, 3
    assert once.x.flatten(1).tolist() == [[6, 7, 8], [1.5, 2.5, 3.5], [9, 10, 11]] and once.merged
    assert once.clip_of.tolist() == [[1, 1, 0, 2]] and once.origin.tolist() == [[6, 7, 8], [3, 4, 5], [9, 10, 11]]
    assert once.source[1].tolist() == [0, 1, 2, 0, 1, 2] + [-1] * 6
    twice = once.keep_clips(torch.tensor([[1, 2]]))
    assert twice.clip_of.tolist() == [[0, 0, -1, 1]] and twice.source.amax(0).tolist() == [0, 1, 2] * 2 + [-1] * 3 + [
        0,
        1,
        2,
    ]
    assert twice.size.flatten(1).tolist() == [[2, 2, 2], [1, 1, 1]]


def test_behind_a_tower_frames_become_one_clip_of_fewer() -> None:
    torch.manual_seed(0)
    still = torch.randn(1, 9, 6).expand(5, -1, -1)
    plan = make_plan("testa", 5, (3, 3), {"r_temporal": 2, "r_spatial": 0})
    clips = merge(FrameFeatures(still, (3, 3), (still,)), plan)
    assert clips.x.shape == (18, 6) and plan.token_counts == [(1, 27), (1, 18)]
    torch.testing.assert_close(clips.x, still[0].repeat(2, 1))
    video = torch.randn(4, 9, 6)
    plan = make_plan("testa", 4, (3, 3), {"r_temporal": [1, 0], "r_spatial": [2, 3]})
    clips = merge(FrameFeatures(video, (3, 3)), plan)
    assert clips.x.shape == (3 * 4, 6) and (clips.source.diff() > 0).all()
    assert len((clips.source // 9).unique()) == 3
    assert merge(FrameFeatures(video[:1], (3, 3)), make_plan("testa", 1, (3, 3), {"r_spatial": 2})).x.shape == (5, 6)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"r_temporal": [1], "r_spatial": 2}, r"one for each of 6 blocks; got \[1\]"),
        ({"r_temporal": -1, "r_spatial": 2}, "method 'testa', 'r_temporal': expected"),
        ({"r_temporal": 1, "r_spatial": 2, "strategy": "vote"}, "method 'testa', 'strategy': expected"),
    ],
)
def test_refusals(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        create_frontend(TINY, method="testa", num_frames=6, **options)


def test_plans_that_mix_joins_and_fewer_clips_are_refused() -> None:
    data = make_schedule("testa", 2, 6, 17, r_temporal=1, r_spatial=0).to_dict()
    with pytest.raises(ValueError, match="no layer joins clips, or inserts tokens"):
        MergeSchedule.from_dict({**data, "plan": [[2, 0, 0], [None, 0, 0]]})
    with pytest.raises(ValueError, match="wants 6 clips fewer, but at least 1 has to stay"):
        MergeSchedule.from_dict({**data, "fewer_clips": [6, 0]})
