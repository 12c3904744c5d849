"""Indexing rendered clips by one process and by Ray clusters of several nodes on this machine: rates, memory, a kill.

    python eval/search_cluster.py --checkpoint runs/demo/tempme-seed0/best   # minutes, two CPU cores
    python eval/search_cluster.py --checkpoint runs/demo/tempme-seed0/best --clips 5000 --nodes 2

Each node is Ray's own process with one CPU; with more nodes than free cores they share these, and are no faster. Every
index is compared with the one that one process made. In the last run one node of two or more is killed half way.
"""

from __future__ import annotations

import os
import resource
import shutil
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

import tempme_vl.search
from tempme_vl.command import at_least, run
from tempme_vl.command_line import Command
from tempme_vl.data.motion import render_motion
from tempme_vl.reports import finish, format_columns

RENDERED = 500  # clips that differ; more are links to these
LOOK_SECONDS = 0.5


@dataclass(frozen=True)
class Options:
    """Clips a second, memory and the same rows, with Ray and without."""

    checkpoint: Path
    """Of a model trained on the embedded data set motion."""
    clips: int = 1000
    nodes: tuple[int, ...] = (1, 2)
    """Of each cluster, one CPU each, beside a head without any."""
    kill: bool = False
    """Also kill a node of the last cluster half way."""
    object_store: int = 200
    """MB of each node."""
    output: Path = Path("runs/search-cluster")
    """Clips and indexes are written here."""
    json: Path | None = None
    """Also write all numbers to this file."""


def main(options: Options) -> None:
    at_least(1, clips=options.clips, nodes=min(options.nodes, default=0))
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    folder = clips_of(options)
    rows = [alone(options, folder)]
    rows += [clustered(options, folder, nodes, kill=False) for nodes in options.nodes]
    if options.kill:
        rows.append(clustered(options, folder, options.nodes[-1], kill=True))
    about = f"{options.clips} rendered clips, {options.checkpoint}, {os.cpu_count()} cores"
    names = list(dict.fromkeys(name for row in rows for name in row))
    columns = [{"": name, **{row["by"]: _shown(row.get(name)) for row in rows}} for name in names[1:]]
    finish(f"{about}\n\n{format_columns(columns)}", {"about": about, "rows": rows}, options.json)


def clips_of(options: Options) -> Path:
    """A folder of so many clips."""
    none = {"num_test": 0, "num_order_train": 0, "num_order_val": 0, "num_order_test": 0}
    rendered = render_motion(options.output / "rendered", seed=22, num_train=RENDERED, **none) / "videos"
    folder = options.output / f"clips-{options.clips}"
    folder.mkdir(exist_ok=True)
    for number in range(options.clips):
        link = folder / f"clip{number}.mp4"
        if not link.exists():
            os.link(rendered / f"video{number % RENDERED}.mp4", link)
    return folder


def alone(options: Options, folder: Path) -> dict[str, Any]:
    """By one process, with the CPU time that decoding took, which is a process of its own."""
    out, watch = options.output / "index-alone", Watch()
    shutil.rmtree(out, ignore_errors=True)
    before = _children()
    report = watch.run(out, lambda: tempme_vl.search.build(folder, out, options.checkpoint, device="cpu"))
    decoding = 1000 * (_children() - before) / report.segments
    return {"by": "one process", **watch.rates(), "CPU ms a clip, decoding": decoding, "segments": report.segments}


