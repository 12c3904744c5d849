"""How fast the cases of a comparison answer: all of them in turn, in one process, on the same questions."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor

from tempme_vl.evaluation.measure import synchronize
from tempme_vl.evaluation.moments import Times, Watched, first_convolution, time_answer
from tempme_vl.integrations import Compressed

LATENCIES = ("encoder", "first_token", "token", "total")


@dataclass(frozen=True)
class HeldQuestion:
    """A question with its video in memory: a prompt, frames (F, 3, S, S) uint8 and their seconds."""

    prompt: str
    frames: Tensor
    times: Sequence[float]


@dataclass(frozen=True)
class Timed:
    """A case to be timed: what answers, and the questions with as many and as large frames as it is given."""

    compressed: Compressed
    questions: Sequence[HeldQuestion]


@dataclass(frozen=True)
class Turns:
    """What was measured of a case, a number a turn.

    Attributes:
        latency: seconds of one answer alone by the names of `LATENCIES`: frames to inputs of the language model; the
            first token, from the frames on; each further token; the whole answer.
        batches: by the number of requests in one batch, seconds of it.
        memory: bytes at the highest of an answer alone, the weights included; None on a CPU.
    """

    latency: Mapping[str, Sequence[float]]
    batches: Mapping[int, Sequence[float]] = field(default_factory=dict)
    memory: int | None = None

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Turns:
        """What `to_json` gave, with the texts that JSON makes of numbers."""
        return cls(data["latency"], {int(count): row for count, row in data["batches"].items()}, data["memory"])


def measure_turns(
    cases: Mapping[str, Timed], in_flight: Sequence[int], new_tokens: int, repeats: int
) -> dict[str, Turns]:
    """Times of each case, taken in turn (A B C A B C ...) after one round that does not count.

    Every turn has another question, the same for all cases.

    Args:
        in_flight: sizes of the batches that are timed, too.
        new_tokens: written for each question, 2 or more.
    """
    alone: dict[str, list[Times]] = {name: [] for name in cases}
    memory: dict[str, int | None] = dict.fromkeys(cases)
    for turn in range(1 + repeats):
        for name, case in cases.items():
            times, peak = _one(case, _some(case.questions, turn, 1), new_tokens)
            if turn:
                alone[name].append(times)
                memory[name] = None if peak is None else max(peak, memory[name] or 0)
    batches: dict[str, dict[int, list[float]]] = {name: {count: [] for count in in_flight} for name in cases}
    for count in in_flight:
        for turn in range(1 + repeats):
            for name, case in cases.items():
                seconds = _batch(case, _some(case.questions, turn * count, count), new_tokens)
                if turn:
                    batches[name][count].append(seconds)
    return {name: Turns(_latency(alone[name]), batches[name], memory[name]) for name in cases}


def _some(questions: Sequence[HeldQuestion], first: int, count: int) -> list[HeldQuestion]:
    """Questions from one on; behind the last comes the first."""
    return [questions[(first + i) % len(questions)] for i in range(count)]


def _steps(
    case: Timed, questions: Sequence[HeldQuestion]
) -> tuple[Callable[[], Mapping[str, Any]], Callable[..., Tensor]]:
    """What makes the inputs of questions, and what answers."""
    prompts, times = [held.prompt for held in questions], [held.times for held in questions]
    prepare = partial(case.compressed.prepare, prompts, [held.frames for held in questions], times=times)
    return prepare, case.compressed.generate


def _one(case: Timed, questions: Sequence[HeldQuestion], new_tokens: int) -> tuple[Times, int | None]:
    """Times of an answer, and the most memory that it takes on a GPU."""
    host = case.compressed.host
    device = next(host.target.parameters()).device
    watched = Watched(first_convolution(host.tower), host.target.get_output_embeddings(), device)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    times, _ = time_answer(watched, *_steps(case, questions), new_tokens)
    return times, torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None


@torch.no_grad()
def _batch(case: Timed, questions: Sequence[HeldQuestion], new_tokens: int) -> float:
    """Seconds of some answers in one batch."""
    device = next(case.compressed.host.target.parameters()).device
    prepare, generate = _steps(case, questions)
    synchronize(device)
    start = time.perf_counter()
    generate(**prepare(), max_new_tokens=new_tokens, min_new_tokens=new_tokens, do_sample=False)
    synchronize(device)
    return time.perf_counter() - start


def _latency(turns: Sequence[Times]) -> dict[str, list[float]]:
    return {
        "encoder": [own.preprocessing + own.tower for own in turns],
        "first_token": [own.preprocessing + own.tower + own.prefill for own in turns],
        "token": [own.token for own in turns],
        "total": [own.total for own in turns],
    }


@dataclass(frozen=True)
class Measured:
    """A median in seconds, and the median of the ratios to the host's own time of the same turn."""

    seconds: float
    ratio: float


def median(turns: Sequence[float], host: Sequence[float]) -> Measured:
    """Of one thing that was measured in turns."""
    ratios = [own / base for own, base in zip(turns, host, strict=True)]
    return Measured(statistics.median(turns), statistics.median(ratios))
