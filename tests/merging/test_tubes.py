"""Merging along tubes: counts known ahead, every slot and place covered once, and the pairs that a plain loop finds."""

from __future__ import annotations

import random
from itertools import product

import pytest
import torch
from torch import Tensor

from tempme_vl.merging.tube_plan import ClipCount, TubePlan, TubeStep, sure_pairs, tube_plan
from tempme_vl.merging.tubes import Tubes
from tempme_vl.schema import read, write


def random_plan(rng: random.Random, slots: int, places: int) -> TubePlan:
    """Up to four steps, each with any number of pairs that it may have."""
    steps: list[TubeStep] = []
    for layer in range(rng.randint(0, 4)):
        before = steps[-1].clip if steps else 1
        clip = max(2, before * rng.choice([1, 2, 2, 3]))
        clip = clip if clip % before == 0 else 2 * before
        joined = TubePlan((*steps, TubeStep(layer, clip, 0))).clips(slots, places)[-1]
        whole = [sure_pairs(c.slots, c.runs, c.fewest, places) for c in joined if c.slots == clip]
        steps.append(TubeStep(layer, clip, rng.randint(0, min(whole, default=places))))
    return TubePlan(tuple(steps))


def run(plan: TubePlan, slots: int, places: int, metric: Tensor) -> tuple[Tubes, Tensor]:
    """The plan on states that are their own metric."""
    tubes, x = Tubes.start([(slots, places)]), metric
    for clips in plan.clips(slots, places)[1:]:
        match = tubes.match(x, clips)
        tubes, x = tubes.merge(match), match.mean(x)
    return tubes, x


