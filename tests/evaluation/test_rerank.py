"""Re-ranking by a small matcher, against a loop over all pairs."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from training.processes import run

from tempme_vl.evaluation.rerank import REST, Reranked, rerank, reranked_report
from tempme_vl.evaluation.retrieval import Embeddings, format_retrieval, retrieval_report

VIDEOS, CAPTIONS, CPU = 7, 9, torch.device("cpu")
UNREAD = torch.tensor([True, True, False, True, True, False, True])


@dataclass(frozen=True)
class Projected:
    rows: Tensor

    def expand(self, pairs: int) -> Projected:
        assert len(self.rows) == 1
        return Projected(self.rows.expand(pairs, -1, -1))


@dataclass
class Matching:
    """Cross-attention of a caption's words to a video's tokens, in float64; counts what it is asked."""

    projected: list[int] = field(default_factory=list)
    scored: list[int] = field(default_factory=list)
    weight: Tensor = field(default_factory=lambda: torch.randn(5, 4, generator=seeded(9), dtype=torch.float64))

    def keys_values(self, tokens: Tensor) -> Projected:
        self.projected.append(len(tokens))
        return Projected(tokens.double() @ self.weight)

    def match_logits(self, states: Tensor, mask: Tensor, keys: Projected) -> Tensor:
        assert len(states) == len(mask) == len(keys.rows)
        self.scored.append(len(states))
        words = states.double()
        attended = (words @ keys.rows.mT).softmax(-1) @ keys.rows
        return ((words * attended).sum(-1) * mask).sum(-1) / mask.sum(-1)


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def inputs(videos: int = VIDEOS, captions: int = CAPTIONS) -> dict[str, Tensor]:
    words = torch.arange(captions)[:, None] % 3 + 1
    return {
        "tokens": torch.randn(videos, 3, 5, generator=seeded(0)),
        "states": torch.randn(captions, 4, 4, generator=seeded(1)),
        "mask": (torch.arange(4) <= words).long(),
        "similarity": torch.randn(captions, videos, generator=seeded(2)),
    }


def brute_force(given: dict[str, Tensor], top_k: int, valid: Tensor) -> tuple[Tensor, Tensor]:
    """Pair by pair, the candidates by sorting."""
    captions, videos = given["similarity"].shape
    t2v, v2t = torch.full((captions, videos), REST), torch.full((videos, captions), REST)
    t2v[:, ~valid] = -torch.inf
    for q in range(captions):
        for v in valid.nonzero().flatten().tolist():
            keys = Matching().keys_values(given["tokens"][v : v + 1])
            score = Matching().match_logits(given["states"][q : q + 1], given["mask"][q : q + 1], keys)
            row, column = given["similarity"][q], given["similarity"][:, v]
            if (row[valid] > row[v]).sum() + (row[:v] == row[v])[valid[:v]].sum() < top_k:
                t2v[q, v] = score
            if (column > column[q]).sum() + (column[:q] == column[q]).sum() < top_k:
                v2t[v, q] = score
    return t2v, v2t


def assert_same(left: Reranked, right: Reranked) -> None:
    torch.testing.assert_close(left.t2v, right.t2v, rtol=0, atol=0)
    torch.testing.assert_close(left.v2t, right.v2t, rtol=0, atol=0)
    assert torch.equal(left.valid, right.valid) and (left.top_k, left.pairs) == (right.top_k, right.pairs)


@pytest.mark.parametrize("valid", [torch.ones(VIDEOS).bool(), UNREAD], ids=["all readable", "some not"])
@pytest.mark.parametrize("top_k", [1, 2, 4, 7, 9, 128])
def test_equals_brute_force(top_k: int, valid: Tensor) -> None:
    given = inputs()
    t2v, v2t = brute_force(given, top_k, valid)
    reranked = rerank(Matching(), **given, valid=valid, device=CPU, top_k=top_k, pairs_per_batch=4)
    torch.testing.assert_close(reranked.t2v, t2v)
    torch.testing.assert_close(reranked.v2t, v2t)


def test_equal_similarities_take_the_lower_number() -> None:
    given = inputs() | {"similarity": torch.zeros(CAPTIONS, VIDEOS)}
    t2v, v2t = brute_force(given, 2, UNREAD)
    reranked = rerank(Matching(), **given, valid=UNREAD, device=CPU, top_k=2)
    torch.testing.assert_close(reranked.t2v, t2v)
    torch.testing.assert_close(reranked.v2t, v2t)
    assert ((reranked.t2v > REST).nonzero()[:, 1].view(-1, 2) == torch.tensor([0, 1])).all()


def test_all_pairs_when_there_are_no_more_candidates() -> None:
    reranked = rerank(Matching(), **inputs(), device=CPU, top_k=128)
    assert torch.equal(reranked.t2v, reranked.v2t.T) and (reranked.t2v > REST).all()
    assert reranked.pairs == VIDEOS * CAPTIONS


@pytest.mark.parametrize("top_k", [1, 3])
def test_as_many_candidates_as_asked_and_the_rest_at_the_bottom(top_k: int) -> None:
    reranked = rerank(Matching(), **inputs(), device=CPU, top_k=top_k)
    for scores in (reranked.t2v, reranked.v2t):
        assert ((scores != REST).sum(1) == top_k).all() and (scores[scores != REST] > REST).all()


def test_each_pair_is_scored_once_and_each_video_projected_once() -> None:
    matcher = Matching()
    reranked = rerank(matcher, **inputs(), valid=UNREAD, device=CPU, top_k=2, pairs_per_batch=3)
    union = (reranked.t2v.T > REST) | (reranked.v2t > REST)
    assert sum(matcher.scored) == reranked.pairs == union.sum() < (reranked.t2v > REST).sum() + 2 * UNREAD.sum()
    assert matcher.projected == [1] * int(UNREAD.sum()) and max(matcher.scored) <= 3


def test_without_cached_keys_every_pair_projects_its_video_and_nothing_else_changes() -> None:
    cached, anew = Matching(), Matching()
    options = {"valid": UNREAD, "device": CPU, "top_k": 3, "pairs_per_batch": 4}
    assert_same(rerank(cached, **inputs(), **options), rerank(anew, **inputs(), **options, cache_keys=False))
    assert anew.projected == anew.scored == cached.scored
    assert sum(cached.projected) < sum(anew.projected)


@pytest.mark.parametrize("pairs_per_batch", [1, 5, 1000])
def test_batches_do_not_matter(pairs_per_batch: int) -> None:
    expected = rerank(Matching(), **inputs(), device=CPU, top_k=3)
    reranked = rerank(Matching(), **inputs(), device=CPU, top_k=3, pairs_per_batch=pairs_per_batch)
    torch.testing.assert_close(reranked.t2v, expected.t2v)
    torch.testing.assert_close(reranked.v2t, expected.v2t)


def test_what_an_unread_video_holds_is_never_looked_at() -> None:
    given, broken = inputs(), inputs()
    broken["tokens"][~UNREAD] = torch.nan
    broken["similarity"][:, ~UNREAD] = torch.nan
    options = {"valid": UNREAD, "device": CPU, "top_k": 3}
    reranked = rerank(Matching(), **broken, **options)
    assert_same(reranked, rerank(Matching(), **given, **options))
    assert (reranked.t2v[:, ~UNREAD] == -torch.inf).all() and (reranked.v2t[~UNREAD] == REST).all()


def test_nothing_readable_scores_nothing() -> None:
    matcher = Matching()
    reranked = rerank(matcher, **inputs(), valid=torch.zeros(VIDEOS).bool(), device=CPU)
    assert reranked.pairs == 0 and not matcher.projected and (reranked.t2v == -torch.inf).all()


def test_bar_is_shown_on_demand(capfd: pytest.CaptureFixture[str]) -> None:
    rerank(Matching(), **inputs(), device=CPU, progress=False)
    assert not capfd.readouterr().err
    rerank(Matching(), **inputs(), device=CPU)
    assert "re-rank" in capfd.readouterr().err


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"similarity": torch.zeros(VIDEOS, CAPTIONS)}, r"expected similarity \(Q, V\)"),
        ({"mask": torch.ones(CAPTIONS, 3)}, r"mask \(Q, L\)"),
        ({"valid": torch.ones(CAPTIONS).bool()}, r"valid \(V,\)"),
        ({"similarity": torch.full((CAPTIONS, VIDEOS), torch.nan)}, "similarity holds NaN"),
        ({"top_k": 0}, "at least 1; got 0 and 64"),
        ({"pairs_per_batch": -1}, "at least 1; got 128 and -1"),
    ],
)
def test_errors_say_what_came(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        rerank(Matching(), **{**inputs(), "device": CPU, **changes})


CASES: dict[str, dict[str, Any]] = {
    "all": {},
    "top 2": {"top_k": 2, "pairs_per_batch": 3},
    "some unread": {"top_k": 3, "valid": UNREAD},
    "a rank without videos": {"valid": torch.arange(VIDEOS) == 4},
    "nothing readable": {"valid": torch.zeros(VIDEOS).bool()},
}


def rerank_cases() -> dict[str, tuple[Reranked, int]]:
    """The results of one rank, and how many pairs it scored itself."""
    dist.init_process_group("gloo")
    results = {}
    for name, options in CASES.items():
        matcher = Matching()
        results[name] = (rerank(matcher, **inputs(), device=CPU, **options), sum(matcher.scored))
    dist.destroy_process_group()
    return results


def test_two_ranks_equal_one() -> None:
    ranks = run(rerank_cases, world=2)
    for name, options in CASES.items():
        expected = rerank(Matching(), **inputs(), device=CPU, **options)
        for results in ranks:
            torch.testing.assert_close(results[name][0].t2v, expected.t2v)
            torch.testing.assert_close(results[name][0].v2t, expected.v2t)
        assert sum(results[name][1] for results in ranks) == results[name][0].pairs == expected.pairs
    assert ranks[0]["all"][1] == 4 * CAPTIONS and ranks[1]["all"][1] == 3 * CAPTIONS
    assert ranks[1]["a rank without videos"][1] == 0


@pytest.mark.parametrize(
    "owners", [list(range(VIDEOS)), [0, 1, 2, 3, 4, 5, 6, 6, 2, 0]], ids=["one caption", "several"]
)
@pytest.mark.parametrize("valid", [torch.ones(VIDEOS).bool(), UNREAD], ids=["all readable", "some not"])
def test_report_of_a_matcher_that_agrees_is_the_retrieval_report(owners: list[int], valid: Tensor) -> None:
    """With all pairs re-ranked by the similarity itself nothing changes but the name of the setting."""
    video = torch.nn.functional.normalize(torch.randn(VIDEOS, 6, generator=seeded(0)), dim=1)
    text = torch.nn.functional.normalize(torch.randn(len(owners), 6, generator=seeded(1)), dim=1)
    video[~valid] = 0  # as candidates for an unread video's captions, so both settings tie them
    similarity = text @ video.T
    t2v, v2t = similarity.masked_fill(~valid, -torch.inf), similarity.T.where(valid[:, None], torch.tensor(REST))
    report = reranked_report(Reranked(t2v, v2t, valid, 128, similarity.numel()), owners)
    plain = retrieval_report(Embeddings(video, text, torch.tensor(owners), valid))
    assert report == {**plain, "rerank_top_k": 128, "rerank_pairs": similarity.numel()}
    lines = format_retrieval({"plain": plain, "reranked": report}).splitlines()
    assert len(lines) == 1 + 2 * sum(name.endswith(("2v", "2t", "caption", "pooled")) for name in report)


def test_a_perfect_matcher_repairs_what_it_sees() -> None:
    """Correct partners are within the best two of the dual encoder, never the first."""
    count = 12
    similarity = torch.eye(count) + 2 * torch.eye(count).roll(1, 1)

    class Perfect(Matching):
        def match_logits(self, states: Tensor, mask: Tensor, keys: Projected) -> Tensor:
            return (states[:, 0, 0] == keys.rows[:, 0, 0]).double()

        def keys_values(self, tokens: Tensor) -> Projected:
            return Projected(tokens)

    numbers = torch.arange(count).view(-1, 1, 1)
    for top_k, expected in ((2, 100.0), (1, 0.0)):
        given = {"tokens": numbers, "states": numbers, "mask": torch.ones(count, 1), "similarity": similarity}
        report = reranked_report(rerank(Perfect(), **given, device=CPU, top_k=top_k), range(count))
        for direction in ("t2v", "v2t"):
            assert report[direction]["r1"] == pytest.approx(expected)


def test_a_pair_that_was_never_scored_raises() -> None:
    """NaN of the matcher, or of ranks that disagree on the candidates, has no rank."""
    scores = torch.zeros(3, 3)
    with pytest.raises(ValueError, match="NaN"):
        reranked_report(
            Reranked(scores, scores.index_fill(0, torch.tensor([1]), torch.nan), torch.ones(3).bool(), 1, 9), range(3)
        )
