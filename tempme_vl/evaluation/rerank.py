"""Re-ranking in a second stage: what reads a video and a caption together scores the best candidates of embeddings.

Two users: UMT's fusion layers (`Matcher`), and heads that let a text weigh a video's tokens (EERCF).

Letters: V videos, Q captions, M tokens of a video, Dv their width, L caption tokens, D their width, P pairs.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor
from tqdm import tqdm

from tempme_vl.evaluation.encode import Rows, gather_on_cpu
from tempme_vl.evaluation.metrics import captions_of_videos, max_pool_captions, retrieval_metrics
from tempme_vl.evaluation.retrieval import Embeddings
from tempme_vl.tasks.retrieval import AnyRetrievalModel, MatchingRetrievalModel
from tempme_vl.tasks.similarity.base import SimilarityHead
from tempme_vl.training import distributed

REST = -100.0
"""The score of pairs that are not re-ranked (UMT), below every match logit that a trained matcher gives."""
ABOVE = 100.0
"""Added to the scores of candidates (EERCF) where the rest keep those of the first stage."""

Scorer = Callable[[int, Tensor], Tensor]
"""The second stage's scores (P,) of one video, by its number, with captions, by theirs (P,)."""
K = TypeVar("K", bound="Keys")


class Keys(Protocol):
    """Cross-attention keys and values of some videos."""

    def expand(self: K, pairs: int) -> K:
        """Those of one video for each of its P pairs, without copying."""


class Matcher(Protocol[K]):
    """A model's fusion layers and matching head, in eval mode."""

    def keys_values(self, tokens: Tensor) -> K:
        """What depends on the videos alone; tokens (n, M, Dv)."""

    def match_logits(self, states: Tensor, mask: Tensor, keys: K) -> Tensor:
        """(P,) logits of "match" for caption states (P, L, D), mask (P, L), and the keys of P videos."""


@dataclass(frozen=True)
class Reranked:
    """Scores of both directions on the CPU.

    Attributes:
        t2v: (Q, V) float32, the second stage's score where the video is among the caption's candidates, else -100; -inf
            for videos that could not be read.
        v2t: (V, Q) float32, the second stage's score where the caption is among the video's candidates, else -100; -100
            throughout for a video that could not be read.
        valid: (V,) bool, False for videos that could not be read.
        top_k: candidates a query, all if there are fewer.
        pairs: how many pairs the second stage scored, on all ranks together.
        keeps_rest: in both, candidates have 100 more than their score, and all others what the first stage gave them.
    """

    t2v: Tensor
    v2t: Tensor
    valid: Tensor
    top_k: int
    pairs: int
    keeps_rest: bool = False


def rerank(
    matcher: Matcher[Any],
    tokens: Tensor | Rows,
    states: Tensor,
    mask: Tensor,
    similarity: Tensor,
    valid: Tensor | None = None,
    *,
    device: torch.device,
    top_k: int = 128,
    pairs_per_batch: int = 64,
    cache_keys: bool = True,
    adds_similarity: bool = False,
    progress: bool = True,
) -> Reranked:
    """Scores the `top_k` most similar videos of each caption and captions of each video by the matcher.

    A pair that is a candidate in both directions is scored once. When torch.distributed is initialised each rank
    scores its share of the videos and gets the whole result; all must call with the same arguments. Shares take
    different numbers of matcher calls, so the matcher's weights must be whole on each rank (not ZeRO-3 partitions).

    Args:
        matcher: on `device`.
        tokens: (V, M, Dv) on the CPU, or this rank's rows of them as `embed` leaves them.
        states: (Q, L, D) on the CPU, as the text layers left them, or what else the matcher reads of texts, such as
            their ids (Q, L); mask: (Q, L), 1 for words.
        similarity: (Q, V) of the dual encoder. Among equal similarities the lower number is the candidate.
        valid: (V,) bool, False for videos that could not be read: they are nobody's candidates.
        pairs_per_batch: captions the matcher compares with a video at once.
        cache_keys: computes a video's keys and values once; else anew for each of its pairs.
        adds_similarity: the score is the logit and the similarity (BLIP, TESTA), and not the logit alone (UMT).
        progress: shows a bar, on the first rank.

    Raises:
        ValueError: shapes that do not fit together, numbers below 1, NaN similarities of readable videos.
    """
    valid = torch.ones(len(tokens), dtype=torch.bool) if valid is None else valid.cpu()
    shapes = (tuple(similarity.shape), tuple(mask.shape), tuple(valid.shape))
    if shapes != ((len(states), len(tokens)), tuple(states.shape[:2]), (len(tokens),)):
        raise ValueError(
            f"expected similarity (Q, V), mask (Q, L) and valid (V,) for states {tuple(states.shape)} and tokens "
            f"{tuple(tokens.shape)}; got {shapes}"
        )
    if min(top_k, pairs_per_batch) < 1:
        raise ValueError(f"top_k and pairs_per_batch must be at least 1; got {top_k} and {pairs_per_batch}")

    def score(video: int, texts: Tensor) -> Tensor:
        own = tokens[video : video + 1].to(device)
        cached = matcher.keys_values(own) if cache_keys else None
        logits = []
        for some in texts.split(pairs_per_batch):
            pairs = len(some)
            keys = matcher.keys_values(own.expand(pairs, -1, -1)) if cached is None else cached.expand(pairs)
            logits.append(matcher.match_logits(states[some].to(device), mask[some].to(device), keys))
        scores = torch.cat(logits)
        return scores + similarity[texts, video].to(scores) if adds_similarity else scores

    shares = _shares(tokens, valid, distributed.world_size())
    return two_stages(score, similarity, valid, shares, device=device, top_k=top_k, progress=progress)


