"""Retrieval metrics are expected values under ties, checked against all orders of the tied candidates."""

import itertools

import numpy as np
import pytest
import torch

from tempme_vl.evaluation.metrics import (
    Ranks,
    captions_of_videos,
    concatenate,
    dual_softmax,
    format_metrics,
    max_pool_captions,
    multi_caption_metrics,
    rank_statistics,
    retrieval_metrics,
    summarize,
)


def random_scores(*shape: int, seed: int = 0, levels: int | None = None) -> torch.Tensor:
    """Distinct scores, or only `levels` different ones so that ties abound."""
    generator = torch.Generator().manual_seed(seed)
    if levels is None:
        return torch.randn(shape, generator=generator, dtype=torch.float64)
    return torch.randint(levels, shape, generator=generator).double()


def brute_force(scores: np.ndarray, targets: list[list[int]]) -> dict[str, float]:
    """Average over every order of the candidates that is consistent with the scores."""
    recalls: dict[int, list[float]] = {1: [], 5: [], 10: []}
    expected_ranks = []
    for row, correct in zip(scores, targets, strict=True):
        ranks = []
        for order in itertools.permutations(range(len(row))):
            if all(row[a] >= row[b] for a, b in itertools.pairwise(order)):
                ranks.append(1 + min(order.index(c) for c in correct))
        for k, values in recalls.items():
            values.append(float(np.mean([rank <= k for rank in ranks])))
        expected_ranks.append(np.mean(ranks))
    result = {f"r{k}": 100 * float(np.mean(values)) for k, values in recalls.items()}
    result["rsum"] = sum(result.values())
    return result | {
        "median_rank": float(np.median(expected_ranks)),
        "mean_rank": float(np.mean(expected_ranks)),
    }


def assert_same(a: dict[str, float], b: dict[str, float]) -> None:
    assert a.keys() == b.keys()
    assert a == pytest.approx(b, abs=1e-9)


@pytest.mark.parametrize("levels", [1, 2, 3, None])
@pytest.mark.parametrize("seed", range(3))
def test_equals_the_average_over_all_orders_of_ties(levels, seed):
    scores = random_scores(7, 7, seed=seed, levels=levels)
    assert_same(retrieval_metrics(scores), brute_force(scores.numpy(), [[i] for i in range(7)]))


@pytest.mark.parametrize("seed", range(3))
def test_several_correct_candidates_equal_the_average_over_all_orders(seed):
    scores = random_scores(4, 7, seed=seed, levels=2)
    targets = [[0, 3, 5], [1], [2, 6], [0, 1, 2, 3, 4, 5, 6]]
    assert_same(retrieval_metrics(scores, targets), brute_force(scores.numpy(), targets))


def test_denominator_is_the_number_of_queries():
    # One hit in 8 queries; the bit-equal columns 1 and 2 must not add queries.
    scores = torch.zeros(8, 8)
    scores[0, 0] = 1.0
    scores[1:, 1:3] = 2.0
    metrics = retrieval_metrics(scores)
    ranks = rank_statistics(scores)
    assert len(ranks) == 8
    # row 0 is right, rows 1 and 2 share the top place with one other, the rest rank below two
    assert metrics["r1"] == pytest.approx(100 * (1 + 0.5 + 0.5) / 8)


def test_distinct_scores_equal_sorting():
    scores = random_scores(60, 60)
    order = scores.argsort(dim=1, descending=True)
    rank = 1 + (order == torch.arange(60)[:, None]).nonzero()[:, 1].double()
    metrics = retrieval_metrics(scores)
    for k in (1, 5, 10):
        assert metrics[f"r{k}"] == pytest.approx(100 * float((rank <= k).double().mean()))
    assert metrics["mean_rank"] == pytest.approx(float(rank.mean()))
    assert metrics["median_rank"] == float(np.median(rank))


