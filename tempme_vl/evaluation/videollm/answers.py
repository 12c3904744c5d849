"""What is kept of each case: its answers with the tokens read for them, what it costs, or why it could not be run."""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from tempme_vl.data.videoqa import QASplit
from tempme_vl.evaluation.videollm.ask import Asked
from tempme_vl.evaluation.videollm.hosts import LoadedHost
from tempme_vl.evaluation.videollm.rows import Built, Case, in_words
from tempme_vl.evaluation.videoqa import is_right
from tempme_vl.integrations.costs import prefill_gflops
from tempme_vl.reports import write_json, write_whole

ANSWERS, FACTS = "answers", "rows"  # folders


@dataclass(frozen=True)
class Answer:
    """A question's, a line of a file.

    Attributes:
        prediction: None where the video could not be read, or nothing was written.
        tokens: of the video, that the language model read; None where it could not be read.
    """

    question_id: str
    prompt: str
    prediction: str | None
    answers: tuple[str, ...]
    right: bool
    tokens: int | None
    kind: str | None = None


def to_answers(asked: Asked, split: QASplit, kind: Callable[[str], str] | None) -> list[Answer]:
    """A line for each question of the split, right by `is_right` after normalising, as the recipes score.

    Args:
        kind: of a question, where the data set says so.
    """
    lines = []
    for q in split.questions:
        said = asked.predictions.get(q.question_id)
        right = said is not None and is_right(said, q.answers, normalize=True)
        tokens, own_kind = asked.visual_tokens.get(q.question_id), None if kind is None else kind(q.question)
        lines.append(Answer(q.question_id, asked.prompts[q.question_id], said, q.answers, right, tokens, own_kind))
    return lines


@dataclass(frozen=True)
class Facts:
    """What is known of a case beside its answers and times.

    Attributes:
        refused: why it could not be run; then nothing else is known.
        arguments: of `tempme_vl.integrations.compress`, or of lmms-eval's --model_args.
        num_frames, image_size: what the host was given of a video.
        tokens: the mean over the questions, and over the layers of the language model where a method makes them fewer
            between these; `measured`: whether the data decide it.
        host_tokens: of the host's own way, of all frames.
        prompt_tokens: the mean of all that the language model read for a question.
        tower_gflops, prefill_gflops: of one video, and of such a prompt; a multiply-add is 1.
    """

    refused: str | None = None
    arguments: str = ""
    num_frames: int = 0
    image_size: int = 0
    tokens: float = 0.0
    measured: bool = False
    host_tokens: int = 0
    prompt_tokens: float = 0.0
    tower_gflops: float = 0.0
    prefill_gflops: float = 0.0


def facts_of(host: LoadedHost, built: Built, asked: Asked, host_tokens: int) -> Facts:
    """Of a case that was asked.

    Raises:
        ValueError: no video could be read.
    """
    if not asked.visual_tokens:
        raise ValueError("none of the videos could be read")
    inputs, inner = built.inputs, built.compressed.host
    costs = inner.costs((inputs.image_size,) * 2)
    read = statistics.fmean(asked.prompt_tokens.values())
    return Facts(
        arguments=in_words(built.arguments),
        num_frames=inputs.num_frames,
        image_size=inputs.image_size,
        tokens=statistics.fmean(asked.visual_tokens.values()),
        measured=costs.tokens is None,
        host_tokens=host_tokens,
        prompt_tokens=read,
        tower_gflops=costs.tower,
        prefill_gflops=prefill_gflops(inner, asked.layer_tokens),
    )


@dataclass(frozen=True)
class Store:
    """A comparison's folder.

    Attributes:
        hosts: how many models of the same kind there are.
    """

    folder: Path
    hosts: int = 1

    def answers_file(self, case: Case, host: int) -> Path:
        """Of a case on a host."""
        of_host = f"-host{host}" if self.hosts > 1 else ""
        return self.folder / ANSWERS / f"{case.file}{of_host}.jsonl"

    def write_answers(self, case: Case, host: int, answers: Sequence[Answer]) -> None:
        lines = "".join(json.dumps({**asdict(answer), "host": host}) + "\n" for answer in answers)
        write_whole(self.answers_file(case, host), lines.encode())

    def answers(self, case: Case, host: int) -> list[Answer] | None:
        """None where it was not asked yet."""
        file = self.answers_file(case, host)
        if not file.is_file():
            return None
        lines = [json.loads(line) for line in file.read_text().splitlines()]
        return [Answer(**{**_without_host(line), "answers": tuple(line["answers"])}) for line in lines]

    def write_facts(self, case: Case, facts: Facts) -> None:
        write_json(self.folder / FACTS / f"{case.file}.json", asdict(facts))

    def facts(self, case: Case) -> Facts | None:
        """None where nobody tried it yet."""
        file = self.folder / FACTS / f"{case.file}.json"
        return Facts(**json.loads(file.read_text())) if file.is_file() else None

    def missing(self, cases: Sequence[Case], host: int) -> list[Case]:
        """Cases that were neither asked nor refused on a host."""
        facts = {case: self.facts(case) for case in cases}
        refused = {case for case, known in facts.items() if known is not None and known.refused is not None}
        tried = {case for case, known in facts.items() if known is not None}
        asked = {case for case in tried if self.answers_file(case, host).is_file()}
        return [case for case in cases if case not in refused | asked]


def _without_host(line: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in line.items() if name != "host"}
