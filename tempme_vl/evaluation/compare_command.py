"""A grid of runs trained alike, then measured and compared (`tempme-vl compare`, eval/compare.py)."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from functools import partial
from pathlib import Path
from queue import Queue
from typing import Any

import torch
from torch import Tensor, nn

from tempme_vl.command import at_least
from tempme_vl.evaluation.compare import Compared, Row, Run, compared, markdown, plot
from tempme_vl.evaluation.folder import check_alike, with_section
from tempme_vl.evaluation.intervals import LEVEL
from tempme_vl.evaluation.measure import device_name, paired_times
from tempme_vl.evaluation.metrics import RECALL_AT, Ranks
from tempme_vl.evaluation.options import CompareOptions, RetrievalOptions
from tempme_vl.evaluation.retrieval import retrieval_ranks
from tempme_vl.evaluation.retrieval_command import evaluate, split_of
from tempme_vl.messages import few
from tempme_vl.processes import launcher
from tempme_vl.registries import DATASETS
from tempme_vl.reports import provenance, show, write_json, write_whole
from tempme_vl.tasks.retrieval import load_retrieval_model

# options of merging that the recipe has itself; others are a method's own
OF_RECIPE = ("num_frames", "r", "merge_layers", "merge_frames", "cross_percent", "intra_percent", "budget", "tokens")
ALIKE = ("dataset", "data_root", "video_root", "annotations", "train", "ranks")  # of all runs of a folder
REPORT, SCORES, OUTPUT = "report.json", "scores.json", "output.txt"


def main(options: CompareOptions) -> None:
    at_least(1, ranks=options.ranks, parallel=options.parallel, batch=options.batch, repeats=options.repeats)
    rows = grid(options)
    check_alike(options.output, {name: getattr(options, name) for name in ALIKE})
    train(options, rows)
    runs = {row.name: [read_run(options, row, seed) for seed in options.seeds] for row in rows}
    write(options, compared(runs, encoder_times(options, rows)), runs)


def grid(options: CompareOptions) -> list[Row]:
    """The rows: every method with every tuning, but for methods that name theirs.

    Raises:
        ValueError: see `Row.parse`; a row or a seed twice, or none.
    """
    rows = []
    for row in map(Row.parse, options.methods):
        alone = row.tuning is not None or not options.tunings
        rows += [row] if alone else [Row(row.method, tuning, row.options) for tuning in options.tunings]
    for option, things in (("--methods", [row.name for row in rows]), ("--seeds", list(options.seeds))):
        if not things or len(set(things)) < len(things):
            raise ValueError(f"{option}: expected one or more, each once; got {few(things) or 'none'}")
    return rows


def train(options: CompareOptions, rows: Sequence[Row]) -> None:
    """Trains what has no report yet, some runs at a time, each with cores of its own, and GPUs where there are any.

    Raises:
        ValueError: runs failed; the others were trained.
    """
    wanted = [(row, seed) for seed in options.seeds for row in rows]
    missing = [run for run in wanted if not (folder(options, *run) / REPORT).is_file()]
    show(f"{len(wanted) - len(missing)} runs are there, {len(missing)} to train")
    free: Queue[tuple[tuple[int, ...], tuple[int, ...]]] = Queue()
    gpus, cores = torch.cuda.device_count(), sorted(os.sched_getaffinity(0))
    for place in range(options.parallel):
        own = tuple((place * options.ranks + i) % gpus for i in range(options.ranks)) if gpus else ()
        free.put((own, tuple(cores[place :: options.parallel]) or (cores[place % len(cores)],)))

    def one(run: tuple[Row, int]) -> str | None:
        own = free.get()
        # of this thread, and of the processes that it starts: runs that share cores wait for each other's threads
        os.sched_setaffinity(0, own[1])
        try:
            return train_one(options, *run, own[0])
        finally:
            free.put(own)

    with ThreadPoolExecutor(options.parallel) as pool:
        failed = [line for line in pool.map(one, missing) if line]
    if failed:
        raise ValueError("; ".join(failed))


def train_one(options: CompareOptions, row: Row, seed: int, gpus: Sequence[int]) -> str | None:
    """Trains a run, or goes on with one that was begun.

    Returns:
        why it failed; None if it did not.
    """
    place = folder(options, row, seed)
    place.mkdir(parents=True, exist_ok=True)
    command = [*launcher(options.ranks, gpus), "--module", "tempme_vl.cli", "train", "retrieval"]
    with (place / OUTPUT).open("a") as output:
        done = subprocess.run([*command, *arguments(options, row, seed)], stdout=output, stderr=subprocess.STDOUT)
    if done.returncode or not (place / REPORT).is_file():
        lines = (place / OUTPUT).read_text().splitlines()
        cause = next((line for line in reversed(lines) if "error: " in line), f"exit code {done.returncode}")
        if not done.returncode:
            cause = "it ended before all of its steps, so it has no report: leave max-steps out of --train"
        return f"{place.name} failed: {cause} (all that it said: {place / OUTPUT})"
    report = json.loads((place / REPORT).read_text())
    show(f"{place.name}: R-Sum {report['t2v']['rsum']:.1f} text to video, {report['train_seconds']:.0f} s")
    return None


def arguments(options: CompareOptions, row: Row, seed: int) -> list[str]:
    """Of `train retrieval`, for a run."""
    given: dict[str, Any] = {
        "method": row.method,
        "tuning": row.tuning,
        "seed": seed,
        "output": folder(options, row, seed),
        "dataset": options.dataset,
        "data_root": options.data_root or DATASETS[options.dataset].root,
        "video_root": options.video_root,
        "annotations": options.annotations,
        "resume": "auto",
    }
    said = [(name, str(value)) for name, value in given.items() if value is not None]
    of_row = [(name, value) for name, _, value in (option.partition("=") for option in row.options)]
    said += [(name, value) for name, _, value in (option.partition("=") for option in options.train)]
    said += [(name, value) for name, value in of_row if name in OF_RECIPE]
    own = [f"{name}={value}" for name, value in of_row if name not in OF_RECIPE]
    words = [word for name, value in said for word in (f"--{name.replace('_', '-')}", *value.split())]
    return [*words, "--method-options", *own] if own else words


def folder(options: CompareOptions, row: Row, seed: int) -> Path:
    """Of a run."""
    return options.output / f"{row.folder}-seed{seed}"


def read_run(options: CompareOptions, row: Row, seed: int) -> Run:
    """A finished run; what each query of its test split found is computed once and kept beside its report."""
    place = folder(options, row, seed)
    if not (place / SCORES).is_file():
        asked = RetrievalOptions(
            data_root=options.data_root,
            video_root=options.video_root,
            annotations=options.annotations,
            checkpoint=place / "best",
            dataset=options.dataset,
            rerank=0,
        )
        embeddings, _ = evaluate(asked, split_of(asked), _device())
        ranks = retrieval_ranks(embeddings)
        ways = {"t2v": ranks["t2v"], "v2t": ranks["v2t" if "v2t" in ranks else "v2t_max_pooled"]}
        scores = {way: [100 * sum(recalls) for recalls in _recalls(of)] for way, of in ways.items()}
        write_json(place / SCORES, scores, 0)
    return Run(seed, json.loads((place / REPORT).read_text()), json.loads((place / SCORES).read_text()))


def _recalls(ranks: Ranks) -> Iterator[tuple[float, ...]]:
    """Of each query, at 1, 5 and 10."""
    return zip(*(ranks.recall(k).tolist() for k in RECALL_AT), strict=True)


def encoder_times(options: CompareOptions, rows: Sequence[Row]) -> dict[str, list[float]]:
    """Seconds a video of each row's encoder, merging included: the rows take turns, on random videos of their size."""
    steps = {row.name: _encoder_step(options, row) for row in rows}
    times = paired_times(steps, options.repeats, _device())
    return {name: [seconds / options.batch for seconds in row] for name, row in times.items()}