@pytest.mark.parametrize("levels", [None, 4])
def test_invariant_under_consistent_permutation(levels):
    scores = random_scores(30, 30, levels=levels)
    order = torch.randperm(30, generator=torch.Generator().manual_seed(1))
    assert_same(retrieval_metrics(scores), retrieval_metrics(scores[order][:, order]))


@pytest.mark.parametrize("levels", [None, 4])
def test_invariant_under_increasing_row_transforms(levels):
    scores = random_scores(30, 30, levels=levels)
    scale = torch.arange(1, 31)[:, None]
    assert_same(retrieval_metrics(scores), retrieval_metrics(scale * scores**3 + 7 * scores - scale))


@pytest.mark.parametrize("n", [1, 4, 10, 57])
@pytest.mark.parametrize("value", [0.0, -torch.inf, torch.inf])
def test_constant_matrix(n, value):
    metrics = retrieval_metrics(torch.full((n, n), value))
    for k in (1, 5, 10):
        assert metrics[f"r{k}"] == pytest.approx(100 * min(k, n) / n)
    assert metrics["mean_rank"] == metrics["median_rank"] == (n + 1) / 2


def test_expected_lies_between_optimistic_and_pessimistic():
    ranks = rank_statistics(random_scores(40, 40, levels=3))
    optimistic = ranks.greater + 1
    pessimistic = ranks.greater + ranks.tied - ranks.positives + 1
    assert (ranks.expected() >= optimistic).all() and (ranks.expected() <= pessimistic).all()
    assert (ranks.tied > 1).any(), "the case must hold ties"
    for k in (1, 5, 10):
        assert (ranks.recall(k) <= (optimistic <= k).double() + 1e-12).all()
        assert (ranks.recall(k) >= (pessimistic <= k).double() - 1e-12).all()


def test_nan_raises_and_names_the_row():
    scores = random_scores(6, 6)
    scores[3, 1] = torch.nan
    with pytest.raises(ValueError, match=r"NaN.*\[3\]"):
        retrieval_metrics(scores)
    with pytest.raises(ValueError, match=r"NaN.*\[4\]"):
        rank_statistics(scores[2:4], first_row=3)
    with pytest.raises(ValueError, match="NaN"):
        multi_caption_metrics(scores, range(6))
    with pytest.raises(ValueError, match="NaN"):
        retrieval_metrics(max_pool_captions(scores, range(6), 6))


@pytest.mark.parametrize("n", [1, 3, 12, 40])
@pytest.mark.parametrize("levels", [None, 2])
def test_bounds(n, levels):
    metrics = retrieval_metrics(random_scores(n, n, levels=levels))
    assert 0 <= metrics["r1"] <= metrics["r5"] + 1e-9 <= metrics["r10"] + 2e-9 <= 100 + 3e-9
    assert 1 <= metrics["median_rank"] <= n and 1 <= metrics["mean_rank"] <= n


@pytest.mark.parametrize("n", [1, 2, 4, 9, 25])
def test_identity_is_perfect(n):
    metrics = retrieval_metrics(torch.eye(n))
    assert metrics == {"r1": 100, "r5": 100, "r10": 100, "rsum": 300, "median_rank": 1, "mean_rank": 1}


@pytest.mark.parametrize("n", [2, 4, 12])
def test_anti_diagonal(n):
    # An even anti-diagonal matrix puts one wrong candidate first and ties the correct one with n - 2 others.
    metrics = retrieval_metrics(torch.eye(n).flip(1))
    assert metrics["r1"] == 0
    assert metrics["r5"] == pytest.approx(100 * min(1, 4 / (n - 1)))
    assert metrics["r10"] == pytest.approx(100 * min(1, 9 / (n - 1)))
    assert metrics["mean_rank"] == 1 + n / 2


def test_rsum_is_the_sum_of_one_direction():
    metrics = retrieval_metrics(random_scores(50, 50))
    assert metrics["rsum"] == pytest.approx(metrics["r1"] + metrics["r5"] + metrics["r10"])
    assert 0 < metrics["rsum"] < 300


