"""FlashVID, HoliTom, PruneVid, UniComp, STTM, LLaVA-Scissor and FrameFusion on small videos of any shape: what their
outputs stand for, what still and permuted videos leave, and what they refuse."""

from __future__ import annotations

from dataclasses import replace
from itertools import combinations
from typing import Any

import pytest
import torch
from torch import Tensor

from tempme_vl.compressors import (
    COMPRESSORS,
    FrameFeatures,
    KeptFeatures,
    by_frame,
    clusters,
    flashvid,
    framefusion,
    holitom,
    holitom_inner,
    prunevid,
    scissor,
    sttm,
    unicomp,
)
from tempme_vl.compressors.inner import whole
from tempme_vl.schema import ConfigError

NAMES = ("flashvid", "holitom", "prunevid", "unicomp", "sttm", "scissor")
SHAPES = ((1, 1, 1), (1, 1, 7), (1, 3, 3), (2, 5, 3), (3, 2, 2), (7, 5, 7), (9, 4, 4))  # frames, rows, columns
RETENTION: dict[str, float] = {"flashvid": 0.25, "holitom": 0.15, "unicomp": 0.25}


def video(frames: int, rows: int, columns: int, noise: float = 0.3, seed: int = 0, width: int = 12) -> FrameFeatures:
    """A scene that changes slowly, with all that these compressors read."""
    generator = torch.Generator().manual_seed(seed)

    def values(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    tokens = rows * columns
    x = values(1, tokens, width) + noise * values(frames, tokens, width).cumsum(0)
    return FrameFeatures(
        x,
        (rows, columns),
        deeper=(values(frames, tokens, 5), values(frames, tokens, width)),
        received=values(frames, tokens).softmax(-1),
        keys=values(frames, tokens, 8),
    )


def compress(name: str, features: FrameFeatures, **options: Any) -> KeptFeatures:
    record = COMPRESSORS[name]
    return record.compress(features, record.options(**options))


def options_for(name: str, tokens: int) -> dict[str, Any]:
    """UniComp's share must leave at least a token a group."""
    return {"retention": 1.0} if name == "unicomp" and tokens < 12 else {}


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_any_shape(name: str, shape: tuple[int, int, int]) -> None:
    features, total = video(*shape), shape[0] * shape[1] * shape[2]
    before, options = features.x.clone(), options_for(name, total)
    left = compress(name, features, **options)
    count = len(left.source)
    assert 0 < count <= total and left.x.shape == (count, 12) and left.x.isfinite().all()
    assert left.source.dtype == torch.int64 and left.source.unique().numel() == count
    assert left.source.min() >= 0 and left.source.max() < total
    for level, every in zip(left.deeper, features.deeper, strict=True):
        assert torch.equal(level, every.flatten(0, 1)[left.source])
    again = compress(name, features, **options)
    assert torch.equal(again.x, left.x) and torch.equal(again.source, left.source)
    assert torch.equal(features.x, before)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_clips_hold_their_tokens(name: str, shape: tuple[int, int, int]) -> None:
    left = compress(name, video(*shape), **options_for(name, shape[0] * shape[1] * shape[2]))
    clips, frames = by_frame(left, shape[1] * shape[2]).clips, left.source // (shape[1] * shape[2])
    assert sum(clip.tokens for clip in clips) == len(left.x)
    start = 0
    for clip in clips:
        inside = frames[start : start + clip.tokens]
        assert clip.tokens > 0 and clip.first <= clip.last < shape[0]
        assert (inside >= clip.first).all() and (inside <= clip.last).all()
        start += clip.tokens


@pytest.mark.parametrize("name", NAMES)
def test_half_precision_decides_the_same(name: str) -> None:
    features = video(6, 4, 4, width=16)
    half = replace(features, x=features.x.half())
    full = replace(features, x=half.x.float())
    left, expected = compress(name, half), compress(name, full)
    assert left.x.dtype == torch.float16
    assert torch.equal(left.source, expected.source)
    assert torch.allclose(left.x.float(), expected.x, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(("name", "share"), [(name, share) for name in RETENTION for share in (0.1, 0.25, 0.5)])
def test_about_the_share_is_left(name: str, share: float) -> None:
    features = video(12, 7, 7)
    noise = torch.randn(features.x.shape, generator=torch.Generator().manual_seed(1))
    features = replace(features, x=noise)  # nothing stands still
    keep = COMPRESSORS[name].keep
    assert keep is not None
    count = len(compress(name, features, **keep(share, 12, (7, 7))).x)
    slack = 0 if name == "unicomp" else 3 * 12  # numbers are rounded up, of two steps and of windows
    assert 0 < count <= share * 12 * 49 + slack
    if name == "holitom":
        assert count >= 0.8 * share * 12 * 49


@pytest.mark.parametrize("name", ["flashvid", "scissor", "prunevid", "holitom"])
def test_the_place_of_a_token_does_not_matter(name: str) -> None:
    """The same order of places in all frames leaves the same tokens."""
    features = video(6, 4, 5)
    order = torch.randperm(20, generator=torch.Generator().manual_seed(1))
    assert features.received is not None
    moved = replace(features, x=features.x[:, order], received=features.received[:, order], deeper=())
    left, again = compress(name, features), compress(name, moved)
    back = again.source // 20 * 20 + order[again.source % 20]
    assert set(back.tolist()) == set(left.source.tolist())
    expected, actual = left.x[left.source.argsort()], again.x[back.argsort()]
    assert torch.allclose(actual, expected, atol=1e-5)


@pytest.mark.parametrize("name", ["prunevid", "sttm", "scissor", "unicomp", "holitom"])
def test_a_still_video_leaves_its_first_frame(name: str) -> None:
    first = video(1, 4, 4)
    assert first.received is not None and first.keys is not None
    still = replace(
        first,
        x=first.x.expand(5, -1, -1).clone(),
        deeper=(),
        received=first.received.expand(5, -1),
        keys=first.keys.expand(5, -1, -1),
    )
    left, whole = compress(name, still), first.x[0]
    assert left.source.max() < 16
    assert len(left.x) < 16 or torch.allclose(left.x, whole, atol=1e-6)


@pytest.mark.parametrize("ascending", [False, True])
def test_no_cluster_is_empty(ascending: bool) -> None:
    x = torch.ones(5, 3)  # each centre is as near to a point as any other
    centres, assigned = clusters.cluster(x, 3, 2, ascending)
    assert assigned[centres].tolist() == [0, 1, 2]
    assert torch.equal(clusters.means(x, assigned, 3), torch.ones(3, 3))


# --- FlashVID


def test_a_tree_of_flashvid_is_the_mean_of_all_its_tokens() -> None:
    x = torch.tensor([[[1.0, 0.0]], [[2.0, 0.0]], [[6.0, 0.0]]])
    free = torch.ones(3, 1, dtype=torch.bool)
    roots, left = flashvid.merge_trees(x, free, 0.8, 0)
    assert roots[0].tolist() == [[3.0, 0.0]] and left.tolist() == [[True], [False], [False]]
    public, _ = flashvid.merge_trees(x, free, 0.8, 0, public_code=True)
    assert public[0].tolist() == [[4.5, 0.0]]  # 1 + (2 + 6), by two and not by three


def test_flashvid_merges_no_more_than_the_budget_asks_for() -> None:
    features = video(8, 1, 12, noise=0.01)
    free = torch.ones(8, 12, dtype=torch.bool)
    _, few = flashvid.merge_trees(features.x, free, 0.8, 0)
    _, left = flashvid.merge_trees(features.x, free, 0.8, 40)
    assert few.sum() == 12 and left.sum() == 41  # the published code stops one before the number


def test_flashvid_has_a_token_twice_only_as_published() -> None:
    """A segment of one frame: the tokens that stay unmerged are clustered again."""
    twice = 0
    for seed in range(4):
        features = video(1, 6, 6, seed=seed)
        right, public = compress("flashvid", features), compress("flashvid", features, public_code=True)
        assert len(right.source) == len(public.source) == right.source.unique().numel() == 12
        twice += 12 - public.source.unique().numel()
    assert twice > 0


@pytest.mark.parametrize("frames", [1, 2, 4])
def test_flashvid_has_as_many_segments_as_asked_for_or_frames(frames: int) -> None:
    parts = flashvid.segment(torch.ones(frames, 3, 4), 0.9, 3)
    assert len(parts) == min(frames, 3) and [t for part in parts for t in part] == list(range(frames))


# --- HoliTom


@pytest.mark.parametrize("seed", range(5))
def test_windows_of_holitom_save_most(seed: int) -> None:
    still = torch.rand(5, 6, generator=torch.Generator().manual_seed(seed)) < 0.7
    found = holitom.windows(still, 4)

    def saved(window: tuple[int, int]) -> int:
        start, stop = window
        return int(still[start : stop - 1].all(0).sum()) * (stop - start - 1) if stop - start > 1 else 0

    best = 0
    for number in range(6):
        for cuts in combinations(range(1, 6), number):
            windows = list(zip((0, *cuts), (*cuts, 6), strict=True))
            if all(stop - start <= 4 for start, stop in windows):
                best = max(best, sum(map(saved, windows)))
    assert found.saved == best == sum(saved((part.start, part.stop)) for part in found.frames)
    assert [t for part in found.frames for t in part] == list(range(6))


def test_windows_of_holitom_by_hand() -> None:
    nothing, all_still = torch.zeros(3, 2, dtype=torch.bool), torch.ones(3, 2, dtype=torch.bool)
    assert holitom.windows(nothing, 9) == ([range(0, 1), range(1, 2), range(2, 3), range(3, 4)], 0)
    assert holitom.windows(all_still, 9) == ([range(0, 4)], 6)
    assert holitom.windows(all_still, 2) == ([range(0, 2), range(2, 4)], 4)
    assert holitom.windows(all_still[:1, :1], 9) == ([range(0, 2)], 1)


def test_rows_of_holitom_end_with_the_separator() -> None:
    separator = torch.full((12,), 9.0)
    features = replace(video(6, 4, 3), separator=separator)
    left, plain = compress("holitom", features, rows=True), compress("holitom", features)
    tokens = left.source[left.source >= 0]
    assert sorted(tokens.tolist()) == sorted(plain.source.tolist()) and tokens.tolist() == sorted(tokens.tolist())
    ends = (left.source < 0).nonzero()[:, 0]
    assert (left.x[ends] == 9).all() and all((level[ends] == 0).all() for level in left.deeper)
    rows = torch.tensor_split(left.source, ends + 1)
    held = [set((row[row >= 0] // 3).tolist()) for row in rows if len(row)]
    assert all(len(row) == 1 for row in held) and len(set.union(*held)) == len(held)


@pytest.mark.parametrize(("beta", "expected"), [(1.0, 1.0), (0.5, 0.975), (0.0, 0.95), (None, 2.9 / 3)])
def test_beta_weighs_the_centre(beta: float | None, expected: float) -> None:
    options = holitom.Options(beta=beta, neighbours=3)
    merged, centres = holitom.contextual_tokens(torch.tensor([[1.0], [0.0], [1.9]]), 1, options)
    assert centres.tolist() == [0] and merged.item() == pytest.approx(expected)
    alone, _ = holitom.contextual_tokens(torch.tensor([[5.0]]), 1, options)
    assert alone.item() == 5


def test_holitom_inside_averages_one_after_the_other() -> None:
    hidden = torch.tensor([[9.0, 9.0], [1.0, 0.0], [3.0, 0.0], [5.0, 0.0], [0.0, 2.0], [9.0, 9.0]])
    attention = torch.zeros(2, 6, 6)
    attention[:, -1] = torch.tensor([0.0, 0.9, 0.1, 0.2, 0.8, 0.0])
    prompt = whole(torch.tensor([-1, 0, 0, 0, 0, -1]))
    left, merged = holitom_inner.step(prompt, hidden, attention, holitom_inner.Options(ratio=0.5))
    assert left.position.tolist() == [0, 1, 4, 5] and left.place.tolist() == [-1, 0, 0, -1]
    assert merged.tolist() == [[9, 9], [((1 + 3) / 2 + 5) / 2, 0], [0, 2], [9, 9]]
    words = whole(torch.full((6,), -1))
    left, nothing = holitom_inner.step(words, hidden, attention, holitom_inner.Options())
    assert torch.equal(nothing, hidden) and left.position.tolist() == list(range(6))
    with pytest.raises(ValueError, match="at least one of 4 video tokens"):
        holitom_inner.step(prompt, hidden, attention, holitom_inner.Options(ratio=1.0))


# --- PruneVid


@pytest.mark.parametrize(
    ("labels", "expected"),
    [
        ([0], [0]),
        ([0, 1, 2], [0, 1, 2]),  # no run at all
        ([0, 0, 1, 0, 0, 0], [0, 0, 0, 0, 0, 0]),
        ([1, 1, 0, 2, 2, 2], [1, 1, 2, 2, 2, 2]),  # the longer neighbour
        ([1, 1, 0, 2, 2], [1, 1, 1, 2, 2]),  # of equal ones the left
        ([0, 1, 1, 2], [1, 1, 1, 1]),
        ([0, 0, 1, 1, 1, 1, 0, 0, 0], [1, 1, 1, 1, 1, 1, 0, 0, 0]),  # a shorter run of a cluster does not stay
        ([0, 0, 1, 1, 0, 0], [0, 0, 1, 1, 0, 0]),  # equal ones do
    ],
)
def test_clusters_of_frames_become_runs(labels: list[int], expected: list[int]) -> None:
    assert prunevid.refined(labels) == expected


def test_prunevid_does_not_cluster_few_tokens() -> None:
    x = video(1, 1, 15).x[0]
    assert prunevid.clustered(x[:14], 0.5)[1].tolist() == list(range(14))
    merged, centres = prunevid.clustered(x, 0.5)
    assert len(merged) == len(centres) == 7


# --- UniComp


def test_groups_of_unicomp_are_like_their_first_frame() -> None:
    angles = torch.tensor([0.0, 0.05, 0.1, 0.15, 0.2])
    x = torch.stack([angles.cos(), angles.sin()], 1).unsqueeze(1)
    assert unicomp.groups(x, 0.006, 9) == [range(0, 3), range(3, 5)]  # 1 - cos(0.1) = 0.005, of 0.15 0.011
    assert unicomp.groups(x, 2.0, 2) == [range(0, 3), range(3, 5)]  # a third joins two


def test_groups_that_differ_may_keep_more() -> None:
    summary = torch.eye(4)[[0, 0, 0, 1]]
    budget = unicomp.budgets(summary, 40, 100)
    assert budget[3] > budget[0] == budget[1] == budget[2] and sum(budget) <= 40
    assert unicomp.budgets(summary[:1], 40, 100) == [40]
    assert unicomp.shared([10, 10, 10], [4, 30, 30]) == [10, 13, 13]
    assert unicomp.shared([10, 10, 10], [4, 4, 4]) == [10, 10, 10]


def test_tokens_of_unicomp_are_unlike_each_other() -> None:
    keys = torch.tensor([[1.0, 0.0], [1.0, 0.1], [0.0, 1.0]])
    chosen = unicomp.choose(torch.tensor([[2.0], [4.0], [8.0]]), keys, 0.2)
    assert chosen.tokens.tolist() == [2, 0]
    assert chosen.x.tolist() == [[8.0], [2.5]]  # (2 + (2 + 4) / 2) / 2


def test_a_token_of_unicomp_is_its_own_neighbour() -> None:
    x = torch.tensor([[2.0], [4.0]])
    assert unicomp.choose(x, torch.eye(2), 0.0).x.tolist() == [[2.0], [4.0]]


def test_unicomp_without_separator_and_by_channels() -> None:
    features = video(8, 6, 6)
    separated = compress("unicomp", replace(features, separator=torch.full((12,), 9.0)))
    plain = compress("unicomp", features)
    assert torch.equal(separated.x[separated.source >= 0], plain.x)
    assert (separated.source < 0).sum() == 8 and separated.source[-1] == -1
    public = compress("unicomp", features, public_code=True)
    assert [clip.tokens for clip in public.clips] != [clip.tokens for clip in plain.clips]


# --- STTM


def test_quadtrees_of_odd_sides() -> None:
    features = video(1, 3, 5)
    nodes = sttm.quadtrees(features.x, (3, 5), sttm.Options(threshold=-1.0))
    boxes = [(0, 0, 1, 1), (0, 1, 1, 3), (0, 3, 1, 5), (1, 0, 3, 1), (1, 1, 3, 3), (1, 3, 3, 5)]
    assert [tuple(box[1:]) for box in nodes.box.tolist()] == boxes
    assert nodes.size.tolist() == [1, 2, 2, 2, 4, 4]
    expected = features.x[0].reshape(3, 5, -1)[1:, 3:].mean((0, 1))
    assert torch.allclose(nodes.x[-1], expected, atol=1e-6)


def test_a_missing_child_is_like_any_node_but_for_the_published_code() -> None:
    same = torch.ones(1, 3, 2)
    same[0, 0] = torch.tensor([1.0, -1.0])  # stands alone
    assert len(sttm.quadtrees(same, (1, 3), sttm.Options()).x) == 2
    assert len(sttm.quadtrees(same, (1, 3), sttm.Options(public_code=True)).x) == 3


@pytest.mark.parametrize("weighted", [False, True])
def test_nodes_join_through_time(weighted: bool) -> None:
    """A node that stands still, over one that was divided in the frame before."""
    x = torch.zeros(2, 4, 3)
    x[0] = torch.tensor([[1.0, 0.4, 0.0], [1.0, -0.4, 0.0], [1.0, 0.0, 0.4], [0.0, 0.0, 1.0]])
    x[1] = torch.tensor([3.0, 0.0, 0.0])
    options = sttm.Options(threshold=0.9, temporal_threshold=0.85, weighted=weighted)
    nodes = sttm.merged_nodes(x, (2, 2), options)
    assert nodes.box.tolist() == [[0, 0, 0, 1, 1], [0, 1, 1, 2, 2]] and nodes.size.tolist() == [7, 1]
    first = (3 * 1.0 + 4 * 3.0) / 7 if weighted else (3 * 1.0 + 3.0) / 4
    assert nodes.x[0].tolist() == pytest.approx([first, 0.0, 0.4 / (7 if weighted else 4)])


def test_nothing_joins_where_nothing_is_alike() -> None:
    features = video(3, 4, 4)
    left = compress("sttm", features, threshold=1.0, temporal_threshold=1.0, root_level=2)
    assert torch.equal(left.x, features.x.flatten(0, 1))


def test_heads_have_cosines_of_their_own() -> None:
    a, b = torch.tensor([[3.0, 0.0, 0.0, 1.0]]), torch.tensor([[1.0, 0.0, 1.0, 0.0]])
    assert (sttm.unit(a, 2) * sttm.unit(b, 2)).sum() == pytest.approx(0.5)
    assert (sttm.unit(a, None) * sttm.unit(b, None)).sum() == pytest.approx(3 / (10**0.5 * 2**0.5))


# --- LLaVA-Scissor


def test_components_reach_through_others() -> None:
    angles = torch.tensor([0.0, 1.5, 0.3, 0.6])  # 0, 2, 3 in a row, and 0 is not joined to 3
    x = torch.stack([angles.cos(), angles.sin()], 1)
    found = scissor.components(x, 0.95)
    assert found.anchors.tolist() == [1, 2]
    assert torch.allclose(found.x, torch.stack([x[1], x[[0, 2, 3]].mean(0)]))


# --- FrameFusion


def test_framefusion_has_the_cost_it_was_asked_for() -> None:
    """Its tokens in all layers together, by hand."""
    features = video(10, 1, 30, noise=0.02)
    options = framefusion.Options(cost=0.4, similarity=0.999, ratio=0.2, layers=8)
    hidden = torch.cat([torch.ones(3, 12), features.x.flatten(0, 1), torch.ones(2, 12)])
    state, spent = framefusion.start(305, range(3, 303), 30), 0
    text = hidden[[0, 1, 2, 303, 304]]
    for layer in range(8):
        attention = torch.rand(2, len(hidden), len(hidden), generator=torch.Generator().manual_seed(layer))
        state, hidden = framefusion.step(state, hidden, attention.softmax(-1), options)
        spent += len(state.video)
        assert torch.equal(hidden[state.place < 0], text)
        assert torch.equal(state.position, state.position.sort().values)
    assert state.phase == "done"
    assert spent == pytest.approx(0.4 * 8 * 300, abs=8)


def test_what_framefusion_still_has_to_drop() -> None:
    options = framefusion.Options(cost=0.25, layers=4)  # the tokens of one layer
    assert framefusion.share_to_drop((), options) == 0.75
    assert framefusion.share_to_drop((0.5, 0.5), options) == 0.5  # 0.5 and 0.25 are spent, 0.25 are for two layers
    assert framefusion.share_to_drop((), framefusion.Options(cost=1.0)) == 0


def test_a_run_of_framefusion_becomes_its_mean() -> None:
    frames = torch.tensor([[[1.0, 0.0], [0.0, 1.0]], [[2.0, 0.0], [1.0, 0.0]], [[6.0, 0.0], [0.0, 5.0]]])
    state = framefusion.start(6, range(6), 2)
    options = framefusion.Options(cost=0.1, similarity=0.9, layers=2)
    state, hidden = framefusion.step(state, frames.flatten(0, 1), None, options)
    assert state.position.tolist() == [0, 1, 3, 5] and state.merged == pytest.approx((1 / 3,))
    assert hidden.tolist() == [[3.0, 0.0], [0.0, 1.0], [1.0, 0.0], [0.0, 5.0]]
    with pytest.raises(ValueError, match="expected a cost of at least"):
        framefusion.step(state, hidden, None, options)


def test_framefusion_reads_attention_once() -> None:
    features = video(4, 1, 6, noise=3.0)
    options = framefusion.Options(cost=0.5, similarity=1.0, ratio=0.5)
    state, hidden = framefusion.step(framefusion.start(24, range(24), 6), features.x.flatten(0, 1), None, options)
    assert state.phase == "prune" and len(hidden) == 24
    with pytest.raises(ValueError, match="give it the attention"):
        framefusion.step(state, hidden, None, options)
    with pytest.raises(ValueError, match="24 tokens that are left; got 23"):
        framefusion.step(state, hidden[1:], None, options)
    attention = torch.arange(24.0).expand(1, 24, 24)
    state, hidden = framefusion.step(state, hidden, attention, options)
    assert state.position.tolist() == list(range(24 - len(hidden), 24)) and 0 < len(hidden) < 24
    assert framefusion.step(state, hidden, None, options) == (state, hidden)


# --- what is refused


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("flashvid", {"retention": 0.0}),
        ("flashvid", {"selection": "all"}),
        ("flashvid", {"expansion": 0.5}),
        ("holitom", {"retention": 1.5}),
        ("holitom", {"longest": 0}),
        ("prunevid", {"segment_ratio": -0.1}),
        ("unicomp", {"token_distance": 2.5}),
        ("sttm", {"root_level": -1}),
        ("sttm", {"threshold": float("nan")}),
        ("scissor", {"tau": 2.0}),
    ],
)
def test_options_out_of_bounds(name: str, options: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=next(iter(options))):
        compress(name, video(2, 3, 3), **options)


def test_steps_refuse_options_out_of_bounds() -> None:
    state, hidden = framefusion.start(4, range(4), 2), torch.ones(4, 2)
    with pytest.raises(ConfigError, match="layers"):
        framefusion.step(state, hidden, None, framefusion.Options(layers=0))
    with pytest.raises(ConfigError, match="ratio"):
        holitom_inner.step(whole(torch.zeros(4)), hidden, torch.ones(1, 4, 4), holitom_inner.Options(ratio=2.0))
    with pytest.raises(ValueError, match="whole frames of 3 tokens"):
        framefusion.start(4, range(4), 3)
    with pytest.raises(ValueError, match=r"within 0\.\.4"):
        framefusion.start(4, range(2, 6), 2)


@pytest.mark.parametrize(("name", "reading"), [("flashvid", "received"), ("holitom", "received"), ("unicomp", "keys")])
def test_features_without_what_is_read(name: str, reading: str) -> None:
    assert reading in COMPRESSORS[name].reads
    with pytest.raises(ValueError, match=f"expected features with {reading}"):
        compress(name, replace(video(2, 3, 3), **{reading: None}))


def test_what_cannot_be_done() -> None:
    with pytest.raises(ValueError, match="leave out rows"):
        compress("holitom", video(2, 3, 3), rows=True)
    with pytest.raises(ValueError, match="head_width to divide the 12 channels; got 5"):
        compress("sttm", video(2, 3, 3), head_width=5)
    with pytest.raises(ValueError, match=r"2 x 9 tokens in 2 groups; got 0\.05: choose a larger one"):
        compress("unicomp", video(2, 3, 3), retention=0.05)
