"""Hosts, loaded when something is to be run on them, asked and timed; what is there already is read."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from functools import cached_property
from typing import Any

import torch

from tempme_vl.data.reader import VideoReader
from tempme_vl.data.videoqa import QASplit
from tempme_vl.evaluation.measure import device_name
from tempme_vl.evaluation.options import VideoLLMCompareOptions
from tempme_vl.evaluation.reading import decode_timeout
from tempme_vl.evaluation.videollm.answers import Facts, Store, facts_of, to_answers
from tempme_vl.evaluation.videollm.ask import as_they_are, ask
from tempme_vl.evaluation.videollm.hosts import LoadedHost, Manner, load
from tempme_vl.evaluation.videollm.rows import HOST, Built, Case, Inputs, Row, build
from tempme_vl.evaluation.videollm.times import HeldQuestion, Timed, Turns, measure_turns
from tempme_vl.reports import provenance, show, write_json

HOST_FILE, TIMES_FILE, BROKEN_FILE = "host.json", "times.json", "broken_videos.jsonl"


class Session:
    """A comparison that is being made.

    Args:
        kind: of a question, where the data set says so.
        store: what is kept of it.
    """

    def __init__(
        self, options: VideoLLMCompareOptions, split: QASplit, kind: Callable[[str], str] | None, store: Store
    ):
        self.options, self.split, self.kind, self.store = options, split, kind, store
        on_gpu = options.device == "cuda" or (options.device == "auto" and torch.cuda.is_available())
        self.device = torch.device("cuda" if on_gpu else "cpu")
        half = options.dtype == "bfloat16" or (options.dtype == "auto" and on_gpu)
        self.dtype = torch.bfloat16 if half else torch.float32
        self._loaded: tuple[int, LoadedHost] | None = None

    # ---- hosts and videos

    def host(self, number: int) -> LoadedHost:
        """One of the hosts; the one before is let go."""
        if self._loaded is None or self._loaded[0] != number:
            self._loaded = None
            given = self.options
            manner = Manner(given.num_frames, given.image_size, given.sampling, given.prompt, given.answer_tokens)
            host = load(given.host[number], manner, self.dtype, self.device)
            self._loaded = number, host
            if number == 0:
                write_json(self.store.folder / HOST_FILE, self._about(host))
        return self._loaded[1]

    def _about(self, host: LoadedHost) -> dict[str, Any]:
        built = self._build(host, Case(Row(HOST)))
        return {
            "model": type(built.compressed.host.model).__name__,
            "prompt": host.asked(built.compressed).prompt,
            "answer_tokens": host.answer_tokens,
            **asdict(host.inputs),
            "sampling": host.sampling,
            "dtype": str(self.dtype).removeprefix("torch."),
            "trained": host.trained,
        }

    @property
    def about(self) -> dict[str, Any]:
        """How the first host is asked."""
        return dict(json.loads((self.store.folder / HOST_FILE).read_text()))

    @cached_property
    def _reader(self) -> VideoReader:
        return VideoReader(
            1,
            as_they_are(1),
            timeout=decode_timeout(self.options),
            on_broken="record",
            broken_log=self.store.folder / BROKEN_FILE,
            cache=self.options.frame_cache or "memory",
        )

    def reader(self, host: LoadedHost, inputs: Inputs) -> VideoReader:
        """Of the frames that a case is given."""
        transform = as_they_are(inputs.image_size)
        return replace(self._reader, num_frames=inputs.num_frames, transform=transform, sampling=host.sampling)

    @staticmethod
    def _build(host: LoadedHost, case: Case) -> Built:
        return build(host.model, host.processor, case, host.inputs)

    # ---- accuracy

    def answer(self, cases: Sequence[Case], number: int) -> None:
        """Asks a host; what does not work on it is written down with its cause.

        Raises:
            ValueError: the host itself cannot be asked.
        """
        for case in cases:
            try:
                self._answer(case, number)
            except ValueError as error:
                if case.row.method == HOST:
                    raise
                self.store.write_facts(case, Facts(refused=str(error)))
                show(f"{case.name}: not run, {error}")

    def _answer(self, case: Case, number: int) -> None:
        host, given = self.host(number), self.options
        torch.manual_seed(given.seed)
        built = self._build(host, case)
        model, reader = host.asked(built.compressed), self.reader(host, built.inputs)
        asked = ask(model, model, self.split, reader, self.device, given.batch_size, given.workers)
        answers = to_answers(asked, self.split, self.kind)
        whole = self._build(host, Case(Row(HOST))).compressed.counts((host.inputs.image_size,) * 2).native
        facts = facts_of(host, built, asked, whole)
        self.store.write_answers(case, number, answers)
        if number == 0:
            self.store.write_facts(case, facts)
        percent = 100 * sum(answer.right for answer in answers) / len(answers)
        source = f" on {given.host[number]}" if self.store.hosts > 1 else ""
        show(f"{case.name}{source}: {facts.tokens:.4g} of {whole} visual tokens, {percent:.1f} % right")

    # ---- times

    def times(self, cases: Sequence[Case]) -> dict[Case, Turns]:
        """Of all cases that were asked, on the first host, measured together or read as they were."""
        facts = {case: self.store.facts(case) for case in cases}
        asked = {case.name: case for case, known in facts.items() if known is not None and known.refused is None}
        file = self.store.folder / TIMES_FILE
        kept = json.loads(file.read_text()) if file.is_file() else {}
        setting = json.loads(json.dumps({**self.timing, "rows": list(asked)}))
        if kept.get("setting") != setting:
            show(f"{len(asked)} rows are timed in turn")
            turns = self._measure(asked)
            kept = {"setting": setting, "turns": {name: row.to_json() for name, row in turns.items()}, **provenance()}
            write_json(file, kept)
        return {asked[name]: Turns.from_json(row) for name, row in kept["turns"].items()}

    @property
    def timing(self) -> dict[str, Any]:
        """What times depend on, beside what answers do."""
        given = self.options
        return {
            "device": device_name(self.device),
            "threads": torch.get_num_threads(),
            "new_tokens": given.new_tokens,
            "repeats": given.repeats,
            "in_flight": given.in_flight,
        }

    def _measure(self, cases: dict[str, Case]) -> dict[str, Turns]:
        host, given = self.host(0), self.options
        questions: dict[Inputs, list[HeldQuestion]] = {}
        timed = {}
        for name, case in cases.items():
            built = self._build(host, case)
            model = host.asked(built.compressed)
            if built.inputs not in questions:
                questions[built.inputs] = self._held(host, built.inputs, model.tokenize)
            timed[name] = Timed(built.compressed, questions[built.inputs])
        return measure_turns(timed, given.in_flight, given.new_tokens, given.repeats)

    def _held(self, host: LoadedHost, inputs: Inputs, tokenize: Callable[..., dict[str, str]]) -> list[HeldQuestion]:
        """The first questions whose videos can be read, as many as are timed at most."""
        reader = self.reader(host, inputs)
        questions: list[HeldQuestion] = []
        for q in self.split.questions:
            if len(questions) == max(1 + self.options.repeats, *self.options.in_flight, 1):
                break
            read = reader(q.video)
            if read.valid:
                prompt = tokenize(q.question, None, q.options)["prompt"]
                questions.append(HeldQuestion(prompt, read.video.round().to(torch.uint8), read.times.tolist()))
        return questions