@pytest.mark.parametrize("levels", [None, 3])
def test_v2t_is_t2v_of_the_transpose(levels):
    scores = random_scores(30, 30, levels=levels)
    both = multi_caption_metrics(scores, range(30))
    assert_same(both["v2t_any_caption"], retrieval_metrics(scores.T))
    assert_same(both["v2t_max_pooled"], retrieval_metrics(scores.T))
    assert_same(both["t2v"], retrieval_metrics(scores))


def test_multi_caption_definitions_by_hand():
    # Two videos; captions 0 and 1 belong to video 0, caption 2 to video 1.
    scores = torch.tensor([[0.9, 0.1], [0.2, 0.3], [0.8, 0.7]])
    metrics = multi_caption_metrics(scores, [0, 0, 1])
    assert metrics["t2v"]["r1"] == pytest.approx(100 / 3)  # only caption 0 finds its video
    # Video 0 ranks its captions 1st and 3rd; video 1 its only caption 1st.
    assert metrics["v2t_any_caption"]["mean_rank"] == 1
    pooled = max_pool_captions(scores.T, [0, 0, 1], 2)
    assert torch.equal(pooled, torch.tensor([[0.9, 0.8], [0.3, 0.7]]))
    assert metrics["v2t_max_pooled"]["r1"] == 100
    # With caption 2 best for both, video 0 finds one caption before its own in either definition.
    scores[2, 0] = 1.0
    metrics = multi_caption_metrics(scores, [0, 0, 1])
    assert metrics["v2t_any_caption"]["mean_rank"] == metrics["v2t_max_pooled"]["mean_rank"] == 1.5
    # A second strong caption of video 1 costs a place among captions, none among videos.
    more = torch.cat([scores, torch.tensor([[0.95, 0.9]])])
    metrics = multi_caption_metrics(more, [0, 0, 1, 1])
    assert metrics["v2t_any_caption"]["mean_rank"] == 2.0
    assert metrics["v2t_max_pooled"]["mean_rank"] == 1.5


@pytest.mark.parametrize("seed", range(4))
def test_video_level_and_caption_level_r1_agree_without_ties(seed):
    video_of_caption = [0, 0, 1, 2, 2, 2, 3, 4, 4, 5]
    metrics = multi_caption_metrics(random_scores(10, 6, seed=seed), video_of_caption)
    assert metrics["v2t_any_caption"]["r1"] == pytest.approx(metrics["v2t_max_pooled"]["r1"])
    assert metrics["v2t_any_caption"]["mean_rank"] >= metrics["v2t_max_pooled"]["mean_rank"]


def test_padding_and_repeated_targets_do_not_matter():
    scores = random_scores(4, 9, levels=3)
    ragged = [[0], [1, 4], [2, 8, 5], [3]]
    want = retrieval_metrics(scores, ragged)
    padded = torch.full((4, 6), -1)
    for row, targets in enumerate(ragged):
        padded[row, 6 - len(targets) :] = torch.tensor(targets)
    assert_same(retrieval_metrics(scores, padded), want)
    assert_same(retrieval_metrics(scores.numpy(), padded.numpy()), want)
    assert_same(retrieval_metrics(scores, [targets * 2 for targets in ragged]), want)


@pytest.mark.parametrize("chunk", [1, 3, 7, 23, 100])
@pytest.mark.parametrize("levels", [None, 3])
def test_chunk_size_does_not_matter(chunk, levels):
    scores = random_scores(23, 23, levels=levels)
    parts = [rank_statistics(scores[i : i + chunk], first_row=i) for i in range(0, 23, chunk)]
    assert summarize(concatenate(parts)) == retrieval_metrics(scores)


def test_even_number_of_queries_averages_the_median():
    ranks = Ranks(torch.tensor([0, 1, 4, 9]), torch.ones(4).long(), torch.ones(4).long())
    assert summarize(ranks)["median_rank"] == (2 + 5) / 2


