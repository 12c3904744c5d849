"""Schedules: token counts against a step-by-step reading of the paper, JSON, and every refusal."""

from __future__ import annotations

import json

import pytest
from towers import TINY_SHAPE

from tempme_vl import MergeSchedule, make_schedule
from tempme_vl.merging import METHODS, LayerPlan
from tempme_vl.scheduling import schedule_for


def test_counts_and_costs_of_the_paper() -> None:
    b32, b16 = make_schedule("tempme", 12, 12, 50), make_schedule("tempme", 12, 12, 197)
    assert [clips for clips, _ in b32.token_counts] == [12] * 8 + [6, 3, 1, 1]
    assert [tokens for _, tokens in b32.token_counts] == [48, 46, 44, 42, 40, 38, 36, 34, 44, 56, 107, 97]
    assert [tokens for _, tokens in b16.token_counts[7:]] == [117, 113, 109, 158, 127]
    assert (b32.output_tokens, b16.output_tokens, b32.frame_multiple) == (97, 127, 12)
    assert b32.gflops() == pytest.approx(34.8, rel=2e-3) and b16.gflops() == pytest.approx(121.4, rel=2e-3)
    for tokens, none, tome in ((50, 53.0, 40.2), (197, 211.3, 144.4)):
        assert make_schedule("none", 12, 12, tokens).gflops() == pytest.approx(none, rel=2e-3)
        assert make_schedule("tome", 12, 12, tokens).gflops() == pytest.approx(tome, rel=2e-3)
    # and of its Table 1, the settings of STA and of DiffRate for B/32 being fits
    for method, tokens, left, gflops in (
        ("evit", 50, 252, 37.2),
        ("diffrate", 197, 588, 138.5),
        ("diffrate", 50, 240, 36.8),
        ("sta", 50, 312, 35.7),
    ):
        schedule = make_schedule(method, 12, 12, tokens)
        assert schedule.output_tokens == left and schedule.gflops() == pytest.approx(gflops, rel=3e-3)


def test_the_final_norm_costs_the_tokens_that_pooling_reads() -> None:
    """One CLS token a frame, or all that is left but the CLS tokens and registers of all frames."""
    for schedule in (
        MergeSchedule.identity(2, 6, 21, 5),
        MergeSchedule.tempme(**{**TEMPME, "tokens": 21, "prefix": 5}),
    ):
        by_cls, by_mean = schedule.gflops(pool="cls"), schedule.gflops(pool="mean")
        assert by_mean - by_cls == pytest.approx((schedule.output_tokens - 5 * 6 - 6) * 2 * 768 / 1e9)
        assert by_cls == schedule.gflops()
    without_cls = MergeSchedule.identity(2, 4, 16, 0)
    assert without_cls.gflops() == without_cls.gflops(pool="mean")


def test_identity_keeps_everything_and_tome_clamps() -> None:
    assert MergeSchedule.identity(3, 4, 17).token_counts == [(4, 17)] * 3
    assert MergeSchedule.tome(4, 4, 10, r=99).token_counts == [(4, 6), (4, 4), (4, 3), (4, 2)]
    assert MergeSchedule.tome(3, 2, 10, r=[0, 3, 1]).token_counts == [(2, 10), (2, 7), (2, 6)]


