"""Folders of small videos and a model with random weights, for the tests of search; and runs that are killed.

Run as a program, it indexes a folder, is killed at each of some moments, and prints what was in the index then.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import torch

from tempme_vl.data.rendered import FPS, write_video
from tempme_vl.search.embed import Embedder
from tempme_vl.tasks.retrieval import create_retrieval_model

SETTINGS: dict[str, Any] = {"segment_seconds": 2.0, "overlap": 0.5}
LENGTHS = {"a.mp4": 1.5, "deep/b.mp4": 2.0, "deep/er/c.mp4": 4.5, "d'quoted.mp4": 3.0}  # seconds


def scene(seed: int, seconds: float) -> np.ndarray:
    """(T, 64, 64, 3) uint8: a square that moves over a ground of its own colours."""
    rng = np.random.default_rng(seed)
    count = round(seconds * FPS)
    ground, thing = rng.integers(0, 255, (2, 3))
    path = np.linspace(rng.integers(0, 40, 2), rng.integers(0, 40, 2), count).astype(int)
    frames = np.broadcast_to(ground.astype(np.uint8), (count, 64, 64, 3)).copy()
    for frame, (y, x) in zip(frames, path, strict=True):
        frame[y : y + 20, x : x + 20] = thing
    return frames


def render_folder(root: Path) -> Path:
    """Videos of `LENGTHS`, one that is broken, and a file that is none."""
    for seed, (name, seconds) in enumerate(LENGTHS.items()):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        write_video(root / name, scene(seed, seconds))
    (root / "broken.mp4").write_bytes(b"not a video")
    (root / "notes.txt").write_text("not a video")
    return root


def save_model(folder: Path, seed: int = 0, **more: Any) -> Path:
    from evaluation.predict_runs import TEMPME  # which imports what a run does not need

    torch.manual_seed(seed)
    create_retrieval_model("open_clip:tiny", None, **{**TEMPME, **more}).save_pretrained(folder)
    return folder


def code_of(page: Path, heading: str) -> str:
    """The first Python that a page shows below a heading."""
    return page.read_text().split(f"## {heading}\n", 1)[1].split("```python\n", 1)[1].split("```", 1)[0]


def rows_of(folder: Path) -> list[list[Any]]:
    """Path, segment, times and a checksum of each row of an index, in order."""
    from tempme_vl.search.store import Store

    rows = Store(folder).table.to_arrow().to_pylist()
    kept = [
        [row["path"], row["segment"], row["start"], row["end"], row["size"], zlib.crc32(row["tokens"])] for row in rows
    ]
    return sorted(kept)


def killed_after(videos: str, model: str, out: str, commits: int) -> None:
    """Indexes a folder, and kills itself when so many files are written."""
    from tempme_vl.search import index, rows, store

    put, done = store.Store.put, iter(range(1, commits + 1))

    def counted(self: store.Store, *given: Any) -> None:
        put(self, *given)
        if next(done) == commits:
            os.kill(os.getpid(), signal.SIGKILL)

    store.Store.put = counted
    rows.COMMIT_SECONDS = 0.0
    index.build(videos, out, model, batch_size=1, device="cpu", **SETTINGS)


def killed_at(videos: str, model: str, out: str, shares: list[float]) -> None:
    """Prints the rows of a whole run, and those after a kill at each share of the time since its first file was
    written, and after a run behind it."""
    torch.set_num_threads(1)
    embedder = Embedder.from_pretrained(model, "cpu")
    whole, seconds = _child(_index, videos, embedder, Path(out) / "whole")
    found = []
    for number, share in enumerate(shares):
        folder = Path(out) / str(number)
        killed, _ = _start(_index, videos, embedder, folder)
        while not _begun(folder).exists():
            time.sleep(0.001)
        time.sleep(share * seconds)
        os.kill(killed, signal.SIGKILL)
        os.waitpid(killed, 0)
        found.append(_child(_gone_on, videos, embedder, folder))
    print(json.dumps([whole, found]))


def _begun(folder: Path) -> Path:
    """There as soon as the first file's rows are about to be written."""
    return folder.with_name(f"{folder.name}.begun")


def _index(videos: str, embedder: Embedder, folder: Path) -> tuple[list[list[Any]], float]:
    """The rows, and the seconds since `_begun`."""
    from tempme_vl.search import index, rows, store

    put, times = store.Store.put, []

    def timed(self: store.Store, *given: Any) -> None:
        _begun(folder).touch()
        times.append(time.monotonic())
        put(self, *given)

    store.Store.put = timed
    rows.COMMIT_SECONDS = 0.0  # a commit a file
    index.build(videos, folder, embedder, batch_size=1, **SETTINGS)
    return rows_of(folder), time.monotonic() - times[0] if times else 0.0


def _gone_on(videos: str, embedder: Embedder, folder: Path) -> tuple[list[list[Any]], list[list[Any]]]:
    """The rows before and after a further run."""
    return rows_of(folder), _index(videos, embedder, folder)[0]


def _start(work: Any, *given: Any) -> tuple[int, int]:
    """LanceDB is imported by forked processes alone, whose threads end with them."""
    reading, writing = os.pipe()
    if (child := os.fork()) == 0:
        try:
            os.close(reading)
            with os.fdopen(writing, "w") as stream:
                json.dump(work(*given), stream)
        finally:
            os._exit(0)
    os.close(writing)
    return child, reading


def _child(work: Any, *given: Any) -> Any:
    child, reading = _start(work, *given)
    with os.fdopen(reading) as stream:
        text = stream.read()
    os.waitpid(child, 0)
    return json.loads(text)


if __name__ == "__main__":
    if sys.argv[4] == "after":
        killed_after(*sys.argv[1:4], int(sys.argv[5]))
    else:
        killed_at(*sys.argv[1:4], [float(share) for share in sys.argv[4:]])
