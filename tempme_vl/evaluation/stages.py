"""Ways of answering side by side, timed in turns, stage by stage: seconds, ratios to the first way, and times of a
language model that is deeper than the one that ran."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch

from tempme_vl.evaluation.measure import paired_times
from tempme_vl.evaluation.moments import Times


@dataclass(frozen=True)
class Way:
    """One row of the table.

    Attributes:
        prepare: videos (F, H, W, 3) uint8 to inputs of `generate`, the tower's work done.
        merging: its options, in words.
        tokens: visual tokens of one video that the language model reads.
        tower_gflops, prefill_gflops: of one video and its prompt, computed; a multiply-add is 1.
    """

    name: str
    prepare: Callable[[Sequence[np.ndarray]], Mapping[str, Any]]
    merging: str
    tokens: int
    tower_gflops: float
    prefill_gflops: float


@dataclass(frozen=True)
class Depth:
    """Layers of the language model: those that ran, those that it has in truth, and the seconds of its last module,
    which is a quarter of what decoding by 2 layers reads, and which a deeper model has once, too."""

    ran: int
    whole: int
    head: float

    def extrapolated(self, times: Times, new_tokens: int) -> float:
        """Seconds of the whole answer at full depth."""
        prefill, token = (
            self.head + (part - self.head) * self.whole / self.ran for part in (times.prefill, times.token)
        )
        return times.preprocessing + times.tower + prefill + (new_tokens - 1) * token


def head_seconds(model: Any, batch: int) -> float:
    """Of a model's last module, `lm_head`, for one token of each of so many prompts."""
    states = torch.zeros(batch, 1, model.lm_head.in_features, device=model.device, dtype=model.dtype)
    runs = paired_times({"head": torch.no_grad()(lambda: model.lm_head(states))}, 5, model.device)
    return statistics.median(runs["head"])


def in_turns(ways: Sequence[Way], answer: Callable[[Way], Times], repeats: int) -> dict[str, list[Times]]:
    """Times of each way, taken in turn after one round that does not count."""
    times: dict[str, list[Times]] = {way.name: [] for way in ways}
    for turn in range(1 + repeats):
        for way in ways:
            own = answer(way)
            if turn:
                times[way.name].append(own)
    return times


def stage_rows(
    ways: Sequence[Way], times: Mapping[str, Sequence[Times]], depth: Depth, new_tokens: int
) -> list[dict[str, Any]]:
    """Counts, medians, and medians of a turn's ratios to the first way's time, as JSON data."""

    def stages(own: Times) -> dict[str, float]:
        deeper = {"at_depth": depth.extrapolated(own, new_tokens)} if depth.ran < depth.whole else {}
        return asdict(own) | deeper

    first = [stages(own) for own in times[ways[0].name]]
    rows = []
    for way in ways:
        runs = [stages(own) for own in times[way.name]]
        pairs = list(zip(runs, first, strict=True))
        rows.append(
            {
                "row": way.name,
                "merging": way.merging,
                "tokens": way.tokens,
                "tower_gflops": way.tower_gflops,
                "prefill_gflops": way.prefill_gflops,
                "seconds": {stage: statistics.median(run[stage] for run in runs) for stage in runs[0]},
                "ratios": {
                    stage: statistics.median(run[stage] / one[stage] for run, one in pairs) for stage in runs[0]
                },
                "runs": runs,
            }
        )
    return rows


def format_rows(rows: Sequence[Mapping[str, Any]], depth: int) -> str:
    """Markdown: seconds, and in brackets their ratio to the first row's.

    Args:
        depth: layers that the language model has in truth.
    """
    heads = {
        "preprocessing": "preprocessing, s",
        "tower": "tower, s",
        "prefill": "prefill, s",
        "token": "decoding, ms a token",
        "total": "end to end, s",
        "at_depth": f"extrapolated to {depth} layers, s",
    }
    stages = [stage for stage in heads if stage in rows[0]["seconds"]]
    lines = [
        ["", "visual tokens", "tower, GFLOPs", "prefill, GFLOPs", *(heads[stage] for stage in stages)],
        ["---", *["---:"] * (3 + len(stages))],
    ]
    for row in rows:
        counts = [str(row["tokens"]), f"{row['tower_gflops']:.4g}", f"{row['prefill_gflops']:.4g}"]
        scaled = [(stage, row["seconds"][stage] * (1e3 if stage == "token" else 1)) for stage in stages]
        lines.append([row["row"], *counts, *(f"{value:.3g} ({row['ratios'][stage]:.2f})" for stage, value in scaled)])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
