"""What every schedule must keep, seen by content: each input token is a unit vector that can be found again.

Blocks add nothing and clip positions are zero, so that an output token is the size-weighted mean of the input
tokens it holds, and size times token counts them.
"""

from __future__ import annotations

import pytest
import torch
from towers import coded_frontend, every_way, random_video, way

from tempme_vl import MergeSchedule, make_schedule
from tempme_vl.backbones.base import TowerShape

JOINS = [  # frames, merge layers, frames joined
    (1, (), ()),
    (3, (0,), (3,)),
    (4, (1,), (1,)),
    (4, (0, 2), (1, 2)),
    (6, (1, 3), (2, 3)),
    (12, (1, 2, 3), (2, 2, 3)),
]
PAIRS = [(0, 0, 0), (2, 30, 10), (1, 0, 50), (3, 60, 0), (50, 100, 100)]  # r, cross and intra percent
TEMPME = [  # each join with each pair, and both with each number of tokens
    MergeSchedule.tempme(4, frames, (5, 10, 17)[(join + pair) % 3], r, layers, joins, cross, intra)
    for join, (frames, layers, joins) in enumerate(JOINS)
    for pair, (r, cross, intra) in enumerate(PAIRS)
]
CODED = TowerShape(image_size=8, patch_size=2, width=114, heads=2, embed_dim=114)  # as `coded_frontend` makes it
OTHERS = [
    *every_way(4, 6, CODED),
    make_schedule("centerclip", 4, 6, 17, clusters=(12, 7, 3), merge_layers=(0, 1, 3), merge_frames=(1, 2, 3)),
    MergeSchedule.identity(3, 4, 10),
    MergeSchedule.tome(4, 3, 17, 2),
    MergeSchedule.tome(4, 3, 10, 99),
    MergeSchedule.tome(3, 2, 10, [0, 3, 1]),
]


@pytest.mark.parametrize("schedule", TEMPME + OTHERS, ids=way)
def test_tokens_hold_what_source_and_size_say(schedule: MergeSchedule) -> None:
    side = 2 * round((schedule.tokens - 1) ** 0.5)
    video = random_video(schedule.frames, side, dtype=torch.float64)
    output = coded_frontend(schedule)(video, trace_source=True)

    inputs, outputs = schedule.frames * schedule.tokens, schedule.output_tokens
    assert output.tokens.shape[:2] == output.size.shape[:2] == (2, outputs)
    dropped = (output.source < 0).sum(1)
    assert torch.equal(output.size.sum((1, 2)).long() + dropped, torch.full((2,), inputs))

    # held[b, m, s]: how much of input token s is in output token m, by content
    held = output.tokens[..., :inputs] * output.size
    assert output.source.shape == (2, inputs)
    by_source = torch.nn.functional.one_hot(output.source + 1, outputs + 1)[..., 1:].transpose(1, 2)
    if schedule.method not in ("evit", "diffrate"):  # whose tokens are means by attention, or by weights of their own
        torch.testing.assert_close(held, by_source.double(), atol=1e-9, rtol=0)
    assert torch.equal(by_source.sum(2, keepdim=True).double(), output.size)

    if any(plan.fewer_clips for plan in schedule.plan):
        return  # frames merge with others, CLS tokens and all
    last = schedule.layer_counts[-1]
    clips, tokens, prefix = last.clips, last.out, last.prefix
    frames = schedule.frames // clips  # of a clip, as many as CLS tokens, or more where some of them became one
    for video_source in output.source.unflatten(1, (schedule.frames, schedule.tokens)):
        for frame, frame_source in enumerate(video_source):
            clip, position = divmod(frame, frames)
            assert frame_source[0] == clip * tokens + position * prefix // frames, "CLS tokens first, in frame order"
            patches = frame_source[1:][frame_source[1:] >= 0]
            assert (patches >= clip * tokens + prefix).all() and (patches < (clip + 1) * tokens).all()
    of_cls = output.size.view(2, clips, tokens)[:, :, :prefix]
    assert torch.equal(of_cls, torch.full_like(of_cls, frames / prefix))


def test_joins_really_merge_across_frames() -> None:
    """Otherwise the test above would also pass on merging that never leaves a frame."""
    schedule = MergeSchedule.tempme(4, 6, 17, 2, (1, 3), (2, 3), 30, 10)
    source = coded_frontend(schedule)(random_video(6, 8, dtype=torch.float64), trace_source=True).source
    frame = torch.arange(6).repeat_interleave(17)
    mixed = [len(frame[source[0] == m].unique()) for m in source[0].unique()]
    assert max(mixed) >= 3
    alone = MergeSchedule.tome(4, 6, 17, 2)
    source = coded_frontend(alone)(random_video(6, 8, dtype=torch.float64), trace_source=True).source
    assert all(len(frame[source[0] == m].unique()) == 1 for m in source[0].unique())