def by_hand(plan: TubePlan, slots: int, places: int, metric: Tensor) -> dict[tuple[int, int, int], Tensor]:
    """(first, last, place) -> mean, run by run."""
    runs = {(t, t, p): metric[t * places + p] for t in range(slots) for p in range(places)}
    for step, clips in zip(plan.steps, plan.clips(slots, places)[1:], strict=True):
        for number, clip in enumerate(clips):
            pairs = []
            for p in range(places):
                own = sorted(run for run in runs if run[2] == p and run[0] // step.clip == number)
                pairs += list(zip(own[::2], own[1::2], strict=False))
            pairs.sort(key=lambda pair: -torch.cosine_similarity(runs[pair[0]], runs[pair[1]], 0).item())
            assert len(pairs) >= clip.pairs, (plan, clips)
            for left, right in pairs[: clip.pairs]:
                a, b = left[1] - left[0] + 1, right[1] - right[0] + 1
                mean = (a * runs.pop(left) + b * runs.pop(right)) / (a + b)
                runs[left[0], right[1], left[2]] = mean
    return runs


@pytest.mark.parametrize("seed", range(10))
def test_random_plans_do_what_a_loop_does(seed: int) -> None:
    """200 plans in all."""
    rng, generator = random.Random(seed), torch.Generator().manual_seed(seed)
    for _ in range(20):
        slots, places = rng.randint(1, 13), rng.randint(1, 6)
        plan = random_plan(rng, slots, places)
        metric = torch.randn(slots * places, 5, generator=generator, dtype=torch.float64)
        tubes, x = run(plan, slots, places, metric)
        runs = by_hand(plan, slots, places, metric)
        found = list(zip(tubes.first.tolist(), tubes.last.tolist(), tubes.place.tolist(), strict=True))
        assert set(found) == set(runs) and len(found) == len(runs) == plan.counts(slots, places)[-1]
        torch.testing.assert_close(x, torch.stack([runs[run] for run in found]))
        assert tubes.begin.tolist() == sorted(tubes.begin.tolist())
        covered = sorted((t, p) for first, last, p in found for t in range(first, last + 1))
        assert covered == sorted(product(range(slots), range(places)))


def test_pairs_that_are_sure_are_the_fewest_that_runs_can_lie_in() -> None:
    for slots, places in ((1, 3), (2, 3), (3, 3), (4, 3), (5, 2), (6, 2)):
        for fewest in range(1, slots + 1):
            least: dict[int, int] = {}
            for runs in product(range(fewest, slots + 1), repeat=places):
                pairs = sum(n // 2 for n in runs)
                least[sum(runs)] = min(least.get(sum(runs), pairs), pairs)
            assert least == {runs: sure_pairs(slots, runs, fewest, places) for runs in least}


@pytest.mark.parametrize(
    ("slots", "steps", "counts"),
    [
        (4, [(1, 2, 3)], [16, 10]),
        (5, [(1, 2, 3)], [20, 14]),  # the last slot has none beside it
        (6, [(1, 4, 3)], [24, 20]),  # half a clip: 1 of 3 pairs
        (7, [(1, 2, 4), (2, 4, 4)], [28, 16, 9]),  # three quarters of a clip: 3 of 4
        (6, [(1, 2, 4), (1, 4, 4)], [24, 12, 8]),  # half a clip, of one run a tube: none
        (1, [(1, 2, 4), (2, 4, 4)], [4, 4, 4]),
        (3, [(1, 2, 0), (2, 2, 4)], [12, 12, 8]),
        (12, [(1, 2, 4), (2, 4, 0), (3, 12, 12)], [48, 24, 24, 12]),  # whole, with 6 runs a tube: 3 pairs of each
    ],
)
def test_a_short_last_clip(slots: int, steps: list[tuple[int, int, int]], counts: list[int]) -> None:
    assert TubePlan(tuple(TubeStep(*step) for step in steps)).counts(slots, 4) == counts


def test_the_usual_plan() -> None:
    plan = tube_plan(32, 16, 100)
    assert plan.steps == (TubeStep(8, 2, 60), TubeStep(16, 4, 80), TubeStep(24, 8, 50))
    assert plan.counts(16, 100) == [1600, 1120, 800, 700]
    assert [(step.layer, step.clip) for step in tube_plan(27, 4, 10).steps] == [(9, 2), (18, 4)]
    assert tube_plan(32, 1, 100) == TubePlan()
    assert read(TubePlan, write(plan), "a plan") == plan


@pytest.mark.parametrize(("slots", "places"), [(2, 3), (3, 3), (4, 3), (6, 4), (7, 2), (8, 3), (8, 1)])
def test_a_budget_is_met_as_nearly_as_the_steps_can(slots: int, places: int) -> None:
    steps = min(3, slots.bit_length() - 1)
    possible = set()
    for pairs in product(range(places + 1), repeat=steps):
        joins = ((1 + number, 2 ** (1 + number), n) for number, n in enumerate(pairs) if n)
        possible.add(TubePlan(tuple(TubeStep(*join) for join in joins)).counts(slots, places)[-1])
    for limit in range(min(possible), slots * places + 1):
        count = tube_plan(8, slots, places, tokens=limit).counts(slots, places)[-1]
        assert count == max(each for each in possible if each <= limit)


def test_a_small_budget_takes_more_steps() -> None:
    plan = tube_plan(32, 32, 64, share=1 / 20)
    assert [step.clip for step in plan.steps] == [2, 4, 8, 16, 32]
    assert plan.counts(32, 64)[-1] == 102  # of 2048, a twentieth
    assert tube_plan(32, 16, 100, share=0.29).counts(16, 100)[-1] == 464


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"share": 0.01}, "at least 4 of the 32 tokens of 8 slots with 4 places; got 0"),
        ({"tokens": 3}, "at least 4 of the 32"),
        ({"tokens": 3, "share": 0.5}, "got both"),
    ],
)
def test_budgets_that_are_refused(options: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        tube_plan(8, 8, 4, **options)


@pytest.mark.parametrize("steps", [[(2, 2, 1), (1, 4, 1)], [(0, 4, 1), (1, 6, 1)], [(0, 1, 1)], [(0, 2, -1)]])
def test_plans_that_are_refused(steps: list[tuple[int, int, int]]) -> None:
    with pytest.raises(ValueError, match=r"expected a layer from .* got TubeStep"):
        TubePlan(tuple(TubeStep(*step) for step in steps))


def test_more_pairs_than_are_sure_are_refused() -> None:
    plan = TubePlan((TubeStep(1, 2, 3), TubeStep(5, 2, 2)))
    with pytest.raises(ValueError, match=r"before block 5 wants to merge 2 pairs .* 5 runs is sure to have 1"):
        plan.counts(4, 4)
    with pytest.raises(ValueError, match="at least 1 slot and 1 place; got 0 and 4"):
        plan.counts(0, 4)


def test_runs_of_other_clips_are_refused() -> None:
    with pytest.raises(ValueError, match="expected clips of 6 runs in 2 slots"):
        Tubes.start([(2, 3)]).match(torch.randn(6, 4), [ClipCount(2, 1, 4, 1)])


def test_places_in_another_order_merge_as_before() -> None:
    plan = TubePlan((TubeStep(0, 2, 5), TubeStep(1, 4, 4), TubeStep(2, 8, 3)))
    x, order = torch.randn(8, 6, 3, generator=torch.Generator().manual_seed(0)), torch.tensor([3, 0, 5, 1, 2, 4])
    tubes, merged = run(plan, 8, 6, x.flatten(0, 1))
    others, mixed = run(plan, 8, 6, x[:, order].flatten(0, 1))
    runs = list(zip(tubes.first.tolist(), tubes.last.tolist(), tubes.place.tolist(), strict=True))
    places = order[others.place].tolist()
    again = list(zip(others.first.tolist(), others.last.tolist(), places, strict=True))
    assert runs != again and sorted(runs) == sorted(again)
    back = torch.tensor([again.index(run) for run in runs])
    assert torch.equal(mixed[back], merged)


def test_videos_side_by_side_merge_as_alone() -> None:
    grids, generator = [(4, 3), (1, 5), (5, 2)], torch.Generator().manual_seed(0)
    plan = TubePlan((TubeStep(0, 2, 2), TubeStep(0, 4, 1)))
    metrics = [torch.randn(slots * places, 4, generator=generator) for slots, places in grids]
    tubes, x = Tubes.start(grids), torch.cat(metrics)
    for step in (1, 2):
        clips = [clip for grid in grids for clip in plan.clips(*grid)[step]]
        match = tubes.match(x, clips)
        tubes, x = tubes.merge(match), match.mean(x)
    alone = [run(plan, *grid, metric) for grid, metric in zip(grids, metrics, strict=True)]
    offsets = [0, 12, 17]
    assert torch.equal(tubes.begin, torch.cat([t.begin + n for (t, _), n in zip(alone, offsets, strict=True)]))
    assert torch.equal(tubes.length, torch.cat([t.length for t, _ in alone]))
    torch.testing.assert_close(x, torch.cat([x for _, x in alone]), rtol=0, atol=1e-6)


def test_what_is_alike_stays_the_same_to_the_last_bit() -> None:
    x = torch.randn(3, 4).repeat(7, 1)
    tubes, merged = run(TubePlan((TubeStep(0, 2, 2), TubeStep(1, 4, 3))), 7, 3, x)
    assert len(merged) < 21 and torch.equal(merged, x[:3][tubes.place])


def three_slots() -> Tubes:
    """2 places; the first is one run of 3 slots, the second one of 1 slot and one of 2."""
    return Tubes(torch.tensor([0, 1, 3]), torch.tensor([3, 1, 2]), Tubes.start([(3, 2)]).cells)


def test_slots_attend_to_what_covers_them() -> None:
    tubes = three_slots()
    whole = tubes.by_slot(torch.tensor([2, 2, 2]))
    assert whole.queries is None and whole.bias is None and whole.keys is not None
    assert (whole.query_lengths.tolist(), whole.key_lengths.tolist()) == ([2, 1, 0], [2, 2, 2])
    assert whole.keys.tolist() == [0, 1, 0, 2, 0, 2]
    windows = tubes.by_slot(torch.ones(6, dtype=torch.int64))
    assert windows.query_lengths.tolist() == [1, 1, 0, 1, 0, 0]


def test_clips_attend_to_all_of_their_runs() -> None:
    tubes, clips = three_slots(), [ClipCount(3, 0, 3, 1)]
    whole = tubes.by_clip(torch.tensor([2, 2, 2]), clips)
    assert whole.queries is not None and whole.bias is not None
    assert (whole.queries.tolist(), whole.query_lengths.tolist()) == ([0, 1, 2], [3])
    torch.testing.assert_close(whole.bias.exp(), torch.tensor([3.0, 1.0, 2.0]))
    windows = tubes.by_clip(torch.ones(6, dtype=torch.int64), clips)
    assert (windows.query_lengths.tolist(), windows.key_lengths.tolist()) == ([1, 2], [1, 2])


def test_two_clips_of_windows() -> None:
    clips = [ClipCount(2, 0, 6, 2), ClipCount(1, 0, 3, 1)]
    segments = Tubes.start([(3, 3)]).by_clip(torch.tensor([2, 1, 2, 1, 2, 1]), clips)
    assert segments.keys is not None and segments.bias is None
    assert segments.keys.tolist() == [0, 1, 3, 4, 2, 5, 6, 7, 8]
    assert segments.key_lengths.tolist() == [4, 2, 2, 1]
