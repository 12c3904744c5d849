"""Retrieval metrics as expected values under ties.

Equal scores carry no order, so every number here is the average over all orders of the tied candidates.
Sorting and looking for the correct score counts a tie as a hit; counting only strictly greater scores gives a
constant matrix 100 %. Ranks are counted row by row, so a large matrix can be fed in chunks of rows and need
never be held whole.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from tempme_vl.reports import format_columns

RECALL_AT = (1, 5, 10)

Targets = Tensor | np.ndarray | Sequence[int] | Sequence[Sequence[int]]


@dataclass(frozen=True)
class Ranks:
    """Where the best correct candidate of each query stands; all fields are int64 (Q,) on the CPU.

    `greater` candidates score strictly higher, `tied` candidates (the correct one included) score the same,
    and `positives` of those tied are correct. A query that is `lost` has none of either: what is correct for it comes
    behind everything else, and is not found among any number of candidates.
    """

    greater: Tensor
    tied: Tensor
    positives: Tensor

    def __len__(self) -> int:
        return len(self.greater)

    def expected(self) -> Tensor:
        """Expected rank of the first correct candidate, counted from 1; float64 (Q,)."""
        return self.greater.double() + (self.tied + 1).double() / (self.positives + 1).double()

    def recall(self, k: int) -> Tensor:
        """Probability that a correct candidate is among the first `k`; float64 (Q,)."""
        # Hypergeometric: of the tied group, `places` candidates fall within the first k; all of them are
        # wrong with probability prod_i (wrong - i) / (tied - i).
        places = (k - self.greater).clamp(min=0)
        wrong = self.tied - self.positives
        miss = torch.ones(len(self), dtype=torch.float64)
        for i in range(k):
            step = (wrong - i).clamp(min=0).double() / (self.tied - i).clamp(min=1).double()
            miss = torch.where(i < places, miss * step, miss)
        return torch.where(self.positives > 0, 1.0 - miss, 0.0)


def rank_statistics(
    similarity: Tensor | np.ndarray,
    targets: Targets | None = None,
    first_row: int = 0,
    lost: Tensor | None = None,
) -> Ranks:
    """Rank the correct candidates of some queries.

    Args:
        similarity: (Q, C), rows are queries, columns candidates, any real dtype; higher is better.
        targets: the correct candidates of each query: (Q,), or (Q, P) padded with -1, or Q lists of any
            length. Without it, the candidate of query i is number `first_row` + i.
        first_row: number of the first row within the whole matrix, when this is one chunk of it.
        lost: (Q,) bool, queries that cannot be answered because they, or what is correct for them, could not be read:
            whatever their scores, their correct candidates rank behind all others, and no recall counts them.

    Raises:
        ValueError: on NaN scores (names the row), a wrong shape, or a query without a valid target.
    """
    scores = _matrix(similarity)
    num_queries, num_candidates = scores.shape
    lost = torch.zeros(num_queries, dtype=torch.bool) if lost is None else lost.cpu()
    if lost.shape != (num_queries,) or lost.dtype != torch.bool:
        raise ValueError(f"lost must be bool ({num_queries},); got {lost.dtype} of shape {tuple(lost.shape)}")
    scores = scores.masked_fill(lost.unsqueeze(1).to(scores.device), 0.0) if lost.any() else scores
    nan_rows = scores.isnan().any(dim=1).nonzero().flatten()
    if len(nan_rows):
        rows = [first_row + int(row) for row in nan_rows[:5]]
        raise ValueError(
            f"similarity holds NaN in {len(nan_rows)} row(s), the first are {rows}: "
            "find the embeddings that are not finite; NaN has no rank"
        )
    if targets is None:
        if first_row + num_queries > num_candidates:
            raise ValueError(f"query {num_candidates} and later have no candidate of the same number: pass targets")
        targets = torch.arange(first_row, first_row + num_queries)
    index = _padded_targets(targets, num_queries, num_candidates, first_row).to(scores.device)

    valid = index >= 0
    positive = scores.gather(1, index.clamp(min=0))
    best = positive.masked_fill(~valid, -torch.inf).amax(dim=1, keepdim=True)
    others = num_candidates - valid.sum(dim=1).cpu()
    return Ranks(
        greater=torch.where(lost, others, (scores > best).sum(dim=1).cpu()),
        tied=(scores == best).sum(dim=1).cpu().masked_fill(lost, 0),
        positives=((positive == best) & valid).sum(dim=1).cpu().masked_fill(lost, 0),
    )


def concatenate(parts: Sequence[Ranks]) -> Ranks:
    """Join the ranks of several chunks or shards of queries."""
    return Ranks(
        greater=torch.cat([part.greater for part in parts]),
        tied=torch.cat([part.tied for part in parts]),
        positives=torch.cat([part.positives for part in parts]),
    )


def summarize(ranks: Ranks) -> dict[str, float]:
    """r1, r5, r10 and their sum rsum in percent of all queries; median_rank and mean_rank counted from 1."""
    if not len(ranks):
        raise ValueError("there are no queries to summarize")
    summary = {f"r{k}": 100.0 * float(ranks.recall(k).mean()) for k in RECALL_AT}
    summary["rsum"] = sum(summary.values())
    expected = ranks.expected().numpy()
    # numpy averages the middle two; torch's median takes the lower
    summary["median_rank"] = float(np.median(expected))
    summary["mean_rank"] = float(expected.mean())
    return summary


def retrieval_metrics(
    similarity: Tensor | np.ndarray, targets: Targets | None = None, lost: Tensor | None = None
) -> dict[str, float]:
    """Metrics of one direction; the rows of `similarity` (Q, C) are queries. Transpose it for the other one.

    Arguments and errors as in `rank_statistics`, the keys as in `summarize`. Without `targets` the matrix
    must be square.
    """
    scores = _matrix(similarity)
    if targets is None and scores.shape[0] != scores.shape[1]:
        raise ValueError(f"without targets the matrix must be square; got {tuple(scores.shape)}: pass targets")
    return summarize(rank_statistics(scores, targets, lost=lost))


def multi_caption_metrics(
    similarity: Tensor | np.ndarray, video_of_caption: Tensor | np.ndarray | Sequence[int]
) -> dict[str, dict[str, float]]:
    """Metrics for videos with several captions each (MSVD, the full MSRVTT test set).

    Args:
        similarity: (captions, videos).
        video_of_caption: (captions,), the number of each caption's video; every video needs a caption.

    Returns:
        "t2v": every caption is a query, its video the target. For the reverse direction two definitions are
        in public use: "v2t_any_caption" ranks all captions for a video and takes the best of its own;
        "v2t_max_pooled" scores two videos by the best caption of the second and ranks videos.
    """
    scores = _matrix(similarity)
    by_video = scores.T
    return {
        "t2v": retrieval_metrics(scores, torch.as_tensor(video_of_caption)),
        "v2t_any_caption": retrieval_metrics(by_video, captions_of_videos(video_of_caption, scores.shape[1])),
        "v2t_max_pooled": retrieval_metrics(max_pool_captions(by_video, video_of_caption, scores.shape[1])),
    }


def captions_of_videos(video_of_caption: Tensor | np.ndarray | Sequence[int], num_videos: int) -> list[list[int]]:
    """The caption numbers of each video, as `targets` for video queries ("any caption")."""
    captions: list[list[int]] = [[] for _ in range(num_videos)]
    for caption, video in enumerate(_video_numbers(video_of_caption, num_videos).tolist()):
        captions[video].append(caption)
    return captions


def max_pool_captions(
    similarity: Tensor | np.ndarray, video_of_caption: Tensor | np.ndarray | Sequence[int], num_videos: int
) -> Tensor:
    """(Q, captions) scores -> (Q, num_videos), each the maximum over the captions of that video."""
    scores = _matrix(similarity)
    owner = _video_numbers(video_of_caption, num_videos)
    if scores.shape[1] != len(owner):
        raise ValueError(f"expected scores (queries, {len(owner)} captions); got shape {tuple(scores.shape)}")
    pooled = scores.new_full((scores.shape[0], num_videos), -torch.inf)
    # amax keeps NaN, so NaN still raises when the result is ranked.
    return pooled.scatter_reduce(1, owner.to(scores.device).expand_as(scores), scores, "amax")


def dual_softmax(similarity: Tensor | np.ndarray, temperature: float = 100.0) -> Tensor:
    """x * softmax(temperature * x) over the queries: (Q, C) scores weighted by each candidate's preference.

    It looks at all queries of the test set at once, so it is a different setting from plain retrieval: name
    it wherever its numbers are shown. For the other direction pass the transposed matrix. A single query
    comes back unchanged. Returns float32. (CAMoE, arXiv 2109.04290.)
    """
    scores = _matrix(similarity).float()
    return scores * torch.softmax(temperature * scores, dim=0)


def format_metrics(rows: Mapping[str, Mapping[str, float]]) -> str:
    """A plain-text table: one line per named row of metrics, the columns in the order of the first row."""
    return format_columns(
        [{"": name, **{metric: f"{value:.2f}" for metric, value in row.items()}} for name, row in rows.items()]
    )


def _matrix(similarity: Tensor | np.ndarray) -> Tensor:
    scores = torch.as_tensor(similarity).detach()
    if scores.ndim != 2:
        raise ValueError(f"similarity must be a matrix (queries, candidates); got shape {tuple(scores.shape)}")
    return scores if scores.is_floating_point() else scores.double()


def _padded_targets(targets: Targets, num_queries: int, num_candidates: int, first_row: int) -> Tensor:
    """Targets in any accepted form -> int64 (Q, P), -1 where there is none, no candidate twice in a row."""
    if isinstance(targets, (Tensor, np.ndarray)):
        given = torch.as_tensor(targets).cpu()
        if given.ndim not in (1, 2) or given.is_floating_point() or given.dtype == torch.bool:
            raise ValueError(
                "targets must be candidate numbers of shape (Q,) or (Q, P), padded with -1; "
                f"got {given.dtype} of shape {tuple(given.shape)}"
            )
        index = given.long().reshape(len(given), -1) if len(given) else given.long().reshape(0, 1)
    else:
        lists = [[int(row)] if isinstance(row, (int, np.integer)) else [int(c) for c in row] for row in targets]
        width = max([len(row) for row in lists], default=1)
        padded = [row + [-1] * (width - len(row)) for row in lists]
        index = torch.tensor(padded, dtype=torch.int64).reshape(len(lists), width)
    if len(index) != num_queries:
        raise ValueError(f"targets must name the candidates of {num_queries} queries; got {len(index)}")
    if index.numel() and (int(index.max()) >= num_candidates or int(index.min()) < -1):
        raise ValueError(
            f"targets must lie in 0..{num_candidates - 1} (or be -1 as padding); "
            f"got {int(index.min())}..{int(index.max())}"
        )
    without = (index >= 0).any(dim=1).logical_not().nonzero().flatten()
    if len(without):
        raise ValueError(f"query {first_row + int(without[0])} has no correct candidate: every query needs one")
    index = index.sort(dim=1).values
    repeated = torch.zeros_like(index, dtype=torch.bool)
    repeated[:, 1:] = index[:, 1:] == index[:, :-1]
    return index.masked_fill(repeated, -1)


def _video_numbers(video_of_caption: Tensor | np.ndarray | Sequence[int], num_videos: int) -> Tensor:
    owner = torch.as_tensor(video_of_caption).cpu().long()
    if owner.ndim != 1 or not len(owner) or int(owner.min()) < 0 or int(owner.max()) >= num_videos:
        raise ValueError(f"video_of_caption must hold one number in 0..{num_videos - 1} per caption; got {owner}")
    without = (torch.bincount(owner, minlength=num_videos) == 0).nonzero().flatten()
    if len(without):
        raise ValueError(
            f"{len(without)} of {num_videos} videos have no caption, the first is {int(without[0])}: "
            "leave them out of video-to-text retrieval"
        )
    return owner
