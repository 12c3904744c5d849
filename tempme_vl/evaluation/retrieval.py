"""Retrieval evaluation: encode a split over all ranks, score in chunks, report.

Letters: V videos, Q captions, E embedding width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.utils.data import Dataset

from tempme_vl.evaluation.encode import Encoder, Rows, encode_all, encode_own, even_shards, gather_on_cpu
from tempme_vl.evaluation.metrics import (
    Ranks,
    captions_of_videos,
    concatenate,
    format_metrics,
    max_pool_captions,
    rank_statistics,
    summarize,
)
from tempme_vl.tasks.similarity.base import SimilarityHead, in_blocks
from tempme_vl.training import distributed

DUAL_SOFTMAX_SCALE = 100.0
DIRECTIONS = ("t2v", "v2t", "v2t_any_caption", "v2t_max_pooled", "v2t_transposed")


class SecondStage(Protocol):
    """What ranks candidates anew; see `tempme_vl.evaluation.rerank`.

    Attributes:
        fine_video_parts, fine_text_parts: names of what it compares, among what a model gives or a batch holds.
    """

    @property
    def fine_video_parts(self) -> tuple[str, ...]: ...

    @property
    def fine_text_parts(self) -> tuple[str, ...]: ...


@dataclass(frozen=True)
class Embeddings:
    """What retrieval is computed from.

    Attributes:
        video: (V, E) float32, L2-normalised (UMT: the mean over frames of normalised embeddings); None where `scores`
            are given.
        text: (Q, E) float32, L2-normalised (EERCF: times a matrix); None alike.
        video_of_caption: (Q,) int64.
        valid: (V,) bool, False for videos that could not be read; they stay in every denominator and are never
            found: their queries are lost (`rank_statistics`), and as candidates they come last.
        fine_video, fine_text: what re-ranking compares, a row a video or a text; kept if asked for. Of videos a rank
            has the rows of those that it encoded.
        scores: (Q, V), of a head that compares more than an embedding of each side.
    """

    video: Tensor | None
    text: Tensor | None
    video_of_caption: Tensor
    valid: Tensor
    fine_video: Mapping[str, Rows] = field(default_factory=dict)
    fine_text: Mapping[str, Tensor] = field(default_factory=dict)
    scores: Tensor | None = None

    def of_texts(self, first: int, count: int) -> Tensor:
        """Scores of some captions against all videos."""
        if self.scores is not None:
            return self.scores[first : first + count]
        assert self.text is not None and self.video is not None
        return self.text[first : first + count] @ self.video.T

    def of_videos(self, first: int, count: int) -> Tensor:
        """Scores of some videos against all captions."""
        if self.scores is not None:
            return self.scores[:, first : first + count].T
        assert self.text is not None and self.video is not None
        return self.video[first : first + count] @ self.text.T


def embed(
    encode: Encoder,
    videos: Dataset,
    captions: Dataset,
    video_of_caption: list[int],
    device: torch.device,
    batch_size: int = 32,
    workers: int = 2,
    second: SecondStage | None = None,
    head: SimilarityHead | None = None,
) -> Embeddings:
    """Encodes videos and captions, each rank its share; every rank gets the whole result on the CPU, but for tokens.

    Args:
        encode: a retrieval model or DeepSpeed engine in eval mode; maps a batch to "video" or "text" (B, E).
        videos: items with video, frame_mask, valid; captions: items with text_ids, text_mask.
        workers: loader processes a rank; 0 loads in this one.
        second: keep what this compares.
        head: of a model that has one.
    """
    if head is not None and not head.products:
        return _compare(encode, videos, captions, video_of_caption, device, batch_size, workers, head)
    fine_video, fine_text = ((), ()) if second is None else (second.fine_video_parts, second.fine_text_parts)
    total = len(videos)  # type: ignore[arg-type]
    shards = even_shards(total)
    own = encode_own(encode, videos, device, ("video", "valid", *fine_video), shards, batch_size, workers)
    video = {name: gather_on_cpu(own[name], device)[:total] for name in ("video", "valid")}
    caption = encode_all(encode, captions, device, ("text", *fine_text), batch_size, workers, "captions")
    return Embeddings(
        video["video"],
        caption["text"],
        torch.tensor(video_of_caption),
        video["valid"].bool(),
        {name: _rows(own[name], total) for name in fine_video},
        {name: caption[name] for name in fine_text},
    )


def _compare(
    encode: Encoder,
    videos: Dataset,
    captions: Dataset,
    video_of_caption: list[int],
    device: torch.device,
    batch_size: int,
    workers: int,
    head: SimilarityHead,
) -> Embeddings:
    """`embed` where a head compares tokens: each rank its own videos with all captions."""
    total = len(videos)  # type: ignore[arg-type]
    shards = even_shards(total)
    video = encode_own(encode, videos, device, (*head.video_parts, "valid"), shards, batch_size, workers)
    valid = gather_on_cpu(video.pop("valid"), device)[:total].bool()
    text = encode_all(encode, captions, device, head.text_parts, batch_size, workers, "captions")
    scores = in_blocks(head.similarity, text, video, device).T.contiguous()
    scores = gather_on_cpu(scores, device)[:total].T
    return Embeddings(None, None, torch.tensor(video_of_caption), valid, scores=scores)


def _rows(own: Tensor, total: int) -> Rows:
    """Of the shards of `even_shards`, without what repeats in the last one."""
    first = min(distributed.rank() * len(own), total)
    return Rows(own[: total - first], first, total)


def retrieval_ranks(embeddings: Embeddings, dual_softmax: bool = False, chunk: int = 1024) -> dict[str, Ranks]:
    """Where each query finds what is correct, in both directions, holding `chunk` rows of scores at a time.

    Args:
        dual_softmax: reweights scores by a softmax over all queries of the test set: another setting than plain
            retrieval, named in the report.

    Returns:
        "t2v" by caption and "v2t" by video; with several captions a video, "v2t_any_caption" and "v2t_max_pooled".
    """
    owners, num_videos = embeddings.video_of_caption, len(embeddings.valid)
    lost = ~embeddings.valid
    found: dict[str, list[Ranks]] = {way: [] for way in ("t2v", "v2t_any_caption", "v2t_max_pooled")}
    for first, rows in _text_rows(embeddings, dual_softmax, chunk):
        own = owners[first : first + len(rows)]
        found["t2v"].append(rank_statistics(rows, own, lost=lost[own]))
    captions = captions_of_videos(owners, num_videos)
    for first, rows in _score_rows(embeddings.of_videos, num_videos, dual_softmax, chunk, embeddings.valid):
        own_lost = lost[first : first + len(rows)]
        found["v2t_any_caption"].append(rank_statistics(rows, captions[first : first + len(rows)], lost=own_lost))
        pooled = max_pool_captions(rows, owners, num_videos)
        found["v2t_max_pooled"].append(rank_statistics(pooled, first_row=first, lost=own_lost))
    ranks = {way: concatenate(parts) for way, parts in found.items()}
    if len(owners) == num_videos:  # the two definitions are one
        return {"t2v": ranks["t2v"], "v2t": ranks["v2t_any_caption"]}
    return ranks


def retrieval_report(embeddings: Embeddings, dual_softmax: bool = False, chunk: int = 1024) -> dict[str, Any]:
    """Metrics of both directions.

    Args:
        dual_softmax, chunk: see `retrieval_ranks`.

    Returns:
        the directions that `retrieval_ranks` gives, each as `tempme_vl.evaluation.metrics.summarize` has it; counts and
        settings beside them.
    """
    return {
        "videos": len(embeddings.valid),
        "captions": len(embeddings.video_of_caption),
        "unreadable_videos": int((~embeddings.valid).sum()),
        "dual_softmax": dual_softmax,
        **{way: summarize(ranks) for way, ranks in retrieval_ranks(embeddings, dual_softmax, chunk).items()},
    }


def selection_score(report: Mapping[str, Any]) -> float:
    """The one number to choose the best epoch by: R-Sum of text to video plus R-Sum of video to text, 0 to 600.

    Where videos have several captions, video to text is the one whose captions are max-pooled, as CLIP4Clip and those
    after it report MSVD.
    """
    reverse = report["v2t"] if "v2t" in report else report["v2t_max_pooled"]
    return report["t2v"]["rsum"] + reverse["rsum"]


def _text_rows(e: Embeddings, dual_softmax: bool, chunk: int) -> Iterator[tuple[int, Tensor]]:
    """(first caption, scores of `chunk` captions against all videos); unreadable videos score -inf."""
    for first, rows in _score_rows(e.of_texts, len(e.video_of_caption), dual_softmax, chunk):
        yield first, rows.masked_fill(~e.valid, -torch.inf)


def _score_rows(
    some: Callable[[int, int], Tensor], queries: int, dual_softmax: bool, chunk: int, readable: Tensor | None = None
) -> Iterator[tuple[int, Tensor]]:
    """(first query, scores of `chunk` queries); a query that could not be read scores 0, and nobody looks at it."""
    log_total = torch.tensor(-torch.inf)
    unread = torch.zeros(queries, dtype=torch.bool) if readable is None else ~readable
    if dual_softmax:
        for first in range(0, queries, chunk):
            rows = DUAL_SOFTMAX_SCALE * some(first, chunk)
            rows = rows.masked_fill(unread[first : first + chunk, None], -torch.inf)
            log_total = torch.logaddexp(log_total, rows.logsumexp(dim=0))
    for first in range(0, queries, chunk):
        rows = some(first, chunk)
        scores = rows * (DUAL_SOFTMAX_SCALE * rows - log_total).exp() if dual_softmax else rows
        yield first, scores.masked_fill(unread[first : first + chunk, None], 0.0)


def format_retrieval(reports: Mapping[str, Mapping[str, Any]]) -> str:
    """The metrics of named reports, a line for each direction."""
    rows = {
        f"{name} {direction}": report[direction]
        for name, report in reports.items()
        for direction in DIRECTIONS
        if direction in report
    }
    return format_metrics(rows)