def rerank_by_head(
    head: SimilarityHead,
    text: Mapping[str, Tensor],
    video: Mapping[str, Tensor | Rows],
    similarity: Tensor,
    valid: Tensor,
    *,
    device: torch.device,
    top_k: int,
    pairs_per_batch: int = 1024,
    progress: bool = True,
) -> Reranked:
    """Scores the `top_k` candidates of each query, both ways, by a head's `fine`; all others keep their similarity.

    Args:
        text, video: the parts of both stages, of videos perhaps this rank's rows alone (`embed`).
        others: as in `rerank`.
    """

    def score(number: int, texts: Tensor) -> Tensor:
        own = {name: rows[number : number + 1].to(device) for name, rows in video.items()}
        some = ({name: part[few].to(device) for name, part in text.items()} for few in texts.split(pairs_per_batch))
        return torch.cat([head.fine(few, own)[:, 0] for few in some])

    rows = next((part for part in video.values() if isinstance(part, Rows)), video["video"])
    shares = _shares(rows, valid, distributed.world_size())
    return two_stages(score, similarity, valid, shares, device=device, top_k=top_k, keeps_rest=True, progress=progress)


@torch.no_grad()
def two_stages(
    score: Scorer,
    similarity: Tensor,
    valid: Tensor,
    shares: Sequence[Sequence[int]],
    *,
    device: torch.device,
    top_k: int,
    keeps_rest: bool = False,
    progress: bool = True,
) -> Reranked:
    """Ranks anew the `top_k` most similar videos of each caption, and captions of each video.

    A pair that is a candidate in both directions is scored once, by the rank whose share its video is in.

    Args:
        score: the second stage, on `device`.
        similarity: (Q, V) of the first stage. Among equal ones the lower number is the candidate.
        valid: (V,) bool, False for videos that could not be read: they are nobody's candidates.
        shares: of every rank, the numbers of its videos, those that could be read alone.
        keeps_rest: what is no candidate keeps its place behind all candidates (EERCF); else all of it is equal (UMT).
        progress: shows a bar, on the first rank.

    Raises:
        ValueError: NaN similarities of readable videos.
    """
    similarity = similarity.cpu().masked_fill(~valid, -torch.inf)
    if similarity.isnan().any():
        raise ValueError("similarity holds NaN: find the embeddings that are not finite; NaN has no rank")
    num_captions, num_videos = similarity.shape
    of_captions = _best(similarity, top_k) & valid  # (Q, V)
    of_videos = _best(similarity.T, top_k) & valid[:, None]  # (V, Q)
    wanted = of_videos | of_captions.T

    rank, world = distributed.rank(), distributed.world_size()
    share = list(shares[rank])
    # a pair that no rank scores stays NaN, which the metrics refuse, rather than a score that looks real
    scores = torch.full((max(map(len, shares)), num_captions), torch.nan, device=device)
    bar = tqdm(
        total=int(wanted[share].sum()), desc="re-rank", unit="pair", disable=rank != 0 or not progress, leave=False
    )
    # video by video: a batch that mixes videos would copy the keys and values of each pair (43 MB for UMT-B)
    for row, video in enumerate(share):
        texts = wanted[video].nonzero().flatten()
        if len(texts):
            scores[row, texts.to(device)] = score(video, texts).to(device, torch.float32)
        bar.update(len(texts))
    bar.close()

    matched = torch.full((num_videos, num_captions), torch.nan)
    gathered = gather_on_cpu(scores.cpu(), device).unflatten(0, (world, len(scores)))
    for videos, rows in zip(shares, gathered, strict=True):
        matched[list(videos)] = rows[: len(videos)]
    others: Tensor | float = similarity.float() if keeps_rest else REST
    matched = matched + ABOVE if keeps_rest else matched
    v2t = matched.where(of_videos, others.T if isinstance(others, Tensor) else others)
    return Reranked(
        t2v=matched.T.where(of_captions, others).masked_fill(~valid, -torch.inf),
        v2t=v2t.masked_fill(~valid[:, None], REST),
        valid=valid,
        top_k=top_k,
        pairs=int(wanted.sum()),
        keeps_rest=keeps_rest,
    )


