"""What compressors choose in videos of which it is known what changes, and where."""

from __future__ import annotations

from collections.abc import Mapping

import pytest
import torch
import transformers
from torch import Tensor

from tempme_vl.compressors import FrameFeatures, dtd, dycoke, evs, fastvid, storm, vidcom2, visionzip


def moving(frames: int, tokens: int, changes: Mapping[tuple[int, int], float]) -> FrameFeatures:
    """One row of tokens that stand still but where they turn by an angle, in radians, for good."""
    angle = torch.zeros(frames, tokens)
    for (frame, token), turn in changes.items():
        angle[frame:, token] += turn
    return FrameFeatures(torch.stack([angle.cos(), angle.sin()], dim=-1), (1, tokens))


def test_efficient_video_sampling_keeps_the_first_frame_and_what_changes() -> None:
    features = moving(4, 5, {(1, 3): 0.2, (2, 0): 1.0, (3, 3): 0.5})
    left = evs.compress(features, evs.Options(0.4))
    assert left.source.tolist() == [0, 1, 2, 3, 4, 8, 10, 18]
    left = evs.compress(features, evs.Options(0.3))  # one token beside the first frame: what changes most
    assert left.source.tolist() == [0, 1, 2, 3, 4, 10]
    assert evs.compress(features, evs.Options(0.0)).source.tolist() == [0, 1, 2, 3, 4]


