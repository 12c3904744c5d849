"""Videos that could not be read: never found, in every denominator, whatever the size of the split."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from tempme_vl.evaluation.metrics import Ranks, rank_statistics, summarize
from tempme_vl.evaluation.rerank import REST, Reranked, reranked_report
from tempme_vl.evaluation.retrieval import DIRECTIONS, Embeddings, retrieval_report, selection_score

WAYS = ("plain", "dual softmax", "re-ranked")
RECALLS = ("r1", "r5", "r10")


def embeddings(captions_per_video: list[int], unread: list[int], seed: int = 0) -> Embeddings:
    generator = torch.Generator().manual_seed(seed)
    owners = [video for video, count in enumerate(captions_per_video) for _ in range(count)]
    video, text = (torch.randn(count, 8, generator=generator) for count in (len(captions_per_video), len(owners)))
    # a caption is near its video, so that readable ones are found
    text = torch.nn.functional.normalize(text + 3 * video[owners], dim=-1)
    valid = torch.ones(len(video), dtype=torch.bool)
    valid[unread] = False
    return Embeddings(torch.nn.functional.normalize(video, dim=-1), text, torch.tensor(owners), valid)


def report_of(way: str, e: Embeddings) -> dict[str, Any]:
    if way != "re-ranked":
        return retrieval_report(e, dual_softmax=way == "dual softmax")
    similarity = e.text @ e.video.T
    t2v = similarity.masked_fill(~e.valid, -torch.inf)
    v2t = similarity.T.where(e.valid[:, None], torch.tensor(REST))
    return reranked_report(Reranked(t2v, v2t, e.valid, 128, similarity.numel()), e.video_of_caption)


def directions(report: dict[str, Any]) -> dict[str, dict[str, float]]:
    return {way: report[way] for way in DIRECTIONS if way in report}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("captions", [[1] * 10, [1] * 3, [2, 1, 3], [1]], ids=["10", "3", "several", "1"])
def test_nothing_read_is_nothing_found(way: str, captions: list[int]) -> None:
    report = report_of(way, embeddings(captions, list(range(len(captions)))))
    assert report["unreadable_videos"] == len(captions)
    for metrics in directions(report).values():
        assert [metrics[key] for key in (*RECALLS, "rsum")] == [0, 0, 0, 0]
    # behind everything: the last place of t2v, and of v2t the last after what is another video's
    last = len(captions)
    assert report["t2v"]["mean_rank"] == report["t2v"]["median_rank"] == last
    reverse = report.get("v2t", report.get("v2t_max_pooled"))
    assert reverse["mean_rank"] == reverse["median_rank"] == last


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("captions", [[1] * 15, [1, 2, 3] * 5], ids=["one caption", "several"])
def test_recall_is_at_most_the_share_that_was_read(way: str, captions: list[int]) -> None:
    unread = [1, 4, 5, 8, 9, 12, 14]
    e = embeddings(captions, unread)
    metrics = directions(report_of(way, e))
    readable_captions = sum(count for video, count in enumerate(captions) if video not in unread)
    assert metrics.pop("t2v")["r10"] == pytest.approx(100 * readable_captions / sum(captions))
    for reverse in metrics.values():
        assert reverse["r10"] == pytest.approx(100 * (15 - len(unread)) / 15)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("captions", [[1] * 9, [1, 2, 3] * 3], ids=["one caption", "several"])
def test_what_an_unread_video_looks_like_changes_nothing(way: str, captions: list[int]) -> None:
    """Black frames have an embedding too; it may be anybody's nearest."""
    e = embeddings(captions, [2, 7])
    expected = report_of(way, e)
    for other in (torch.zeros(8), e.text[0], e.text.mean(dim=0)):
        video = e.video.clone()
        video[[2, 7]] = other
        assert report_of(way, Embeddings(video, e.text, e.video_of_caption, e.valid)) == expected


@pytest.mark.parametrize("way", WAYS)
def test_readable_videos_rank_as_if_the_others_were_not_there(way: str) -> None:
    """As candidates of a caption; as captions of a video all stay, since they can be read."""
    e = embeddings([1] * 12, [0, 5, 6])
    kept = e.valid.nonzero().flatten()
    alone = Embeddings(e.video[kept], e.text[kept], torch.arange(len(kept)), torch.ones(len(kept), dtype=torch.bool))
    whole, part = report_of(way, e)["t2v"], report_of(way, alone)["t2v"]
    if way == "dual softmax":  # whose weights come from all captions
        return
    for key in RECALLS:
        assert whole[key] == pytest.approx(part[key] * 9 / 12)
    assert whole["mean_rank"] == pytest.approx((9 * part["mean_rank"] + 3 * 12) / 12)


def test_ties_of_readable_videos_keep_their_expected_rank() -> None:
    """A model that says the same of everything finds by chance among what was read, and nothing of the rest."""
    valid = torch.tensor([True] * 6 + [False] * 4)
    same = torch.nn.functional.normalize(torch.ones(10, 4), dim=-1)
    report = retrieval_report(Embeddings(same, same, torch.arange(10), valid))
    # 6 of 10 queries, each tied with all 6 readable videos
    assert report["t2v"]["r1"] == pytest.approx(60 / 6) and report["t2v"]["r5"] == pytest.approx(60 * 5 / 6)
    assert report["t2v"]["mean_rank"] == pytest.approx((6 * 3.5 + 4 * 10) / 10)
    # a readable video is tied with all 10 captions
    assert report["v2t"]["r1"] == pytest.approx(60 / 10) and report["v2t"]["r5"] == pytest.approx(60 / 2)
    assert report["v2t"]["mean_rank"] == pytest.approx((6 * 5.5 + 4 * 10) / 10)


def test_lost_queries_have_a_place_and_no_recall() -> None:
    scores = torch.tensor([[0.9, 0.1, 0.5], [0.9, 0.1, 0.5], [torch.nan, 0.1, 0.5]])
    ranks = rank_statistics(scores, [[0], [0, 2], [0]], lost=torch.tensor([False, True, True]))
    # behind the one candidate that is not its own; behind both others, and whatever its scores
    assert ranks.expected().tolist() == [1, 2, 3]
    for k in (1, 3, 100):
        assert ranks.recall(k).tolist() == [1, 0, 0]
    assert summarize(ranks)["rsum"] == pytest.approx(100)
    assert isinstance(ranks, Ranks) and len(ranks) == 3


@pytest.mark.parametrize("lost", [torch.zeros(2, dtype=torch.bool), torch.zeros(3)])
def test_lost_must_fit(lost: Tensor) -> None:
    with pytest.raises(ValueError, match=r"lost must be bool \(3,\)"):
        rank_statistics(torch.zeros(3, 3), lost=lost)


def test_the_score_to_choose_by_needs_no_single_caption() -> None:
    report = retrieval_report(embeddings([1] * 6, []))
    assert selection_score(report) == report["t2v"]["rsum"] + report["v2t"]["rsum"]
    several = embeddings([2, 1, 30, 1, 1, 1], [])
    several = Embeddings(several.video, several.text.roll(7, dims=1), several.video_of_caption, several.valid)
    report = retrieval_report(several)
    assert "v2t" not in report and report["v2t_max_pooled"]["rsum"] != report["v2t_any_caption"]["rsum"]
    assert selection_score(report) == report["t2v"]["rsum"] + report["v2t_max_pooled"]["rsum"]