def second_stage(model: AnyRetrievalModel) -> MatchingRetrievalModel | SimilarityHead | None:
    """What re-ranks: layers of UMT and TESTA that see a video with a text, or a head of two stages; else nothing."""
    if isinstance(model, MatchingRetrievalModel):
        return model
    return model.head if model.head.candidates else None


def rerank_embeddings(
    stage: MatchingRetrievalModel | SimilarityHead, e: Embeddings, device: torch.device, top_k: int
) -> dict[str, Any]:
    """The second stage, and its report.

    Args:
        e: kept with what it compares, `embed(..., second=stage)`.
    """
    assert e.video is not None and e.text is not None
    similarity = e.text @ torch.where(e.valid[:, None], e.video, torch.zeros_like(e.video)).T
    options: dict[str, Any] = {"device": device, "top_k": top_k}
    if isinstance(stage, SimilarityHead):
        text: dict[str, Tensor] = {**e.fine_text, "text": e.text}
        video: dict[str, Tensor | Rows] = {**e.fine_video, "video": e.video}
        reranked = rerank_by_head(stage, text, video, similarity, e.valid, **options)
    else:
        tokens, (states, mask) = e.fine_video["tokens"], (e.fine_text[part] for part in stage.fine_text_parts)
        options["adds_similarity"] = stage.adds_similarity
        reranked = rerank(stage, tokens, states, mask, similarity, e.valid, **options)
    return reranked_report(reranked, e.video_of_caption)


def _shares(tokens: Tensor | Rows, valid: Tensor, world: int) -> list[list[int]]:
    """The readable videos of every rank: of those whose tokens it has (`encode.even_shards`), or equally many."""
    videos = list(range(len(tokens))) if isinstance(tokens, Rows) else valid.nonzero().flatten().tolist()
    per_rank = -(-len(videos) // world)
    shares = [videos[rank * per_rank : (rank + 1) * per_rank] for rank in range(world)]
    return [[video for video in share if valid[video]] for share in shares]


def _best(similarity: Tensor, top_k: int, chunk: int = 1024) -> Tensor:
    """Where each row has its `top_k` highest entries; topk would break ties as it likes, a stable sort does not."""
    best = torch.zeros_like(similarity, dtype=torch.bool)
    for first in range(0, len(similarity), chunk):  # the order of a whole matrix would take twice its memory
        order = similarity[first : first + chunk].argsort(dim=1, descending=True, stable=True)[:, :top_k]
        best[first : first + chunk].scatter_(1, order, True)
    return best


def reranked_report(reranked: Reranked, video_of_caption: Tensor | Sequence[int]) -> dict[str, Any]:
    """Metrics of both directions, under the keys of `tempme_vl.evaluation.retrieval.retrieval_report`.

    As there, unreadable videos stay in every denominator and are never found, and pairs that share the rest's score
    are ranked by their expected place.

    Args:
        video_of_caption: (Q,), the number of each caption's video.

    Returns:
        that report, with "rerank_top_k" and "rerank_pairs" (pairs that the second stage scored) beside it; where the
        rest keeps its places also "v2t_transposed", from video to text as EERCF's authors report it: by the transposed
        scores of text to video, whose candidates were chosen for the texts.
    """
    owners = torch.as_tensor(video_of_caption).cpu()
    num_captions, num_videos = reranked.t2v.shape
    captions = captions_of_videos(owners, num_videos)
    lost = ~reranked.valid
    report = {
        "videos": num_videos,
        "captions": num_captions,
        "unreadable_videos": int(lost.sum()),
        "dual_softmax": False,
        "rerank_top_k": reranked.top_k,
        "rerank_pairs": reranked.pairs,
        "t2v": retrieval_metrics(reranked.t2v, owners, lost[owners]),
    }
    if reranked.keeps_rest:
        report["v2t_transposed"] = retrieval_metrics(
            reranked.t2v.T.where(reranked.valid[:, None], REST), captions, lost
        )
    any_caption = retrieval_metrics(reranked.v2t, captions, lost)
    if num_captions == num_videos:  # the two definitions are one
        return {**report, "v2t": any_caption}
    max_pooled = retrieval_metrics(max_pool_captions(reranked.v2t, owners, num_videos), lost=lost)
    return {**report, "v2t_any_caption": any_caption, "v2t_max_pooled": max_pooled}
