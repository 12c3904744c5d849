"""Search over many vectors: how much of the exact result the approximate one has, and what both take.

    python eval/search_scale.py --vectors 100000                  # two minutes on two CPU cores
    python eval/search_scale.py --vectors 1000000 --json scale.json
    python eval/search_scale.py --vectors 100000 --made noise

The vectors are written into an index as tempme-vl writes it, without tokens. "clusters": each is one of a hundredth as
many random directions, plus as much noise, so that it has a cosine of 0.7 to its direction and 0.5 to others of it.
"noise": random directions, the hardest there are: nothing is near, and what is nearest is so by little.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

import tempme_vl.search
from tempme_vl.command import at_least, run
from tempme_vl.command_line import Command
from tempme_vl.evaluation.measure import memory_now
from tempme_vl.reports import finish, format_columns
from tempme_vl.search.embed import EmbeddedQuery
from tempme_vl.search.files import VideoFile
from tempme_vl.search.store import IndexSettings, Row, Store

WIDTH, AT_ONCE, FOUND = 512, 20_000, 10
Made = Literal["clusters", "noise"]


@dataclass(frozen=True)
class Options:
    """Recall, time, memory and bytes of searches over vectors that are made up."""

    vectors: tuple[int, ...] = (100_000,)
    """How many, in an index each."""
    made: Made = "clusters"
    """Vectors around random directions, or random directions."""
    queries: int = 100
    """Made as the vectors are, and none of them."""
    seed: int = 0
    output: Path = Path("runs/search-scale")
    """Indexes are written here, and used again."""
    json: Path | None = None
    """Also write all numbers to this file."""


def main(options: Options) -> None:
    at_least(1, queries=options.queries, vectors=min(options.vectors, default=0))
    rows = [measured(options, count) for count in options.vectors]
    about = f"{WIDTH} numbers a vector, made of {options.made}, seed {options.seed}, {options.queries} queries"
    names = list(rows[0])
    columns = [{"": name, **{str(row["vectors"]): _shown(row[name]) for row in rows}} for name in names[1:]]
    finish(f"{about}\n\n{format_columns(columns)}", {"about": about, "rows": rows}, options.json)


def measured(options: Options, count: int) -> dict[str, Any]:
    """All numbers of an index of so many vectors."""
    row: dict[str, Any] = {"vectors": count}
    whole = options.output / f"{options.made}-{count}-{options.seed}"
    if not whole.exists():
        new = whole.with_name(f"{whole.name}.new")
        shutil.rmtree(new, ignore_errors=True)
        begun = time.perf_counter()
        store = filled(new, options, count)
        row["s to write"] = time.perf_counter() - begun
        row["bytes a vector"] = _bytes(new) / count
        begun = time.perf_counter()
        store.tidy(ann=True)
        row["s to index"] = time.perf_counter() - begun
        new.rename(whole)
    row["bytes a vector, ann"] = _bytes(whole) / count
    queries, vectors = next(drawn(options, options.queries, seed=1)), drawn(options, count)
    brute = nearest(queries, vectors)
    exact, ann = (in_own_process(searched, whole, queries, kind) for kind in (True, False))
    row["exact: recall"], row["ann: recall"] = recall(exact["paths"], brute), recall(ann["paths"], exact["paths"])
    for name, found in (("exact", exact), ("ann", ann)):
        row |= {f"{name}: {key}": value for key, value in found.items() if key != "paths"}
    return row


def filled(folder: Path, options: Options, count: int) -> Store:
    """An index of one segment a file, which is named by its number."""
    settings = IndexSettings(
        root=str(folder),
        checkpoint="none",
        fingerprint="0" * 64,
        width=WIDTH,
        frames=1,
        prefix=1,
        grid=1,
        resize="shortest",
        sampling="uniform",
        segment_seconds=30.0,
        overlap=5.0,
        tokens="none",
    )
    store, done = Store.create(folder, settings), 0
    for vectors in drawn(options, count):
        store.put([_row(done + number, vector) for number, vector in enumerate(vectors)], [])
        done += len(vectors)
    return store


def drawn(options: Options, count: int, seed: int = 0) -> Iterator[np.ndarray]:
    """(up to AT_ONCE, WIDTH) float32, L2-normalised, always the same; `seed` 0 for those that are stored."""
    rng = np.random.default_rng([options.seed, seed])
    directions = _random(np.random.default_rng([options.seed, 2]), max(1, max(options.vectors) // 100))
    for first in range(0, count, AT_ONCE):
        vectors = _random(rng, min(AT_ONCE, count - first))
        if options.made == "clusters":
            vectors += directions[rng.integers(len(directions), size=len(vectors))]
            vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
        yield vectors


def nearest(queries: np.ndarray, vectors: Iterator[np.ndarray]) -> list[list[str]]:
    """Of each query the names of the FOUND nearest, by one matrix product after the other."""
    best, names, done = np.empty((len(queries), 0), np.float32), np.empty((len(queries), 0), np.int64), 0
    for some in vectors:
        numbers = np.broadcast_to(np.arange(done, done + len(some)), (len(queries), len(some)))
        best, names = np.hstack([best, queries @ some.T]), np.hstack([names, numbers])
        order = np.argsort(-best, axis=1)[:, :FOUND]
        best, names = np.take_along_axis(best, order, 1), np.take_along_axis(names, order, 1)
        done += len(some)
    return [[_name(number) for number in row] for row in names.tolist()]


def searched(folder: Path, queries: np.ndarray, exact: bool) -> dict[str, Any]:
    """The names that each query finds, the times, and the most memory of this process, which did nothing else."""
    index = tempme_vl.search.open(folder)
    before = _memory()
    index.search(EmbeddedQuery(queries[0], None), FOUND, exact=exact)  # which opens files
    times, paths = [], []
    for query in queries:
        begun = time.perf_counter()
        hits = index.search(EmbeddedQuery(query, None), FOUND, exact=exact)
        times.append(1000 * (time.perf_counter() - begun))
        paths.append([hit.path for hit in hits])
    median, p95 = np.percentile(times, [50, 95]).tolist()
    return {"paths": paths, "ms": median, "ms, p95": p95, "MB before": before, "MB": _memory()}


def in_own_process(work: Callable[..., Any], *given: Any) -> Any:
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(work, *given).result()


def recall(found: list[list[str]], expected: list[list[str]]) -> float:
    """The share of what is expected that is found."""
    return float(np.mean([len({*one} & {*other}) / len(other) for one, other in zip(found, expected, strict=True)]))


def _random(rng: np.random.Generator, count: int) -> np.ndarray:
    vectors = rng.standard_normal((count, WIDTH), dtype=np.float32)
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def _row(number: int, vector: np.ndarray) -> Row:
    times = np.zeros(1, np.float32)
    return Row(VideoFile(_name(number), 1, 1), 0, 0.0, 15.0, 15.0, vector, b"", b"", b"", times)


def _name(number: int) -> str:
    return f"{number:09d}.mp4"


def _bytes(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())


def _memory() -> float:
    """The most that this process has held, in MiB."""
    return memory_now(torch.device("cpu"))[1] / 2**20


def _shown(value: Any) -> str:
    return f"{value:.3g}" if isinstance(value, float) and value < 10 else f"{value:.0f}"


if __name__ == "__main__":
    run(Command("", Options, main))