def test_dual_softmax_is_the_product_with_the_softmax_over_queries():
    scores = random_scores(6, 5).float()
    rescaled = dual_softmax(scores.double())
    assert rescaled.dtype == torch.float32
    for column in range(5):
        weights = torch.softmax(scores[:, column] * 100, dim=0)
        torch.testing.assert_close(rescaled[:, column], scores[:, column] * weights)
    # The other direction is the same function of the transpose: there the softmax runs over the videos.
    torch.testing.assert_close(dual_softmax(scores.T), scores.T * torch.softmax(100 * scores, dim=1).T)
    assert torch.equal(dual_softmax(scores[:1]), scores[:1])


def test_dual_softmax_weakens_a_hub():
    # Candidate 0 is everybody's favourite, but query 0's most of all.
    scores = torch.tensor([[0.90, 0.10, 0.10], [0.80, 0.70, 0.10], [0.80, 0.10, 0.70]])
    assert retrieval_metrics(scores)["r1"] == pytest.approx(100 / 3)
    assert retrieval_metrics(dual_softmax(scores))["r1"] == pytest.approx(100)


def test_shards_in_any_split_equal_one_process():
    scores, targets = random_scores(20, 12, levels=4), torch.arange(20) % 12
    bounds = [0, 7, 7, 13, 20]  # unequal shards, one of them empty
    parts = [rank_statistics(scores[a:b], targets[a:b], first_row=a) for a, b in itertools.pairwise(bounds)]
    assert summarize(concatenate(parts)) == retrieval_metrics(scores, targets)


@pytest.mark.parametrize("levels", [None, 3])
def test_irrelevant_candidates_never_raise_recall(levels):
    scores = random_scores(20, 20, levels=levels)
    more = torch.cat([scores, random_scores(20, 15, seed=1, levels=levels)], dim=1)
    before, after = retrieval_metrics(scores), retrieval_metrics(more, range(20))
    assert all(after[key] <= before[key] + 1e-9 for key in ("r1", "r5", "r10", "rsum"))
    assert after["mean_rank"] >= before["mean_rank"]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.int64])
def test_scores_of_every_dtype_are_compared_exactly(dtype):
    scores = random_scores(30, 30, levels=5)
    assert_same(retrieval_metrics(scores.to(dtype)), retrieval_metrics(scores))
    requires_grad = scores.clone().requires_grad_()
    assert_same(retrieval_metrics(requires_grad), retrieval_metrics(scores))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: retrieval_metrics(torch.zeros(3, 4)), "square"),
        (lambda: retrieval_metrics(torch.zeros(3)), "matrix"),
        (lambda: retrieval_metrics(torch.zeros(0, 0)), "no queries"),
        (lambda: retrieval_metrics(torch.zeros(3, 4), [0, 1]), "3 queries; got 2"),
        (lambda: retrieval_metrics(torch.zeros(2, 4), [0, 4]), "0..3"),
        (lambda: retrieval_metrics(torch.zeros(2, 4), [[0], []]), "query 1 has no correct candidate"),
        (lambda: retrieval_metrics(torch.zeros(2, 2), torch.eye(2)), "candidate numbers"),
        (lambda: rank_statistics(torch.zeros(2, 4), first_row=3), "query 4"),
        (lambda: multi_caption_metrics(torch.zeros(3, 3), [0, 0, 1]), "no caption, the first is 2"),
        (lambda: max_pool_captions(torch.zeros(2, 4), [0, 1, 1], 2), "3 captions"),
        (lambda: captions_of_videos([0, 2], 2), "0..1"),
    ],
)
def test_bad_input_says_what_is_wrong(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_table_has_a_line_per_row():
    rows = {"t2v": retrieval_metrics(torch.eye(4)), "v2t": retrieval_metrics(torch.zeros(4, 4))}
    table = format_metrics(rows)
    lines = table.splitlines()
    assert len(lines) == 3 and len({len(line) for line in lines}) == 1
    assert lines[0].split()[:2] == ["r1", "r5"] and lines[2].split()[:2] == ["v2t", "25.00"]