def _encoder_step(options: CompareOptions, row: Row) -> Any:
    frontend = load_retrieval_model(folder(options, row, options.seeds[0]) / "best").frontend.to(_device()).eval()
    side = frontend.shape.image_size
    video = torch.randn(options.batch, frontend.schedule.frames, 3, side, side, device=_device())
    return partial(_encode, frontend, video)


@torch.inference_mode()
def _encode(frontend: nn.Module, video: Tensor) -> None:
    frontend(video)


def _device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def write(options: CompareOptions, table: Sequence[Compared], runs: Mapping[str, Sequence[Run]]) -> None:
    """Shows the table, and writes it, the plot, and everything that they are made of."""
    one = next(iter(runs.values()))[0].report
    setting = {
        **{name: one[name] for name in ("split", "videos", "captions", "model", "selected_on")},
        "seeds": list(options.seeds),
        "train": list(options.train),
        "ranks": options.ranks,
        "device": device_name(_device()),
        "threads": torch.get_num_threads(),
        "timed": f"{options.repeats} turns, {options.batch} at a time",
    }
    shown = f"{_about(setting)}\n\n{markdown(table)}"
    show(f"\n{shown}")
    report: dict[str, Any] = {"setting": setting, "rows": [asdict(row) for row in table], **provenance()}
    report["runs"] = {name: [{"seed": run.seed, **run.report} for run in own] for name, own in runs.items()}
    write_json(options.output / "comparison.json", report)
    page = options.page or options.output / "comparison.md"
    picture = page.with_name(f"{page.stem}_{options.dataset}.svg")
    write_whole(picture, plot(table).encode())
    made = ", ".join([report["date"][:10], *(f"{name} {version}" for name, version in report["versions"].items())])
    section = f"{shown}\n\n![R-Sum against cost]({picture.name})\n\n{made}."
    before = page.read_text() if page.is_file() else "# Methods side by side\n"
    write_whole(page, with_section(before, options.dataset, section).encode())


def _about(setting: Mapping[str, Any]) -> str:
    """What the numbers are of, in two paragraphs."""
    seeds, train = setting["seeds"], setting["train"]
    return (
        f"{setting['split']}, {setting['videos']} videos and {setting['captions']} captions; {setting['model']}, "
        f"seed{'s' if len(seeds) > 1 else ''} {', '.join(map(str, seeds))}, "
        f"{'options ' + ' '.join(train) if train else 'the usual options'} for all rows alike; best epoch: "
        f"{setting['selected_on']}.\n\n"
        "R-Sum: recalls at 1, 5 and 10 of text to video and of video to text, 0 to 600, the mean over seeds with its "
        f"{LEVEL} % interval (Student). The difference to the first row is paired by seed and query, its interval a "
        "bootstrap's over both. Milliseconds: median of the visual encoder with merging, on random videos, "
        f"{setting['timed']}, all rows in turn on {setting['device']}, {setting['threads']} threads; the time is the "
        "median ratio to the first row of the same turn."
    )
