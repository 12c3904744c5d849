"""Bipartite matching and merge maps against plain loops over tokens."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tempme_vl.matching import MergeMap, bipartite_match

SHAPES = [(9, 1), (10, 1), (10, 0), (11, 3), (12, 4), (2, 1), (3, 1)]  # tokens, CLS tokens


def limits(tokens: int, prefix: int) -> list[int]:
    most = (tokens - prefix) // 2
    return sorted({0, 1, most // 2, most} & set(range(most + 1)))


CASES = [(n, p, r) for n, p in SHAPES for r in limits(n, p)]


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def expected_match(metric: Tensor, r: int, prefix: int) -> list[list[int]]:
    """Members of every output token of one row, by the definition: prefix, unmerged A ascending, all B."""
    tokens = range(prefix, len(metric))
    a = [i for i in tokens if i % 2 == 0]
    b = [i for i in tokens if i % 2 == 1]
    pairs = []
    for i in a if r else []:
        similarity = [torch.cosine_similarity(metric[i], metric[j], dim=0).item() for j in b]
        best = max(similarity)
        pairs.append((best, i, b[similarity.index(best)]))
    pairs = sorted(pairs, key=lambda pair: -pair[0])[:r]
    merged = {i: j for _, i, j in pairs}
    if not r:
        return [[i] for i in range(len(metric))]
    kept = [[i] for i in range(prefix)] + [[i] for i in a if i not in merged]
    return kept + [[j, *sorted(i for i, to in merged.items() if to == j)] for j in b]


def members(merge: MergeMap, row: int) -> list[list[int]]:
    groups = [[base] for base in merge.base[row].tolist()]
    for src, dst in sorted(zip(merge.src[row].tolist(), merge.dst[row].tolist(), strict=True)):
        groups[dst].append(src)
    return groups


@pytest.mark.parametrize(("tokens", "prefix", "r"), CASES)
def test_match_follows_the_definition(tokens: int, prefix: int, r: int) -> None:
    metric = random(3, tokens, 4)
    merge = bipartite_match(metric, r, prefix)
    for row in range(3):
        assert members(merge, row) == expected_match(metric[row], r, prefix)


@pytest.mark.parametrize(("tokens", "prefix", "r"), CASES)
def test_every_token_goes_to_exactly_one_and_cls_stay(tokens: int, prefix: int, r: int) -> None:
    merge = bipartite_match(random(3, tokens, 4), r, prefix)
    for row in range(3):
        groups = members(merge, row)
        assert sorted(i for group in groups for i in group) == list(range(tokens))
        assert len(groups) == tokens - r
        assert groups[:prefix] == [[i] for i in range(prefix)]
        for output, group in enumerate(groups):
            assert all(merge.assignment[row, i] == output for i in group)


@pytest.mark.parametrize(("tokens", "prefix", "r"), CASES)
def test_values_equal_a_loop(tokens: int, prefix: int, r: int) -> None:
    merge = bipartite_match(random(3, tokens, 4), r, prefix)
    x, size = random(3, tokens, 5, seed=1), random(3, tokens, 1, seed=2).exp()
    weighted, new_size = merge.weighted_mean(x, size)
    unmerged = merge.unmerge(weighted)
    source = torch.cat([torch.full((3, 1), -1), torch.arange(tokens).flip(0).repeat(3, 1)], dim=1)
    traced = merge.trace(source)
    assert (traced[:, 0] == -1).all()
    for row in range(3):
        for output, group in enumerate(members(merge, row)):
            values, weights = x[row, group], size[row, group]
            torch.testing.assert_close(merge.sum(x)[row, output], values.sum(0))
            torch.testing.assert_close(merge.mean(x)[row, output], values.mean(0))
            torch.testing.assert_close(weighted[row, output], (values * weights).sum(0) / weights.sum())
            torch.testing.assert_close(new_size[row, output], weights.sum(0))
            for token in group:
                assert torch.equal(unmerged[row, token], weighted[row, output])
                assert traced[row, tokens - token] == output  # source[row, tokens - token] is `token`


def test_weighted_mean_keeps_the_weighted_sum_and_the_dtype() -> None:
    x, size = random(2, 10, 3), torch.ones(2, 10, 1)
    merge = bipartite_match(x, 4)
    merged, new_size = merge.weighted_mean(x, size.double())
    torch.testing.assert_close((merged * new_size).sum(1), x.sum(1))
    half, half_size = merge.weighted_mean(x.bfloat16(), size)
    assert (half.dtype, half_size.dtype) == (torch.bfloat16, torch.float32)


def test_tokens_that_take_no_other_stay_to_the_bit() -> None:
    merge = bipartite_match(random(2, 11, 8), 3, 1)
    x, size = random(2, 11, 5, seed=1).float(), 1 + 6 * random(2, 11, 1, seed=2).abs().float()
    mean, total = merge.weighted_mean(x, size)
    for row in range(2):
        alone = [place for place in range(8) if place not in merge.dst[row].tolist()]
        assert len(alone) >= 5
        assert torch.equal(mean[row, alone], x[row, merge.base[row, alone]])
        assert torch.equal(total[row, alone], size[row, merge.base[row, alone]])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_added_up_in_float32(dtype: torch.dtype) -> None:
    """Forty tokens that merge into one move it by less than half precision holds, each by itself."""
    tokens = 41
    merge = MergeMap(torch.zeros(1, 1).long(), torch.arange(1, tokens).view(1, -1), torch.zeros(1, tokens - 1).long())
    x = torch.cat([torch.ones(1, 1, 1), torch.full((1, tokens - 1, 1), 1.125)], 1).to(dtype)
    mean, _ = merge.weighted_mean(x, torch.ones(1, tokens, 1))
    expected = x.double().mean().to(dtype)
    assert mean.dtype == dtype
    assert mean.item() == expected.item()


def test_gradient_of_weighted_mean() -> None:
    merge = bipartite_match(random(2, 7, 3), 3)
    x, size = random(2, 7, 3, seed=1).requires_grad_(), random(2, 7, 1, seed=2).exp().detach().requires_grad_()
    assert torch.autograd.gradcheck(merge.weighted_mean, (x, size))


def test_no_gradient_reaches_the_metric() -> None:
    metric = random(2, 8, 3).requires_grad_()
    merge = bipartite_match(metric, 2)
    assert not any(t.requires_grad for t in (merge.base, merge.src, merge.dst))


@pytest.mark.parametrize(("tokens", "r"), [(10, 2), (401, 30)])
def test_ties_go_to_the_first_partner_and_the_first_tokens(tokens: int, r: int) -> None:
    merge = bipartite_match(torch.ones(2, tokens, 3), r, num_prefix=1)
    first, rest = list(range(2, 2 * r + 1, 2)), [[i] for i in range(2 * r + 2, tokens, 2)]
    for row in range(2):
        assert members(merge, row) == [[0], *rest, [1, *first], *([i] for i in range(3, tokens, 2))]


@pytest.mark.parametrize("prefix", [1, 2, 3])
def test_the_prefix_has_no_say(prefix: int) -> None:
    """Other CLS tokens in any order give the same match; their own values just follow."""
    metric, x = random(2, 11, 4), random(2, 11, 4, seed=3)
    permutation = torch.cat([torch.arange(prefix).flip(0), torch.arange(prefix, 11)])
    merge = bipartite_match(metric, 3, prefix)
    other = metric.clone()
    other[:, :prefix] = random(2, prefix, 4, seed=4)
    for changed in (other, metric[:, permutation]):
        again = bipartite_match(changed, 3, prefix)
        assert all(torch.equal(getattr(merge, n), getattr(again, n)) for n in ("base", "src", "dst"))
    assert torch.equal(merge.sum(x[:, permutation])[:, :prefix], x[:, permutation][:, :prefix])
    assert torch.equal(merge.sum(x[:, permutation])[:, prefix:], merge.sum(x)[:, prefix:])


def test_scale_of_the_metric_does_not_matter() -> None:
    metric = random(2, 12, 4)
    merge, scaled = bipartite_match(metric, 4), bipartite_match(metric * random(2, 12, 1, seed=5).exp(), 4)
    assert torch.equal(merge.assignment, scaled.assignment)


def test_similarities_are_compared_in_float32_under_autocast() -> None:
    """Close vectors tie in bfloat16; the match must not depend on autocast."""
    metric = (1 + 1e-3 * random(2, 40, 16)).float()
    with torch.autocast("cpu", torch.bfloat16):
        inside = bipartite_match(metric, 9)
    assert torch.equal(inside.assignment, bipartite_match(metric, 9).assignment)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_compared_in_float32(dtype: torch.dtype) -> None:
    """Similarities of half-precision keys near 1 differ by less than half precision can tell."""
    metric = (1 + 0.1 * random(2, 40, 16)).to(dtype)
    merge = bipartite_match(metric, 9)
    for row in range(2):
        assert members(merge, row) == expected_match(metric[row].double(), 9, 1)


def test_nan_comes_first_and_still_every_token_goes_to_exactly_one() -> None:
    metric = random(1, 12, 4)
    metric[0, [2, 6]] = torch.nan
    merge = bipartite_match(metric, 3, 0)
    groups = members(merge, 0)
    assert sorted(i for group in groups for i in group) == list(range(12))
    assert {2, 6} < set(merge.src[0].tolist())


def test_order_by_similarity_lists_the_same_groups() -> None:
    metric = random(1, 12, 4)
    by_position, by_similarity = bipartite_match(metric, 2, 0), bipartite_match(metric, 2, 0, "similarity")
    assert sorted(members(by_position, 0)) == sorted(members(by_similarity, 0))
    a, b = metric[0, ::2], metric[0, 1::2]
    best = torch.cosine_similarity(a[:, None], b[None], dim=-1).amax(1)
    kept = [group[0] // 2 for group in members(by_similarity, 0)[: 12 - 2 - 6]]
    assert kept == sorted(kept, key=lambda i: -best[i])


@pytest.mark.parametrize("r", [-1, 5])
def test_impossible_r(r: int) -> None:
    with pytest.raises(ValueError, match=rf"10 tokens with 1 CLS can merge at most 4 pairs; got r={r}"):
        bipartite_match(random(1, 10, 3), r)
