"""How long re-ranking takes: a video's keys and values anew for each pair or computed once, all tokens or merged ones.

200 x 200 pairs of UMT-B's fusion layers, 2352 tokens a video (12 frames) and the 185 that TempMe's fit leaves; hours
on two CPU cores:
    python eval/rerank_speed.py

The same with the uncached runs on 20 of the videos; or a few minutes' worth:
    python eval/rerank_speed.py --uncached-videos 20
    python eval/rerank_speed.py --videos 8 --captions 64

Weights, tokens and words are random: only times, and the equality of scores for the same tokens, mean something.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor

from tempme_vl.command import at_least, run
from tempme_vl.command_line import Command
from tempme_vl.evaluation.efficiency import fusion_macs
from tempme_vl.evaluation.measure import device_name
from tempme_vl.evaluation.rerank import REST, Reranked, rerank
from tempme_vl.reports import format_columns, show, write_json
from tempme_vl.tasks.umt_retrieval import UMTRetrievalModel, create_umt_retrieval_model

VOCABULARY = ("[PAD]",)  # no caption is read: fusion takes the states of words


@dataclass(frozen=True)
class Options:
    """Seconds of re-ranking with and without cached keys and values, for several numbers of tokens a video."""

    model: str = "umt:b16"
    """umt:b16, umt:l16 or umt:tiny, for the sizes of its fusion layers."""
    videos: int = 200
    captions: int = 200
    uncached_videos: int | None = None
    """Fewer videos for the slow runs without cache; default: all."""
    tokens: tuple[int, ...] = (2352, 185)
    """Of a video; each number makes two rows."""
    words: int = 32
    top_k: int | None = None
    """Candidates a query; default: all."""
    pairs_per_batch: int = 32
    """Captions compared with a video at once; keys and values of so many pairs are in memory when not cached."""
    threads: int | None = None
    """CPU threads; default: torch's choice."""
    seed: int = 0
    json: Path | None = None
    """Also write the rows to this file."""


@dataclass(frozen=True)
class Row:
    """One run: `difference` is the largest of a logit from the uncached run's on the same tokens, `spread` the standard
    deviation of a caption's logits over videos, `macs` what a pair costs."""

    tokens: int
    cached: bool
    seconds: float
    pairs: int
    macs: int
    difference: float
    spread: float


def main(options: Options) -> None:
    at_least(1, videos=options.videos, captions=options.captions, uncached_videos=options.uncached_videos)
    at_least(1, words=options.words, top_k=options.top_k, pairs_per_batch=options.pairs_per_batch)
    at_least(1, tokens=min(options.tokens, default=0), threads=options.threads)
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    torch.manual_seed(options.seed)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = create_umt_retrieval_model(options.model, VOCABULARY, method="none").to(device).eval()
    states = torch.randn(options.captions, options.words, model.text.shape.width)
    similarity = torch.randn(options.captions, options.videos)
    rows = [row for count in options.tokens for row in measure(model, options, count, states, similarity, device)]
    shape = f"{options.videos} videos x {options.captions} captions of {options.words} words"
    show(
        f"Re-ranking {shape}, {options.model}, float32, {options.pairs_per_batch} pairs a batch"
        f"\nMeasured on this machine, and true of it alone: {device_name(device)}, {torch.get_num_threads()} threads, "
        f"torch {torch.__version__}\n{format_rows(rows)}"
    )
    if options.json is not None:
        write_json(options.json, [asdict(row) for row in rows])


def measure(
    model: UMTRetrievalModel, options: Options, count: int, states: Tensor, similarity: Tensor, device: torch.device
) -> list[Row]:
    """Without and with cached keys and values, for videos of `count` random tokens."""
    width = model.fusion.shape.cross_width
    # a part that a video's tokens share: the mean of independent ones, which is what is attended to, would vanish
    tokens = torch.randn(options.videos, count, width) + torch.randn(options.videos, 1, width)
    mask = torch.ones(states.shape[:2], dtype=torch.int64)

    def run(cached: bool, videos: int, progress: bool = False) -> tuple[float, Reranked]:
        start = time.perf_counter()
        scores = rerank(
            model,
            tokens[:videos],
            states,
            mask,
            similarity[:, :videos],
            device=device,
            top_k=options.top_k or max(options.videos, options.captions),
            pairs_per_batch=options.pairs_per_batch,
            cache_keys=cached,
            progress=progress,
        )
        return time.perf_counter() - start, scores  # the scores are on the CPU: the work is done

    rows, reference = [], None
    for cached in (False, True):
        videos = options.videos if cached else options.uncached_videos or options.videos
        run(cached, videos=1)  # the first call pays for what is set up once
        seconds, scores = run(cached, videos, progress=True)
        reference = scores.t2v if reference is None else reference
        own = scores.t2v[:, : reference.shape[1]]
        both = (own > REST) & (reference > REST)  # fewer videos have other candidates
        difference = (own - reference)[both].abs().max().item()
        spread = scores.t2v[scores.t2v > REST].view(len(states), -1).std(dim=1, correction=0).mean().item()
        macs = fusion_macs(count, options.words, model.fusion.shape, cached)
        rows.append(Row(count, cached, seconds, scores.pairs, macs, difference, spread))
    return rows


def format_rows(rows: Sequence[Row]) -> str:
    """A plain-text table; ratios are those of times a pair."""
    return format_columns(
        [
            {
                "tokens": str(row.tokens),
                "keys and values": "cached" if row.cached else "for each pair",
                "pairs": str(row.pairs),
                "seconds": f"{row.seconds:.1f}",
                "ms a pair": f"{1e3 * row.seconds / row.pairs:.2f}",
                "/ first": f"{row.seconds / row.pairs / (rows[0].seconds / rows[0].pairs):.3f}",
                "GMAC a pair": f"{row.macs / 1e9:.2f}",
                "max difference": f"{row.difference:.1e}",
                "spread": f"{row.spread:.1e}",
            }
            for row in rows
        ]
    )


if __name__ == "__main__":
    run(Command("", Options, main))