def test_vidcom2_gives_a_frame_of_its_own_kind_more() -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(8, generator=generator) + 0.3 * torch.randn(6, 20, 8, generator=generator)
    x[4] = torch.randn(20, 8, generator=generator)
    left = vidcom2.compress(FrameFeatures(x, (4, 5)), vidcom2.Options(0.4, exact=False))
    counts = torch.bincount(left.source // 20, minlength=6)
    assert counts.argmax() == 4 and counts[4] > counts.sum() / 6 + 1


@pytest.mark.parametrize("seed", range(6))
def test_vidcom2_made_exact_only_adds_or_only_drops(seed: int) -> None:
    x = torch.randn(5, 9, 8, generator=torch.Generator().manual_seed(seed))
    features, share = FrameFeatures(x, (3, 3)), 0.3 + 0.1 * seed
    rounded, exact = (
        set(vidcom2.compress(features, vidcom2.Options(share, exact=exact)).source.tolist()) for exact in (False, True)
    )
    assert len(exact) == int(45 * share) and (rounded <= exact or exact <= rounded)


def test_vidcom2_leaves_as_many_tokens_as_frames() -> None:
    features = FrameFeatures(torch.randn(5, 9, 8, generator=torch.Generator().manual_seed(0)), (3, 3))
    rounded = vidcom2.compress(features, vidcom2.Options(0.0, exact=False))
    assert (rounded.source // 9).tolist() == [0, 1, 2, 3, 4]
    assert torch.equal(vidcom2.compress(features, vidcom2.Options(0.0)).source, rounded.source)


# tokens 1 and 4 of every later frame are what it is compared with, turned; frame 2 turns back before 3 does
TURNED = {(1, 1): 0.5, (1, 4): 1.0, (2, 1): -0.1, (2, 5): 0.3, (3, 0): 0.7, (3, 2): 0.4, (5, 3): 0.2, (6, 2): 0.9}


def test_dycoke_prunes_three_of_four_frames_to_what_changed() -> None:
    left = dycoke.compress(moving(7, 6, TURNED), dycoke.Options(2 / 6))
    frames = [[i % 6 for i in left.source.tolist() if i // 6 == frame] for frame in range(7)]
    whole = [0, 1, 2, 3, 4, 5]
    # 1 with 0, 2 with 0 (tokens 1, 4, 5 turned, 4 and 1 most), 3 with 2, 5 with 4, 6 with 4 (tokens 2 and 3)
    assert frames == [whole, [1, 4], [1, 4], [0, 2], whole, [0, 3], [2, 3]]
    assert left.source.tolist() == sorted(left.source.tolist())


def test_dycoke_as_its_public_code_loses_the_last_frame_and_leaves_the_last_third_whole() -> None:
    features = moving(9, 6, TURNED)
    public = dycoke.compress(features, dycoke.Options(2 / 6, public_code=True))
    assert (public.source // 6).bincount(minlength=9).tolist() == [6, 2, 2, 2, 6, 2, 2, 2, 0]
    assert public.source[6:8].tolist() == [6 + 4, 6 + 1]  # the least alike first
    public = dycoke.compress(moving(7, 6, TURNED), dycoke.Options(2 / 6, public_code=True))
    assert (public.source // 6).bincount(minlength=7).tolist() == [6, 2, 2, 2, 6, 2, 0]
    public = dycoke.compress(moving(8, 6, TURNED), dycoke.Options(2 / 6, public_code=True))
    assert (public.source // 6).bincount(minlength=8).tolist() == [6, 2, 2, 2, 6, 2, 6, 2]


def test_dycoke_as_its_public_code_refuses_few_frames() -> None:
    with pytest.raises(ValueError, match=r"at least 5 frames; got 4: set public_code to false"):
        dycoke.compress(moving(4, 6, {}), dycoke.Options(public_code=True))


def test_token_drop_compares_with_the_frame_before_even_where_that_was_dropped() -> None:
    slowly = {(frame, 2): 0.3 for frame in range(1, 5)}  # in the end 1.2 from where it was, never 0.4 at once
    features = moving(5, 4, slowly | {(3, 0): 0.5})
    left = dtd.compress(features, dtd.Options(threshold=0.92))  # an angle of 0.403
    assert left.source.tolist() == [0, 1, 2, 3, 12]
    left = dtd.compress(features, dtd.Options(threshold=0.94))  # of 0.348
    assert left.source.tolist() == [0, 1, 2, 3, 12]
    left = dtd.compress(features, dtd.Options(threshold=0.96))  # of 0.284
    assert left.source.tolist() == [0, 1, 2, 3, 6, 10, 12, 14, 18]


def test_token_drop_by_a_share_keeps_what_differs_most() -> None:
    left = dtd.compress(moving(3, 4, {(1, 2): 0.3, (2, 0): 0.1}), dtd.Options(retention=0.25))
    assert left.source.tolist() == [0, 1, 2, 3, 6, 8]
    fifth = dtd.compress(moving(2, 20, {}), dtd.Options(retention=0.8))
    assert len(fifth.x) == 20 + 16  # although 20 * (1 - 0.8) is less than 4 to the machine


@pytest.fixture(scope="module")
def processor() -> transformers.Qwen2VLVideoProcessor:
    return transformers.Qwen2VLVideoProcessor(cap_pixels_per_frame=False)


def patches_of(processor: transformers.Qwen2VLVideoProcessor, frames: Tensor) -> Tensor:
    given = {"do_sample_frames": False, "do_resize": False, "return_tensors": "pt"}
    return processor(videos=[frames], **given)["pixel_values_videos"]


def test_pixels_of_patches_are_those_of_the_frames(processor: transformers.Qwen2VLVideoProcessor) -> None:
    frames = torch.randint(0, 256, (4, 3, 56, 84), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    patches = patches_of(processor, frames)
    pixels = dtd.pixels_of_patches(patches, (2, 3), processor.image_mean, processor.image_std)
    assert pixels.shape == (2, 6, 2, 3 * 28 * 28)
    for frame in range(4):
        for token in range(6):
            row, column = 28 * (token // 3), 28 * (token % 3)
            block = frames[frame, :, row : row + 28, column : column + 28].flatten(1) / 255
            found = pixels[frame // 2, token, frame % 2].unflatten(0, (4, 3, -1)).transpose(0, 1).flatten(1)
            assert (found.sort().values - block.sort().values).abs().max() < 1e-6


def test_token_drop_by_pixels(processor: transformers.Qwen2VLVideoProcessor) -> None:
    """The last frame of a temporal patch with the first of the patch before; a square of 14 brightens by 51 of 255."""
    frames = torch.full((6, 3, 56, 84), 100, dtype=torch.uint8)
    frames[1:3, :, 28:42, 28:42] += 51  # token 4: in frames 1 and 2, so neither in 0 nor in 3
    frames[3:, :, :14, 70:84] += 51  # token 2: in 3, and not in 0
    pixels = dtd.pixels_of_patches(patches_of(processor, frames), (2, 3), processor.image_mean, processor.image_std)
    features = FrameFeatures(torch.ones(3, 6, 2), (2, 3), pixels=pixels)
    # a quarter of the block by a fifth: 0.05. Patch 2 (frames 4, 5) differs from frame 2 at tokens 4 and 2
    left = dtd.compress(features, dtd.Options("pixel", 0.045))
    assert left.source.tolist() == [0, 1, 2, 3, 4, 5, 8, 14, 16]
    assert len(dtd.compress(features, dtd.Options("pixel", 0.055)).x) == 6
    assert dtd.compress(features, dtd.Options("pixel", retention=0.17)).source.tolist()[:7] == [0, 1, 2, 3, 4, 5, 8]


def test_visionzip_adds_to_each_target_the_mean_of_what_is_like_it() -> None:
    x = torch.arange(1.0, 9.0).reshape(1, 8, 1)
    received = torch.tensor([[0, 9, 0, 0, 8, 0, 0, 0.0]])  # dominant: 1 and 4; the rest is 0, 2, 3, 5, 6, 7
    first, second = [1.0, 0.0], [0.0, 1.0]
    # targets are 0 and 5, every third of the rest; 2, 6, 7 are like the second
    keys = torch.tensor([[first, first, second, first, first, second, second, second]])
    features = FrameFeatures(x, (2, 4), received=received, keys=keys)
    left = visionzip.compress(features, visionzip.Options(0.5, 0.5))
    assert left.source.tolist() == [1, 4, 0, 5]
    assert left.x.flatten().tolist() == [2, 5, 1 + 4, 6 + (3 + 7 + 8) / 3]


def test_visionzip_without_targets_drops_the_rest() -> None:
    received = torch.tensor([[0.1, 0.4, 0.3, 0.2]])
    features = FrameFeatures(torch.arange(4.0).reshape(1, 4, 1), (2, 2), received=received, keys=torch.ones(1, 4, 2))
    left = visionzip.compress(features, visionzip.Options(0.5, 1.0))
    assert left.source.tolist() == left.x.flatten().tolist() == [1, 2]


def test_visionzip_keeps_one_token_by_attention() -> None:
    received = torch.tensor([[0.1, 0.4, 0.3, 0.2]])
    features = FrameFeatures(torch.arange(4.0).reshape(1, 4, 1), (2, 2), received=received, keys=torch.ones(1, 4, 2))
    left = visionzip.compress(features, visionzip.Options(0.25, 0.5))
    assert left.source.tolist() == left.x.flatten().tolist() == [1]


BUDGET = {"retention": 0.34, "context": 0.4, "anchor_step": 3}  # 16 of 49 tokens


@pytest.mark.parametrize(
    ("rule", "frames", "salient", "context"),
    [
        # 6 of each frame's 16 are for context, 42 of the segment: 14 for each of three anchors
        ("llava_onevision", range(2, 9), [10] * 7, [14, 0, 0, 14, 0, 0, 14]),
        # of 112 tokens 44 for context, the last anchor first, and 68 salient, the first frame first
        ("llava_video", range(2, 9), [10, 10, 10, 10, 10, 9, 9], [14, 0, 0, 15, 0, 0, 15]),
        # the same among frames 3, 4, 5 and 8; an anchor has at most 24 for context, and beside it what is left of 49
        ("qwen2_5_vl", [3, 4, 5, 8], [17, 17, 17, 17], [22, 0, 0, 22]),
    ],
)
def test_fastvid_spreads_the_budget_of_a_segment(
    rule: fastvid.Rule, frames: list[int], salient: list[int], context: list[int]
) -> None:
    alike = torch.tensor([0.99, 0.5, 0.99, 0.94, 0.9, 0.93, 0.96, 0.99, 0.6, 0.99])
    options = fastvid.Options(**BUDGET, rule=rule)
    found = fastvid.budgets(range(2, 9), alike, 49, options)
    assert list(found) == list(frames)
    assert [budget.salient for budget in found.values()] == salient
    assert [budget.context for budget in found.values()] == context
    alone = fastvid.budgets(range(9, 10), alike, 49, options)
    assert [of[:2] for of in alone.values()] == [(10, 6)]


def test_fastvid_for_qwen_keeps_fewer_where_nothing_moves() -> None:
    options = fastvid.Options(0.5, context=0.4, rule="qwen2_5_vl")
    assert fastvid.budgets(range(8), torch.ones(7), 48, options) == {7: (24, 24, False)}  # of 8 * 24


@pytest.mark.parametrize(
    ("rule", "retention", "context", "budget"),
    [
        ("qwen2_5_vl", 1.0, 0.6, (20, 29)),  # no more than half of its tokens would be 24: of longer segments alone
        ("qwen2_5_vl", 0.03, 0.4, (0, 1)),
        ("llava_video", 0.03, 0.4, (1, 0)),
        ("llava_onevision", 0.03, 0.4, (1, 0)),
    ],
)
def test_fastvid_on_one_frame(rule: fastvid.Rule, retention: float, context: float, budget: tuple[int, int]) -> None:
    options = fastvid.Options(retention, context=context, rule=rule)
    ((frame, of),) = fastvid.budgets(range(1), torch.ones(0), 49, options).items()
    assert (frame, of.salient, of.context) == (0, *budget)


def test_fastvid_cuts_where_frames_differ_and_at_least_so_often() -> None:
    alike = torch.tensor([0.95, 0.4, 0.97, 0.6, 0.99])
    assert fastvid.cuts(alike, 2, 0.9) == [1, 3]
    assert fastvid.cuts(alike, 4, 0.9) == [0, 1, 3]
    assert fastvid.cuts(alike, 1, 0.1) == []
    assert fastvid.cuts(alike, 30, 0.1) == [0, 1, 2, 3, 4]


@pytest.mark.parametrize(
    ("rule", "step", "alone"), [("llava_onevision", 1, True), ("llava_onevision", 3, False), ("llava_video", 1, False)]
)
def test_fastvid_takes_context_from_the_segment_or_where_every_frame_is_an_anchor_from_the_frame(
    rule: fastvid.Rule, step: int, alone: bool
) -> None:
    generator = torch.Generator().manual_seed(0)
    x, attention = torch.randn(3, 10, 6, generator=generator), torch.rand(3, 10, generator=generator)
    summary = torch.ones(3, 2)  # one segment
    options = fastvid.Options(0.4, 1, context=0.5, anchor_step=step, rule=rule)

    def last(frames: Tensor) -> Tensor:
        left = fastvid.compress(FrameFeatures(frames, (2, 5), summary=(summary, attention)), options)
        return left.x[left.source >= 20]

    other = torch.cat([torch.randn(2, 10, 6, generator=generator), x[2:]])
    assert torch.equal(last(x), last(other)) == alone


def test_fastvid_mixes_a_centre_with_the_mean_of_what_is_like_it() -> None:
    x = torch.tensor([[4.0, 0.0], [0.0, 4.0], [2.0, 0.2], [8.0, 0.4], [0.3, 2.0]])
    center, pool = torch.tensor([0, 1]), torch.tensor([2, 3, 4])
    even = fastvid.mixed(x, center, pool, own=0.0)
    assert torch.allclose(even, torch.tensor([[14 / 3, 0.2], [0.15, 3.0]]))  # each token as much as another
    most = fastvid.mixed(x, center, pool, own=0.75)
    assert torch.allclose(most, torch.tensor([[4.25, 0.075], [0.075, 3.5]]))
    assert torch.equal(fastvid.mixed(x, center, pool[:0], own=0.0), x[:2])


@pytest.mark.parametrize("rule", ["llava_onevision", "llava_video", "qwen2_5_vl"])
@pytest.mark.parametrize("retention", [0.1, 0.45, 0.8, 1.0])
def test_fastvid_leaves_no_more_than_its_share(rule: fastvid.Rule, retention: float) -> None:
    generator = torch.Generator().manual_seed(0)
    for frames in (1, 2, 7, 16):
        x = torch.randn(frames, 12, 5, generator=generator)
        attention = torch.rand(frames, 12, generator=generator)
        features = FrameFeatures(x, (3, 4), summary=(x.mean(dim=1), attention))
        left = fastvid.compress(features, fastvid.Options(retention, 3, rule=rule))
        assert 0 < len(left.x) <= frames * int(12 * retention)
        assert left.source.tolist() == sorted(set(left.source.tolist()))


def test_storm_puts_a_token_where_the_first_of_those_was_that_became_it() -> None:
    x = torch.arange(45.0).reshape(3, 15, 1)
    features = FrameFeatures(x, (3, 5), deeper=(10 * x,))
    left = storm.compress(features, storm.Options(2, spatial="ceil"))
    first = [0, 2, 4, 10, 12, 14]
    assert left.source.tolist() == [*first, *(30 + place for place in first)]
    inside = torch.tensor([3.0, 5.0, 6.5, 10.5, 12.5, 14.0])  # means of windows, the last row and column cut off
    assert torch.allclose(left.x[:, 0], torch.cat([inside + 7.5, inside + 30]))  # of frames 0 and 1, and of 2
    assert torch.allclose(left.deeper[0], 10 * left.x)
    floor = storm.compress(features, storm.Options(1, spatial="floor"))
    assert floor.source.tolist() == [15 * frame + place for frame in range(3) for place in (0, 2)]


def test_storm_refuses_to_leave_no_token() -> None:
    features = FrameFeatures(torch.ones(2, 5, 3), (1, 5))
    with pytest.raises(ValueError, match=r'at least 2 rows and 2 columns.*got 1 x 5: take "ceil"'):
        storm.compress(features, storm.Options(spatial="floor"))
    assert len(storm.compress(features, storm.Options(1, spatial="ceil")).x) == 6
