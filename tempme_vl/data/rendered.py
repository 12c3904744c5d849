"""Data sets that this package renders: real H.264 files, in the file layout of MSRVTT and MSRVTT-QA."""

from __future__ import annotations

import csv
import fcntl
import itertools
import json
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from tempme_vl.data.files import check_regular, load_json

SIZE = 64
FPS = 8
NUM_FRAMES = 16
# Each picture is shown for two frames. Rules that draw 8 of the 16 frames round downwards (0, 2, ... 12, 15 or
# 0, 2, ... 14): of 16 different pictures they would take other places for leftward than for rightward motion, and
# single frames would give the direction away. Of pairs they take each picture once, whichever way it goes.
HOLD = 2
NUM_PICTURES = NUM_FRAMES // HOLD


class RenderedVideo(Protocol):
    """A video that is not rendered yet."""

    @property
    def category(self) -> int:
        """MSRVTT's number of a category."""

    def frames(self) -> np.ndarray:
        """The video before compression: uint8 RGB, frames and size as its `Rendering` says."""

    def captions(self) -> list[str]:
        """One at least; in a test split the first alone is used."""

    def questions(self, rng: np.random.Generator) -> list[tuple[str, str]]:
        """(question, answer) pairs."""


Entry = tuple[str, RenderedVideo]  # MSRVTT's name of the split ("train", "validate", "test") and the video


@dataclass(frozen=True)
class Rendering:
    """What a folder holds.

    Attributes:
        name, version: of the data set; the version is raised with every change to what is rendered or written.
        seed: of all that is random.
        num_train, num_test: retrieval's videos, which come first, training before test.
        more: other numbers that the videos depend on.
        frames, size: of a video, and of its frames in pixels.
    """

    name: str
    version: int
    seed: int
    num_train: int
    num_test: int
    more: tuple[tuple[str, int], ...] = ()
    frames: int = NUM_FRAMES
    size: int = SIZE

    @property
    def parameters(self) -> dict[str, int]:
        own = {"seed": self.seed, "num_train": self.num_train, "num_test": self.num_test}
        return {**own, **dict(self.more)}

    @property
    def description(self) -> dict[str, Any]:
        """NAME.json, which is written last: a folder without it is unfinished."""
        facts = {"name": self.name, "version": self.version, "parameters": self.parameters}
        return {**facts, "frames": self.frames, "fps": FPS, "size": self.size}


def render(root: str | Path, rendering: Rendering, draw: Callable[[], Sequence[Entry]]) -> Path:
    """Render a data set under `root`, unless it is there already, and return `root`.

    Several processes may call it at once: one renders, the others wait. An unfinished folder is rendered afresh.

    Args:
        root: a new or empty folder, or one that an earlier call made.
        draw: gives all videos in the order of their numbers.

    Raises:
        ValueError: on impossible numbers, a folder of other parameters, or a folder that is not of this kind.
    """
    if rendering.num_train < 1 or min(rendering.parameters.values()) < 0:
        raise ValueError(
            f"{rendering.name} needs a training video at least and no negative number; got {rendering.parameters}"
        )
    root = Path(root)
    if _is_finished(root, rendering):
        return root
    entries = draw()
    with _lock(root, rendering.name):
        if not _is_finished(root, rendering):  # another process may have finished while this one waited
            shutil.rmtree(root / "videos", ignore_errors=True)
            (root / "videos").mkdir()
            _write_videos(root / "videos", entries)
            _write_annotations(root, entries, np.random.default_rng([rendering.seed, 1]))
            _write_retrieval_lists(root, entries, rendering.num_train, rendering.num_test)
            _write_text(root / f"{rendering.name}.json", json.dumps(rendering.description, indent=1))
    return root


def meanings(rng: np.random.Generator, combinations: Sequence[Any], num_train: int, num_test: int) -> list[list[Any]]:
    """What the training, the validation (the last 5 % of the former) and the test videos say: drawn with
    replacement, but for the test's, which all differ.

    Raises:
        ValueError: more test videos than combinations.
    """
    if num_test > len(combinations):
        raise ValueError(f"only {len(combinations)} test captions differ: num_test={num_test} is too many")
    first_val = num_train - num_train // 20
    train = [combinations[i] for i in rng.integers(len(combinations), size=num_train)]
    test = [combinations[i] for i in rng.permutation(len(combinations))[:num_test]]
    return [train[:first_val], train[first_val:], test]


