"""How many pairs of a text and a video heads compare a second, where a video is merged tokens, or all of them.

97 tokens, as TempMe leaves of 12 frames in CLIP B/32, beside the 600 without merging; a minute on two CPU cores:
    python eval/head_speed.py

Features are random and lie in memory: only times mean something. All take turns; what a head makes of videos alone,
such as X-Pool's keys, is made once for all texts of a run.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from tempme_vl.command import at_least, run
from tempme_vl.command_line import Command
from tempme_vl.evaluation.measure import device_name, paired_times
from tempme_vl.reports import format_columns, show, write_json
from tempme_vl.tasks.similarity.eercf import SOFT, gated, weak
from tempme_vl.tasks.similarity.max_sim import max_sim
from tempme_vl.tasks.similarity.xpool import XPoolHead


@dataclass(frozen=True)
class Options:
    """Pairs a second of heads that let a text weigh or search a video's tokens, for several numbers of tokens."""

    tokens: tuple[int, ...] = (600, 97)
    """Of a video; all are compared with the first."""
    videos: int = 16
    captions: int = 128
    words: int = 12
    """Of a caption, for maxsim."""
    width: int = 512
    """Of the embedding."""
    repeats: int = 9
    """Turns that count; one more before them warms up."""
    threads: int | None = None
    """CPU threads; default: torch's choice."""
    seed: int = 0
    json: Path | None = None
    """Also write the rows to this file."""


@dataclass(frozen=True)
class Row:
    """Medians of one head on one number of tokens: pairs a second, and that over the first number's, turn by turn."""

    head: str
    tokens: int
    pairs_per_second: float
    ratio: float


def main(options: Options) -> None:
    at_least(1, videos=options.videos, captions=options.captions, words=options.words, width=options.width)
    at_least(1, tokens=min(options.tokens, default=0), repeats=options.repeats, threads=options.threads)
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    torch.manual_seed(options.seed)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    rows = measure(options, device)
    show(
        f"{options.captions} captions x {options.videos} videos at once, width {options.width}, float32"
        f"\nMeasured on this machine, and true of it alone: {device_name(device)}, {torch.get_num_threads()} threads, "
        f"torch {torch.__version__}\n{format_rows(rows)}"
    )
    if options.json is not None:
        write_json(options.json, [asdict(row) for row in rows])


@torch.no_grad()
def measure(options: Options, device: torch.device) -> list[Row]:
    """All heads on all numbers of tokens, in turns."""
    compare = heads_of(options, device)
    steps: dict[tuple[str, int], Callable[[], Tensor]] = {}
    for count in options.tokens:
        video = F.normalize(torch.randn(options.videos, count, options.width, device=device), dim=-1)
        steps |= {(name, count): partial(step, video) for name, step in compare.items()}
    names = {f"{name}, {count}": (name, count) for name, count in steps}
    times = paired_times({key: steps[name] for key, name in names.items()}, options.repeats, device)
    pairs, first = options.captions * options.videos, options.tokens[0]
    rows = []
    for key, (name, count) in names.items():
        base = times[f"{name}, {first}"]
        ratio = statistics.median(other / own for own, other in zip(times[key], base, strict=True))
        rows.append(Row(name, count, pairs / statistics.median(times[key]), ratio))
    return sorted(rows, key=lambda row: list(compare).index(row.head))


def heads_of(options: Options, device: torch.device) -> Mapping[str, Callable[[Tensor], Tensor]]:
    """Functions of videos (V, M, E) that give the scores of all captions with them."""
    text = F.normalize(torch.randn(options.captions, options.width, device=device), dim=-1)
    words = F.normalize(torch.randn(options.captions, options.words, options.width, device=device), dim=-1)
    mask = torch.ones(words.shape[:2], device=device)
    x_pool = XPoolHead(options.width).to(device).eval()
    return {
        "eercf, strong gate": lambda video: torch.einsum("te,tve->tv", text, gated(text, video, video, SOFT)),
        "eercf, weak gate": lambda video: weak(text, video),
        "xpool": lambda video: x_pool.similarity({"text": text}, {"video": video}),
        "maxsim": lambda video: max_sim(words, mask, video),
    }


def format_rows(rows: Sequence[Row]) -> str:
    """A plain-text table."""
    return format_columns(
        [
            {
                "head": row.head,
                "tokens": str(row.tokens),
                "pairs a second": f"{row.pairs_per_second:.0f}",
                "of the first": f"{row.ratio:.2f}",
            }
            for row in rows
        ]
    )


if __name__ == "__main__":
    run(Command("", Options, main))
