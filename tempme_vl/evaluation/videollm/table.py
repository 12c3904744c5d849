"""Rows of a comparison as a table, a picture and text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from tempme_vl.evaluation.folder import markdown_table
from tempme_vl.evaluation.intervals import Interval, bootstrap
from tempme_vl.evaluation.plot import Panel, Point, draw
from tempme_vl.evaluation.videollm.answers import Answer, Facts
from tempme_vl.evaluation.videollm.rows import Case
from tempme_vl.evaluation.videollm.times import LATENCIES, Measured, Turns, median

_HEADS = {
    "encoder": "encoder, ms",
    "first_token": "first token, ms",
    "token": "decoding, ms a token",
    "total": "end to end, ms",
}


@dataclass(frozen=True)
class Compared:
    """A line of the table.

    Attributes:
        row, budget: what it is, see `Case`.
        facts: counts and costs.
        accuracy: percent of the questions, over hosts if there are several; `difference`: to the host's own, paired by
            question and host; None for the host.
        by_kind: percent and number of questions for each kind, where the data set says kinds.
        latency: by the names of `LATENCIES`.
        requests: by the number in one batch, requests a second and their ratio to the host's.
        memory: bytes, None on a CPU.
    """

    name: str
    row: str
    budget: float | None
    facts: Facts
    accuracy: Interval
    difference: Interval | None
    by_kind: Mapping[str, tuple[float, int]]
    latency: Mapping[str, Measured]
    requests: Mapping[int, tuple[float, float]] = field(default_factory=dict)
    memory: int | None = None


@dataclass(frozen=True)
class Run:
    """A case as it was run.

    Attributes:
        answers: on each of the hosts.
        turns: on the first.
    """

    case: Case
    facts: Facts
    answers: Sequence[Sequence[Answer]]
    turns: Turns

    @property
    def tokens(self) -> float:
        """The mean over all answers."""
        read = [answer.tokens for of_one in self.answers for answer in of_one if answer.tokens is not None]
        return sum(read) / len(read)


def beside_host(run: Run, host: Run) -> Compared:
    """A case beside the host's own.

    Raises:
        ValueError: answers to other questions than the host's.
    """
    case, turns, base = run.case, run.turns, host.turns
    ids = [[answer.question_id for answer in of_one] for of_one in (*run.answers, *host.answers)]
    if any(of_one != ids[0] for of_one in ids):
        raise ValueError(f"{case.name}: expected answers to the same questions on all hosts and of the host itself")
    batches = {count: median(row, base.batches[count]) for count, row in turns.batches.items()}
    return Compared(
        case.name,
        case.row.name,
        case.budget,
        replace(run.facts, tokens=run.tokens),
        bootstrap(right(run.answers)),
        None if run is host else bootstrap(right(run.answers) - right(host.answers)),
        by_kind(run.answers),
        {name: median(turns.latency[name], base.latency[name]) for name in LATENCIES},
        {count: (count / measured.seconds, 1 / measured.ratio) for count, measured in batches.items()},
        turns.memory,
    )


def right(answers: Sequence[Sequence[Answer]]) -> np.ndarray:
    """(hosts, questions), 100 where an answer is right, else 0."""
    return np.array([[100.0 * answer.right for answer in of_one] for of_one in answers])


def by_kind(answers: Sequence[Sequence[Answer]]) -> dict[str, tuple[float, int]]:
    """Percent right over all hosts, and the number of questions, of each kind."""
    found = right(answers).mean(axis=0)
    rows: dict[str, list[float]] = {}
    for answer, percent in zip(answers[0], found.tolist(), strict=True):
        if answer.kind is not None:
            rows.setdefault(answer.kind, []).append(percent)
    return {kind: (float(np.mean(row)), len(row)) for kind, row in sorted(rows.items())}


def main_markdown(rows: Sequence[Compared]) -> str:
    """The table; of times and requests the ratio to the host's in brackets."""
    memory = all(row.memory is not None for row in rows)
    heads = ["row", "visual tokens", "of the host's", "tower, GFLOPs", "prefill, GFLOPs", *_HEADS.values()]
    heads += [f"requests a second, {count} in flight" for count in rows[0].requests]
    heads += ["peak, MiB"] if memory else []
    heads += ["accuracy, %", "to the host"]
    lines = []
    for row in rows:
        facts = row.facts
        tokens = f"{facts.tokens:.1f} (measured)" if facts.measured else f"{facts.tokens:.4g}"
        line = [row.name, tokens, f"{facts.tokens / facts.host_tokens:.3f}"]
        line += [f"{facts.tower_gflops:.4g}", f"{facts.prefill_gflops:.4g}"]
        line += [f"{1e3 * row.latency[name].seconds:.3g} ({row.latency[name].ratio:.2f})" for name in _HEADS]
        line += [f"{rate:.3g} ({ratio:.2f})" for rate, ratio in row.requests.values()]
        line += [f"{row.memory / 2**20:.0f}"] if row.memory is not None and memory else []
        line += [row.accuracy.shown(), "" if row.difference is None else row.difference.shown(signed=True)]
        lines.append(line)
    return markdown_table(heads, lines)


def kinds_markdown(rows: Sequence[Compared]) -> str:
    """Accuracy by the kind of question; empty where the data set says none."""
    kinds = rows[0].by_kind
    if not kinds:
        return ""
    heads = ["accuracy, %", *(f"{kind} ({count})" for kind, (_, count) in kinds.items())]
    return markdown_table(heads, [[row.name, *(f"{row.by_kind[kind][0]:.1f}" for kind in kinds)] for row in rows])


def refusals_markdown(refused: Mapping[Case, str]) -> str:
    """Why rows are not in the table, the budgets of one reason together."""
    reasons: dict[tuple[str, str], list[str]] = {}
    for case, why in refused.items():
        budgets = reasons.setdefault((case.row.name, why), [])
        budgets += [] if case.budget is None else [f"{case.budget:g}"]
    lines = []
    for (name, why), budgets in reasons.items():
        at = f" at {', '.join(budgets)}" if budgets else ""
        lines.append(f"- `{name}`{at}: {' '.join(why.split())}")
    return "\n".join(["Not in the table:", "", *lines]) if lines else ""


def picture(rows: Sequence[Compared]) -> str:
    """SVG: accuracy with its interval against visual tokens, and against two times: what is equally good at equal time
    lies above one another in these."""

    def points(across: Sequence[float]) -> tuple[Point, ...]:
        pairs = zip(rows, across, strict=True)
        return tuple(Point(row.name, x, row.accuracy.mean, row.accuracy.low, row.accuracy.high) for row, x in pairs)

    def times(name: str) -> tuple[Point, ...]:
        return points([1e3 * row.latency[name].seconds for row in rows])

    return draw(
        "accuracy, %",
        (
            Panel("visual tokens of a video", points([row.facts.tokens for row in rows])),
            Panel("ms to the first token, measured", times("first_token")),
            Panel("ms end to end, measured", times("total")),
        ),
    )