def write_video(path: Path, frames: np.ndarray) -> None:
    """Write uint8 (T, H, W, 3) RGB frames as H.264, every frame coded alone and with one fixed quantiser.

    So a frame's pixels do not depend on its neighbours: compression tells nothing about the direction of time.
    The file appears under its name only when it is whole.
    """
    import av  # reading annotations needs no decoder

    partial = path.with_suffix(".partial")
    with av.open(str(partial), "w", format="mp4") as container:
        stream = container.add_stream("libx264", rate=FPS)
        stream.height, stream.width = frames.shape[1:3]
        stream.pix_fmt = "yuv420p"
        stream.time_base = Fraction(1, FPS)
        stream.codec_context.thread_count = 1  # the bytes must not depend on the number of cores
        stream.options = {"preset": "veryfast", "qp": "18", "g": "1"}
        for index, image in enumerate(frames):
            frame = av.VideoFrame.from_ndarray(image, format="rgb24")
            frame.pts = index
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    os.replace(partial, path)


def _write_videos(folder: Path, entries: Sequence[Entry]) -> None:
    def write(number: int) -> None:
        _, video = entries[number]
        write_video(folder / f"video{number}.mp4", video.frames())

    # Threads and not processes: much of the time is inside the encoder, which releases the interpreter lock, and
    # a caller needs no `if __name__ == "__main__"`.
    with ThreadPoolExecutor(max_workers=2) as pool:
        for _ in pool.map(write, range(len(entries))):
            pass  # asking for the results raises what went wrong


def _write_annotations(root: Path, entries: Sequence[Entry], rng: np.random.Generator) -> None:
    videos: list[dict[str, Any]] = []
    sentences: list[dict[str, Any]] = []
    questions: dict[str, list[dict[str, Any]]] = {"train": [], "validate": [], "test": []}
    question_ids = itertools.count()
    for number, (split, video) in enumerate(entries):
        videos.append({"video_id": f"video{number}", "id": number, "category": video.category, "split": split})
        for caption in video.captions()[: 1 if split == "test" else None]:
            sentences.append({"video_id": f"video{number}", "caption": caption, "sen_id": len(sentences)})
        for question, answer in video.questions(rng):
            pair = {"answer": answer, "category_id": video.category, "id": next(question_ids)}
            questions[split].append({**pair, "question": question, "video_id": number})
    _write_text(root / "MSRVTT_data.json", json.dumps({"videos": videos, "sentences": sentences}))
    for split, name in (("train", "train_qa"), ("validate", "val_qa"), ("test", "test_qa")):
        if any(questions.values()):
            _write_text(root / f"{name}.json", json.dumps(questions[split]))


def _write_retrieval_lists(root: Path, entries: Sequence[Entry], num_train: int, num_test: int) -> None:
    train = [[f"video{number}"] for number in range(num_train)]
    _write_csv(root / "MSRVTT_train.9k.csv", ["video_id"], train)
    _write_csv(root / "MSRVTT_train.7k.csv", ["video_id"], train[: max(1, num_train * 7010 // 9000)])
    test = [
        [f"ret{i}", f"msr{number}", f"video{number}", entries[number][1].captions()[0]]
        for i, number in enumerate(range(num_train, num_train + num_test))
    ]
    _write_csv(root / "MSRVTT_JSFUSION_test.csv", ["key", "vid_key", "video_id", "sentence"], test)


def _write_csv(path: Path, header: list[str], rows: list[list[str]]) -> None:
    with path.open("w", newline="") as file:
        csv.writer(file, lineterminator="\n").writerows([header, *rows])


def _write_text(path: Path, text: str) -> None:
    partial = path.with_name(path.name + ".partial")
    partial.write_text(text)
    os.replace(partial, path)


def _is_finished(root: Path, rendering: Rendering) -> bool:
    path = root / f"{rendering.name}.json"
    if not path.exists():
        return False
    expected, found = rendering.description, load_json(path)
    if found != expected:
        raise ValueError(
            f"{root} holds the {rendering.name} data set of other parameters: expected {expected}, found {found}. "
            "Choose another folder or delete this one"
        )
    return True


@contextmanager
def _lock(root: Path, name: str) -> Iterator[None]:
    """Hold the folder's lock; the system releases it when the process dies."""
    if root.exists() and not root.is_dir():
        raise ValueError(f"{root}: expected a folder")
    root.mkdir(parents=True, exist_ok=True)
    lock = root / f".{name}.lock"
    if os.path.lexists(lock):
        check_regular(lock)
    # The lock file comes before all others and stays, so it tells a folder of ours from, say, the real MSRVTT.
    if any(root.iterdir()) and not lock.exists():
        raise ValueError(f"{root} is not empty and holds no {name} data set rendered earlier: choose an empty folder")
    with lock.open("a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
