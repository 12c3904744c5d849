"""Retrieval evaluation: encode a split over all ranks, score in chunks, report.

Letters: V clips, Q captions, E embedding width.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from tempme_vl.evaluation.encode import Encoder, encode_all
from tempme_vl.evaluation.metrics import (
    captions_of_videos,
    concatenate,
    format_table,
    max_pool_captions,
    rank_statistics,
    summarize,
)

DUAL_SOFTMAX_SCALE = 100.0


@dataclass(frozen=True)
class Embeddings:
    """What retrieval is computed from.

    Attributes:
        video: (V, E) float32, L2-normalised (UMT: the mean over frames of normalised embeddings).
        text: (Q, E) float32, L2-normalised.
        video_of_caption: (Q,) int64.
        valid: (V,) bool, False for clips that could not be read; they stay in every denominator and are never
            found: their queries rank last, and as candidates they come last.
        tokens, states, text_mask: (V, M, D), (Q, L, D_text) and (Q, L), what re-ranking compares; kept if asked for.
    """

    video: Tensor
    text: Tensor
    video_of_caption: Tensor
    valid: Tensor
    tokens: Tensor | None = None
    states: Tensor | None = None
    text_mask: Tensor | None = None


def embed(
    encode: Encoder,
    clips: Dataset,
    captions: Dataset,
    video_of_caption: list[int],
    device: torch.device,
    batch_size: int = 32,
    workers: int = 2,
    keep_tokens: bool = False,
) -> Embeddings:
    """Encodes all clips and captions, each rank its share; every rank gets the whole result on the CPU.

    Args:
        encode: a retrieval model or DeepSpeed engine in eval mode; maps a batch to "video" or "text" (B, E).
        clips: items with video, frame_mask, valid; captions: items with text_ids, text_mask.
        keep_tokens: keep what `tempme_vl.evaluation.rerank` needs; every rank holds it on its CPU.
    """
    of_clips = ("video", "valid", *(("tokens",) if keep_tokens else ()))
    of_captions = ("text", *(("states", "text_mask") if keep_tokens else ()))
    clip = encode_all(encode, clips, device, of_clips, batch_size, workers)
    caption = encode_all(encode, captions, device, of_captions, batch_size, workers, "captions")
    return Embeddings(
        clip["video"],
        caption["text"],
        torch.tensor(video_of_caption),
        clip["valid"].bool(),
        clip.get("tokens"),
        caption.get("states"),
        caption.get("text_mask"),
    )


def retrieval_report(embeddings: Embeddings, dual_softmax: bool = False, chunk: int = 1024) -> dict[str, Any]:
    """Metrics of both directions, holding `chunk` rows of scores at a time.

    Args:
        dual_softmax: reweights scores by a softmax over all queries of the test set: another setting than plain
            retrieval, named in the report.

    Returns:
        "t2v" and "v2t" (with several captions a video "v2t_any_caption" and "v2t_max_pooled"), each as
        `tempme_vl.evaluation.metrics.summarize` gives it; counts and settings beside them.
    """
    owners, num_videos, num_captions = embeddings.video_of_caption, len(embeddings.video), len(embeddings.text)
    text_ranks = [
        rank_statistics(rows, owners[first : first + len(rows)])
        for first, rows in _text_rows(embeddings, dual_softmax, chunk)
    ]
    report: dict[str, Any] = {
        "videos": num_videos,
        "captions": num_captions,
        "unreadable_videos": int((~embeddings.valid).sum()),
        "dual_softmax": dual_softmax,
        "t2v": summarize(concatenate(text_ranks)),
    }
    captions = captions_of_videos(owners, num_videos)
    any_caption, max_pooled = [], []
    for first, rows in _video_rows(embeddings, dual_softmax, chunk):
        any_caption.append(rank_statistics(rows, captions[first : first + len(rows)]))
        max_pooled.append(rank_statistics(max_pool_captions(rows, owners, num_videos), first_row=first))
    if num_captions == num_videos:  # the two definitions are one
        return {**report, "v2t": summarize(concatenate(any_caption))}
    return {
        **report,
        "v2t_any_caption": summarize(concatenate(any_caption)),
        "v2t_max_pooled": summarize(concatenate(max_pooled)),
    }


def _text_rows(e: Embeddings, dual_softmax: bool, chunk: int) -> Iterator[tuple[int, Tensor]]:
    """(first caption, scores of `chunk` captions against all clips); unreadable clips score -inf."""
    for first, rows in _score_rows(e.text, e.video, dual_softmax, chunk):
        yield first, rows.masked_fill(~e.valid, -torch.inf)


def _video_rows(e: Embeddings, dual_softmax: bool, chunk: int) -> Iterator[tuple[int, Tensor]]:
    """(first clip, scores of `chunk` clips against all captions); an unreadable clip ranks its own captions last."""
    seen = torch.where(e.valid.unsqueeze(1), e.video, torch.zeros_like(e.video))
    for first, rows in _score_rows(seen, e.text, dual_softmax, chunk):
        numbers = torch.arange(first, first + len(rows)).unsqueeze(1)
        unreadable = ~e.valid[first : first + len(rows)].unsqueeze(1)
        yield first, rows.masked_fill(unreadable & (e.video_of_caption == numbers), -torch.inf)


def _score_rows(queries: Tensor, candidates: Tensor, dual_softmax: bool, chunk: int) -> Iterator[tuple[int, Tensor]]:
    log_total = torch.full((len(candidates),), -torch.inf)
    if dual_softmax:
        for first in range(0, len(queries), chunk):
            rows = DUAL_SOFTMAX_SCALE * queries[first : first + chunk] @ candidates.T
            log_total = torch.logaddexp(log_total, rows.logsumexp(dim=0))
    for first in range(0, len(queries), chunk):
        rows = queries[first : first + chunk] @ candidates.T
        yield first, rows * (DUAL_SOFTMAX_SCALE * rows - log_total).exp() if dual_softmax else rows


def table(reports: Mapping[str, Mapping[str, Any]]) -> str:
    """The metrics of named reports, a line for each direction."""
    rows = {
        f"{name} {direction}": report[direction]
        for name, report in reports.items()
        for direction in ("t2v", "v2t", "v2t_any_caption", "v2t_max_pooled")
        if direction in report
    }
    return format_table(rows)