def test_every_percentage_is_exact_integer_arithmetic() -> None:
    for percent in range(101):
        schedule = MergeSchedule.tempme(1, 2, 50, 0, (0,), (2,), percent, 0)
        assert schedule.output_tokens == 100 - min(49, 100 * percent // 100)
        # inside a clip it is of the tokens that merging across left, and 29% of 100 is 29, not int(100 * (1 - 0.71))
        inside = MergeSchedule.tempme(1, 2, 50, 0, (0,), (2,), 0, percent)
        assert inside.output_tokens == 100 - min(49, percent)
        both = MergeSchedule.tempme(1, 2, 50, 0, (0,), (2,), 20, percent)
        assert both.output_tokens == 80 - min(39, 8 * percent // 10)


def test_defaults_are_the_papers_b32() -> None:
    assert MergeSchedule.tempme() == make_schedule("tempme", 12, 12, 50)


@pytest.mark.parametrize("method", METHODS)
def test_json_round_trip(method: str) -> None:
    schedule = schedule_for(method, 6, TINY_SHAPE, 6)
    assert MergeSchedule.from_dict(json.loads(json.dumps(schedule.to_dict()))) == schedule
    assert hash(schedule) == hash(MergeSchedule.from_dict(schedule.to_dict()))


def test_json_of_parts_of_a_clip_and_of_gathered_tokens() -> None:
    joint = make_schedule("sta", 12, 8, 49, 0, True, keep_rate=0.5)
    assert [(plan.fewer_last, plan.slots) for plan in joint.plan if plan.slots] == [(200, 8), (96, 4), (48, 2)]
    assert not make_schedule("sta", 12, 8, 49, 0, True, keep_rate=1).changes
    fused = make_schedule("evit", 12, 12, 50)
    assert [plan.gathered for plan in fused.plan] == [0, 0, 0, 14, 0, 0, 10, 0, 0, 8, 0, 0]
    for schedule in (joint, fused):
        assert MergeSchedule.from_dict(json.loads(json.dumps(schedule.to_dict()))) == schedule


TEMPME = {"layers": 6, "frames": 6, "tokens": 17, "r": 1, "merge_layers": (2, 4), "merge_frames": (2, 3)}
TEMPME |= {"cross_percent": 30, "intra_percent": 10}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"frames": 5}, r"layer 2 joins 2 clips but 5 are left: 5 frames .* a multiple of 6"),
        ({"frames": 4}, r"layer 4 joins 3 clips but 2 are left.*a multiple of 6, or change merge_frames"),
        ({"frames": 0}, r"at least 1 frame.*got frames=0"),
        ({"tokens": 1}, r"1 patch token.*got .*tokens=1 with 1 CLS"),
        ({"layers": 0, "merge_layers": (), "merge_frames": ()}, r"1 layer; got .*layers=0"),
        ({"merge_layers": (2, 6)}, r"must ascend within 0..5 for a tower of 6 layers; got \(2, 6\)"),
        ({"merge_layers": (-1, 4)}, r"must ascend within 0..5"),
        ({"merge_layers": (4, 2)}, r"must ascend .*got \(4, 2\)"),
        ({"merge_layers": (2, 2)}, r"must ascend .*got \(2, 2\)"),
        ({"merge_frames": (2,)}, r"merge_layers=\(2, 4\) has 2, merge_frames=\(2,\) has 1"),
        ({"merge_frames": (2, 0)}, r"layer 4 joins 0 clips"),
        ({"cross_percent": 0.3}, r"cross_percent is a whole number of percent merged, 0..100; got 0.3"),
        ({"intra_percent": 101}, r"intra_percent .* got 101"),
        ({"intra_percent": -1}, r"intra_percent .* got -1"),
        ({"r": -1}, r"r counts .*got -1"),
        ({"r": 1.5}, r"r counts .*got 1.5"),
    ],
)
def test_tempme_refuses(change: dict, message: str) -> None:
    assert MergeSchedule.tempme(**TEMPME).output_tokens
    with pytest.raises(ValueError, match=message):
        MergeSchedule.tempme(**{**TEMPME, **change})


@pytest.mark.parametrize("r", [-1, 1.5, [1, 1], [1, -1, 1], [1, 0.5, 1]])
def test_tome_refuses(r: object) -> None:
    with pytest.raises(ValueError, match=r"r counts the pairs merged in each of 3 blocks, .*got "):
        MergeSchedule.tome(3, 2, 10, r)


def test_more_pairs_than_tokens_form() -> None:
    with pytest.raises(ValueError, match=r"layer 1 wants to merge 5 pairs after attention, but 9 tokens .* at most 4"):
        MergeSchedule("tome", 2, 10, (LayerPlan(after=1), LayerPlan(after=5)))
    with pytest.raises(ValueError, match=r"layer 0 wants to merge 10 pairs before attention, but 20 .* at most 9"):
        MergeSchedule("tempme", 2, 10, (LayerPlan(join=2, before=10),))