def clustered(options: Options, folder: Path, nodes: int, kill: bool) -> dict[str, Any]:
    """By a cluster, and how far the index is from the one of one process."""
    from ray.cluster_utils import Cluster

    memory: dict[str, Any] = {"object_store_memory": options.object_store * 2**20}
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False, **memory})
    started = [cluster.add_node(num_cpus=1, **memory) for _ in range(nodes)]
    name = f"{nodes} node{'s' if nodes > 1 else ''}{', one killed' if kill else ''}"
    out = options.output / f"index-{name.replace(', ', '-').replace(' ', '-')}"
    shutil.rmtree(out, ignore_errors=True)

    def killed(rows: int) -> bool:
        if kill and rows >= options.clips / 2:
            cluster.remove_node(started[-1], allow_graceful=False)
        return kill and rows >= options.clips / 2

    watch = Watch(killed)
    build = tempme_vl.search.build
    report = watch.run(out, lambda: build(folder, out, options.checkpoint, device="cpu", ray=cluster.address))
    cluster.shutdown()
    row = {"by": name, **watch.rates(), "segments": report.segments}
    return {**row, "largest difference": difference(out, options.output / "index-alone")}


def difference(one: Path, other: Path) -> float:
    """The largest of any number of the vectors. Raises ValueError for other rows."""
    found = []
    for number, folder in enumerate((one, other)):
        tempme_vl.search.open(folder).export(file := folder / f"{number}.npz")
        found.append(np.load(file))
    for name in ("path", "segment", "start", "end"):
        if not np.array_equal(found[0][name], found[1][name]):
            raise ValueError(f"{one} and {other} hold other rows: {name} differs")
    return float(np.abs(found[0]["vectors"] - found[1]["vectors"]).max())


class Watch:
    """Rows and memory while an index is made.

    Args:
        act: called with the rows that are written, until it returns True.
    """

    def __init__(self, act: Callable[[int], bool] = lambda rows: True):
        self.act, self.looks = act, list[tuple[float, int, float, float, float]]()

    def run(self, out: Path, build: Callable[[], Any]) -> Any:
        """What `build` returns."""
        ended = threading.Event()
        thread = threading.Thread(target=self._look, args=(out, ended))
        self.begun = time.perf_counter()
        thread.start()
        try:
            return build()
        finally:
            self.seconds = time.perf_counter() - self.begun
            ended.set()
            thread.join()

    def rates(self) -> dict[str, float]:
        """Seconds, and from the first rows on clips a second and CPU time; the most memory in each third of them."""
        times, rows, cpu, own, all_of_them = (np.array(column) for column in zip(*self.looks, strict=True))
        first, most = int(np.argmax(rows > 0)), int(rows.max())
        found = {"s": self.seconds, "s to the first rows": float(times[first])}
        if rows[first] < most:
            end = int(np.argmax(rows == most))
            found["clips/s from then on"] = float((most - rows[first]) / (times[end] - times[first]))
            found["CPU ms a clip, this process"] = float(1000 * (cpu[end] - cpu[first]) / (most - rows[first]))
        for number in range(3):
            of = (rows > 0) & (rows >= number * most / 3) & (rows <= (number + 1) * most / 3)
            if of.any():
                found[f"MB, writer, third {number + 1}"] = float(own[of].max())
                found[f"MB, all, third {number + 1}"] = float(all_of_them[of].max())
        return found

    def _look(self, out: Path, ended: threading.Event) -> None:
        acted = False
        while not ended.wait(LOOK_SECONDS):
            rows = len(tempme_vl.search.open(out)) if (out / "segments.lance" / "_versions").exists() else 0
            self.looks.append((time.perf_counter() - self.begun, rows, time.process_time(), *_memory()))
            acted = acted or self.act(rows)


def _memory() -> tuple[float, float]:
    """MB of this process, and of it with all that it started; what several share counts once for each, but shared
    memory (Ray's object store) not at all."""
    import psutil

    def held(process: Any) -> float:
        try:
            facts = process.memory_info()
        except psutil.NoSuchProcess:
            return 0.0
        return float(facts.rss - facts.shared) / 2**20

    this = psutil.Process()
    return float(this.memory_info().rss) / 2**20, held(this) + sum(held(one) for one in this.children(recursive=True))


def _children() -> float:
    """CPU seconds of ended processes that this one has started."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def _shown(value: Any) -> str:
    return "" if value is None else f"{value:.2g}" if isinstance(value, float) and value < 10 else f"{value:.0f}"


if __name__ == "__main__":
    run(Command("", Options, main))
