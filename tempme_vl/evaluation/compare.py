"""Models side by side: what each run found, means and intervals over seeds, paired differences, a table and a plot.

A row is a merging method with its options and a way of tuning. All rows are trained alike, by the same seeds, and
differences are paired: the same query asked of two models of the same seed.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from tempme_vl.evaluation.folder import markdown_table
from tempme_vl.evaluation.intervals import DRAWS, Interval, bootstrap, over_seeds
from tempme_vl.evaluation.plot import Panel, Point, draw
from tempme_vl.evaluation.rows import RowText, file_name, read_row, row_name
from tempme_vl.registries import METHODS
from tempme_vl.tuning import TUNINGS


@dataclass(frozen=True)
class Row:
    """METHOD, METHOD+TUNING, or either with :NAME=VALUE,NAME=VALUE of the method, such as "tome+lora:r=4".

    Raises:
        ValueError: from `parse`, for an unknown method or tuning, or options that are not of this form.
    """

    method: str
    tuning: str | None = None
    options: tuple[str, ...] = ()

    @classmethod
    def parse(cls, text: str) -> Row:
        row = read_row(text, "+")
        if row is None or row.method not in METHODS or (row.second and row.second not in TUNINGS):
            raise ValueError(
                f"row {text!r}: expected METHOD, METHOD+TUNING or METHOD:NAME=VALUE,NAME=VALUE with a method of "
                f"{', '.join(METHODS)} and a tuning of {', '.join(TUNINGS)}"
            )
        return cls(*row)

    @property
    def name(self) -> str:
        """As `parse` reads it."""
        return row_name(RowText(self.method, self.tuning, self.options), "+")

    @property
    def folder(self) -> str:
        """The name, for a folder."""
        return file_name(self.name)


@dataclass(frozen=True)
class Run:
    """One row with one seed.

    Attributes:
        report: its report.json.
        scores: by direction ("t2v", "v2t"), a number for each query: the sum of its recalls at 1, 5 and 10, 0 to 300,
            whose mean is the R-Sum.
    """

    seed: int
    report: Mapping[str, Any]
    scores: Mapping[str, Sequence[float]]


def paired_difference(runs: Sequence[Run], reference: Sequence[Run], way: str, draws: int = DRAWS) -> Interval:
    """How much higher the R-Sum of one row is than another's, by the same seeds and queries.

    The interval is a bootstrap's: seeds and queries are drawn anew with replacement, the same of both rows, and the
    middle 95 % of all differences are between its ends.

    Raises:
        ValueError: other seeds, or another number of queries.
    """
    seeds = [run.seed for run in runs]
    if seeds != [run.seed for run in reference]:
        raise ValueError(f"expected runs of the same seeds; got {seeds} and {[run.seed for run in reference]}")
    sizes = {len(run.scores[way]) for run in (*runs, *reference)}
    if len(sizes) != 1:
        raise ValueError(f"expected runs of the same queries; got {sorted(sizes)} of them")
    pairs = zip(runs, reference, strict=True)
    differences = [np.subtract(run.scores[way], base.scores[way]) for run, base in pairs]
    return bootstrap(differences, draws)


@dataclass(frozen=True)
class Compared:
    """A row of the table.

    Attributes:
        rsum: text to video and video to text together, 0 to 600, over seeds.
        t2v, v2t: 0 to 300.
        first: recall at 1 of text to video and of video to text, in percent.
        difference: of `rsum` to the first row's, paired; None for the first row.
        milliseconds: of the encoder for a video, merging included; `ratio`: to the first row's, paired turn by turn.
        train_seconds: mean over seeds.
    """

    name: str
    rsum: Interval
    t2v: Interval
    v2t: Interval
    first: tuple[Interval, Interval]
    difference: Interval | None
    tokens: int
    input_tokens: int
    gflops: float
    milliseconds: float
    ratio: float
    trainable: int
    train_seconds: float


def compared(runs: Mapping[str, Sequence[Run]], times: Mapping[str, Sequence[float]]) -> list[Compared]:
    """All rows.

    Args:
        runs: by row; the first row is what the others are compared with.
        times: by row, seconds a video, measured in turns.
    """
    first = next(iter(runs))
    rows = []
    for name, own in runs.items():
        both = [Run(run.seed, run.report, {"both": _both(run)}) for run in own]
        base = [Run(run.seed, run.report, {"both": _both(run)}) for run in runs[first]]
        report = own[0].report
        rows.append(
            Compared(
                name,
                _rsum(both, "both"),
                _rsum(own, "t2v"),
                _rsum(own, "v2t"),
                (_first(own, "t2v"), _first(own, "v2t")),
                None if name == first else paired_difference(both, base, "both"),
                report["output_tokens"],
                report["input_tokens"],
                report["gflops"],
                1e3 * statistics.median(times[name]),
                statistics.median(a / b for a, b in zip(times[name], times[first], strict=True)),
                report["trainable_params"],
                statistics.fmean(run.report["train_seconds"] for run in own),
            )
        )
    return rows


def _rsum(runs: Sequence[Run], way: str) -> Interval:
    return over_seeds([statistics.fmean(run.scores[way]) for run in runs])


def _first(runs: Sequence[Run], way: str) -> Interval:
    reports = [run.report.get(way) or run.report[f"{way}_max_pooled"] for run in runs]  # of videos with many captions
    return over_seeds([report["r1"] for report in reports])


def _both(run: Run) -> list[float]:
    return [t2v + v2t for t2v, v2t in zip(run.scores["t2v"], run.scores["v2t"], strict=True)]


def markdown(rows: Sequence[Compared]) -> str:
    """A table."""
    found = ["R-Sum, both ways", "to the first row", "t2v", "v2t", "R@1 t2v", "R@1 v2t"]
    cost = ["tokens", "GFLOPs", "ms a video", "time", "trainable", "train s"]
    lines = []
    for row in rows:
        cells = [
            row.name,
            row.rsum.shown(),
            "" if row.difference is None else row.difference.shown(signed=True),
            row.t2v.shown(),
            row.v2t.shown(),
            *(recall.shown() for recall in row.first),
            f"{row.tokens} of {row.input_tokens}",
            f"{row.gflops:.4g}",
            f"{row.milliseconds:.2f}",
            f"{row.ratio:.2f}",
            f"{row.trainable:,}",
            f"{row.train_seconds:.0f}",
        ]
        lines.append(cells)
    return markdown_table(["row", *found, *cost], lines)


def plot(rows: Sequence[Compared]) -> str:
    """SVG: R-Sum with its interval against GFLOPs, tokens and milliseconds."""

    def points(across: Sequence[float]) -> tuple[Point, ...]:
        return tuple(
            Point(row.name, x, row.rsum.mean, row.rsum.low, row.rsum.high) for row, x in zip(rows, across, strict=True)
        )

    return draw(
        "R-Sum, both ways",
        (
            Panel("GFLOPs a video", points([row.gflops for row in rows])),
            Panel("tokens of a video", points([float(row.tokens) for row in rows])),
            Panel("ms a video, measured", points([row.milliseconds for row in rows])),
        ),
    )
