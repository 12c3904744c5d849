"""Compression methods compared on one video-language model (`tempme-vl videollm-compare`, eval/videollm_compare.py)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import torch

from tempme_vl.command import at_least
from tempme_vl.data.datasets import Source
from tempme_vl.data.questions import most_options
from tempme_vl.data.videoqa import QASplit
from tempme_vl.evaluation.folder import check_alike
from tempme_vl.evaluation.options import VideoLLMCompareOptions
from tempme_vl.evaluation.reading import check_reading
from tempme_vl.evaluation.videollm.answers import Store
from tempme_vl.evaluation.videollm.rows import all_cases, all_rows
from tempme_vl.evaluation.videollm.session import Session
from tempme_vl.evaluation.videollm.write import write_comparison
from tempme_vl.messages import few
from tempme_vl.reports import show

# of all answers of a folder
ALIKE = (
    *("host", "dataset", "data_root", "video_root", "annotations", "questions", "seed", "num_frames", "image_size"),
    *("sampling", "prompt", "answer_tokens", "dtype", "batch_size"),
)


def main(options: VideoLLMCompareOptions) -> None:
    check_options(options)
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    cases = all_cases(all_rows(options.methods), options.retention)
    split, kind = asked_questions(options)
    check_alike(options.output, {name: getattr(options, name) for name in ALIKE})
    session = Session(options, split, kind, Store(options.output, len(options.host)))
    for number, source in enumerate(options.host):
        missing = session.store.missing(cases, number)
        show(f"{source}: {len(cases) - len(missing)} rows are there, {len(missing)} to ask")
        session.answer(missing, number)
    write_comparison(options, split, session, cases, session.times(cases))


def check_options(options: VideoLLMCompareOptions) -> None:
    """Raises:
    ValueError: an option that cannot be, or no host.
    """
    check_reading(options)
    at_least(1, questions=options.questions, repeats=options.repeats, threads=options.threads)
    at_least(1, num_frames=options.num_frames, image_size=options.image_size, answer_tokens=options.answer_tokens)
    at_least(2, new_tokens=options.new_tokens)
    for count in options.in_flight:
        at_least(1, in_flight=count)
    if not options.host or len(set(options.host)) < len(options.host):
        raise ValueError(f"--host: expected one or more, each once; got {few(options.host) or 'none'}")
    if wrong := [share for share in options.retention if not 0 < share <= 1]:
        raise ValueError(f"--retention: expected shares of the host's tokens above 0 and up to 1; got {wrong[0]}")
    if not options.retention:
        raise ValueError("--retention: expected one share or more; got none")


def asked_questions(options: VideoLLMCompareOptions) -> tuple[QASplit, Callable[[str], str] | None]:
    """Those that are asked, and the function that tells their kinds, None where the data set has none."""
    source = Source(options.dataset, options.data_root, options.video_root, options.annotations)
    split = source.questions("test")
    most_options(split)
    count = len(split.questions) if options.questions is None else options.questions
    if count > len(split.questions):
        raise ValueError(f"--questions: {split.name} has {len(split.questions)}; got {count}")
    chosen = sorted(np.random.default_rng(options.seed).permutation(len(split.questions))[:count].tolist())
    return replace(split, questions=tuple(split.questions[i] for i in chosen)), source.record.question_kind