@pytest.mark.parametrize(
    ("method", "options", "message"),
    [
        ("tomee", {}, r"unknown method 'tomee'; expected one of none, tome, tempme"),
        ("tome", {"cross_percent": 3}, r"'tome' does not know the options cross_percent; it has r"),
        ("none", {"r": 3}, r"'none' does not know the options r; it has none"),
        ("tempme", {"merge_layer": 6}, r"does not know the options merge_layer; it has r, merge_layers"),
        ("tome", {}, r"no tome setting for 6 layers, 6 frames of 17 tokens: give r "),
        ("tempme", {"r": 1}, r"give cross_percent, intra_percent "),
    ],
)
def test_make_schedule_refuses(method: str, options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_schedule(method, 6, 6, 17, **options)


MORE = (
    LayerPlan(insert=2),
    LayerPlan(fewer_before=3, after=1),
    LayerPlan(join=2, before=2, fewer_after=4, pool_prefix=True),
    LayerPlan(fewer_last=5),
)


def test_dropped_inserted_and_pooled_tokens_are_counted() -> None:
    schedule = MergeSchedule("tempme", 4, 17, MORE)
    assert [tuple(count) for count in schedule.layer_counts] == [
        # clips, prefix, joined, attention, mlp, out, inserted
        (4, 3, 19, 19, 19, 19, 2),
        (4, 3, 19, 16, 15, 15, 2),
        (2, 5, 29, 27, 23, 23, 4),
        (2, 5, 23, 23, 23, 18, 4),
    ]
    assert schedule.token_counts[-1] == (2, 18) and schedule.output_tokens == 36
    # two CLS tokens are left to be normed and projected
    with_frames = MergeSchedule("tempme", 4, 17, (*MORE[:2], LayerPlan(2, 2, fewer_after=4), MORE[3]))
    assert with_frames.layer_counts[-1].prefix == 6 and with_frames.changes


def test_json_has_what_a_plan_has_and_no_more() -> None:
    schedule = MergeSchedule("tempme", 4, 17, MORE, proportional=False, settings=(("fuse", True), ("rate", 0.7)))
    data = json.loads(json.dumps(schedule.to_dict()))
    assert MergeSchedule.from_dict(data) == schedule and hash(schedule) == hash(MergeSchedule.from_dict(data))
    assert data["settings"] == {"fuse": True, "rate": 0.7} and data["fewer_last"] == [0, 0, 0, 5]
    plain = MergeSchedule.tempme(**TEMPME).to_dict()
    assert set(plain) == {"method", "frames", "tokens", "plan", "prefix", "joint"}
    for damage in ({"fewer_last": [1]}, {"insert": [-1, 0, 0, 0]}, {"settings": {"a": [1]}}, {"fewer_after": [99] * 4}):
        with pytest.raises(ValueError, match=r"schedule.*(each of 4 blocks|expected|has to stay)"):
            MergeSchedule.from_dict({**data, **damage})


@pytest.mark.parametrize(
    ("plan", "message"),
    [
        (LayerPlan(fewer_after=16), r"layer 0 wants 16 tokens fewer after attention, but at least 1 of 16 has to stay"),
        (LayerPlan(after=8, fewer_last=8), r"wants 8 tokens fewer behind the MLP, but at least 1 of 8"),
        (LayerPlan(fewer_before=-1), r"wants -1 tokens fewer before attention"),
        (LayerPlan(insert=-1), r"inserts -1 tokens"),
        (LayerPlan(fewer_after=3, gathered=5), r"3 tokens fewer after attention, so that at most 4 .*got gathered=5"),
        (LayerPlan(fewer_after=3, gathered=-1), r"got gathered=-1"),
    ],
)
def test_a_token_has_to_stay(plan: LayerPlan, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        MergeSchedule("tempme", 2, 17, (plan,))
