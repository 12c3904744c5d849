"""The embedded data set "motion": small rendered videos that cannot be told apart without looking at time.

A video and its time reversal hold the same set of single frames and differ only in their order: an object moves left
or right along the same places, or two objects appear in turn. The videos are real H.264 files in the file layout of
MSRVTT and MSRVTT-QA, rendered from a seed on first use.
"""

from __future__ import annotations

import csv
import fcntl
import itertools
import json
import os
import shutil
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np

from tempme_vl.data import msrvtt, msrvtt_qa
from tempme_vl.data.dataset import DataSet, Place, SplitNames, Texts
from tempme_vl.data.files import check_regular, load_json
from tempme_vl.data.options import MOTION_ROOT
from tempme_vl.data.splits import RetrievalSplit
from tempme_vl.data.videoqa import QASplit

VERSION = 3  # raise it with every change to what is rendered or written
SIZE = 64
FPS = 8
NUM_FRAMES = 16
# Each picture is shown for two frames. Rules that draw 8 of the 16 frames round downwards (0, 2, ... 12, 15 or
# 0, 2, ... 14): of 16 different pictures they would take other places for leftward than for rightward motion, and
# single frames would give the direction away. Of pairs they take each picture once, whichever way it goes.
HOLD = 2
NUM_PICTURES = NUM_FRAMES // HOLD

COLORS = {
    "red": (225, 30, 30),
    "green": (20, 165, 40),
    "blue": (35, 65, 230),
    "yellow": (245, 215, 20),
    "magenta": (215, 40, 205),
    "cyan": (30, 205, 215),
}
BACKGROUNDS = {"black": (4, 4, 4), "navy": (4, 8, 95), "brown": (84, 46, 6)}  # all dark: docs/LOG.md
SHAPES = ("square", "ring", "triangle", "cross")  # a filled circle is hard to tell from a square at 32 pixels
DIRECTIONS = {"left": (-1, 0), "right": (1, 0), "up": (0, -1), "down": (0, 1)}

# One sentence a video, and none about the background: with four paraphrases and 288 meanings the direction was not
# learnt in the minutes that the demo has (docs/LOG.md).
MOVE_CAPTIONS = ("a {color} {shape} moves {direction}",)
ORDER_CAPTIONS = (
    "a {first} then a {second} on a {background} background",
    "first a {first} and after that a {second} on a {background} background",
    "on a {background} background a {first} is followed by a {second}",
    "a {background} scene in which a {second} comes after a {first}",
)

_LOCK = ".motion.lock"


@dataclass(frozen=True)
class Thing:
    """An object: its place (x to the right, y down, from the centre of the frame) and radius in pixels."""

    color: str
    shape: str
    x: float
    y: float
    radius: float


@dataclass(frozen=True)
class MoveVideo:
    """`thing` moves through its place, from `extent` pixels before it to `extent` pixels behind it."""

    thing: Thing
    direction: str
    extent: float
    background: str

    def pictures(self) -> list[Thing]:
        dx, dy = DIRECTIONS[self.direction]
        # exactly antisymmetric in time, so that the reversed video is the same bit for bit
        steps = [(2 * i - (NUM_PICTURES - 1)) / (NUM_PICTURES - 1) * self.extent for i in range(NUM_PICTURES)]
        thing = self.thing
        return [
            Thing(thing.color, thing.shape, thing.x + dx * step, thing.y + dy * step, thing.radius) for step in steps
        ]

    def captions(self) -> list[str]:
        words = {"color": self.thing.color, "shape": self.thing.shape, "direction": self.direction}
        return [template.format(**words) for template in MOVE_CAPTIONS]


@dataclass(frozen=True)
class OrderVideo:
    """`first` is seen in the first half, `second`, of another colour and shape, in the second half."""

    first: Thing
    second: Thing
    background: str

    def pictures(self) -> list[Thing]:
        half = NUM_PICTURES // 2
        return [self.first] * half + [self.second] * half

    def captions(self) -> list[str]:
        words = {
            "first": f"{self.first.color} {self.first.shape}",
            "second": f"{self.second.color} {self.second.shape}",
            "background": self.background,
        }
        return [template.format(**words) for template in ORDER_CAPTIONS]


MotionVideo = MoveVideo | OrderVideo
Entry = tuple[str, MotionVideo]  # MSRVTT's name of the split ("train", "validate", "test") and the video


def render_frames(video: MotionVideo) -> np.ndarray:
    """The video before compression: uint8 (NUM_FRAMES, SIZE, SIZE, 3), RGB."""
    things = video.pictures()
    middle = (SIZE - 1) / 2
    pixel = np.arange(SIZE, dtype=np.float32) - middle
    x = pixel[None, None, :] - _column(thing.x for thing in things)
    y = pixel[None, :, None] - _column(thing.y for thing in things)
    radius = _column(thing.radius for thing in things)
    distance = np.empty((len(things), SIZE, SIZE), dtype=np.float32)
    for shape in {thing.shape for thing in things}:
        rows = [i for i, thing in enumerate(things) if thing.shape == shape]
        distance[rows] = _distance(shape, x[rows], y[rows], radius[rows])
    # One pixel of linear fall-off around the outline is the anti-aliasing.
    coverage = np.clip(0.5 - distance, 0.0, 1.0)[..., None]
    color = np.array([COLORS[thing.color] for thing in things], dtype=np.float32)[:, None, None, :]
    background = np.array(BACKGROUNDS[video.background], dtype=np.float32)
    pictures = np.rint(background + coverage * (color - background)).astype(np.uint8)
    return np.repeat(pictures, HOLD, axis=0)


def _column(values: Iterable[float]) -> np.ndarray:
    return np.array(list(values), dtype=np.float32)[:, None, None]


def _distance(shape: str, x: np.ndarray, y: np.ndarray, radius: np.ndarray) -> np.ndarray:
    """Signed distance to the outline in pixels (near it), negative inside."""
    if shape == "ring":
        return np.abs(np.hypot(x, y) - 0.76 * radius) - 0.24 * radius
    if shape == "square":
        return np.maximum(np.abs(x), np.abs(y)) - 0.85 * radius
    if shape == "triangle":
        sides = np.sqrt(0.75) * np.abs(x) - 0.5 * y
        return np.maximum(sides, y) - 0.55 * radius
    if shape == "cross":
        ax, ay, arm = np.abs(x), np.abs(y), 0.3 * radius
        return np.minimum(np.maximum(ax - arm, ay - radius), np.maximum(ay - arm, ax - radius))
    raise AssertionError(shape)


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


def render_motion(
    root: str | Path,
    *,
    seed: int = 0,
    num_train: int = 6000,
    num_test: int = 96,
    num_order_train: int = 3000,
    num_order_val: int = 300,
    num_order_test: int = 300,
) -> Path:
    """Render the data set under `root`, unless it is there already, and return `root`.

    Takes some 20 s and 87 MB at the default size. Several processes may call it at once: one renders, the others
    wait. `motion.json` is written last, so a folder without it is unfinished and is rendered afresh.

    Args:
        root: a new or empty folder, or one that an earlier call made.
        num_train: "move" videos in MSRVTT_train.9k.csv. The first 7010/9000 of them, MSRVTT's own share, make
            MSRVTT_train.7k.csv; the last 5 % are the questions' validation videos, in no training question.
        num_test: videos in MSRVTT_JSFUSION_test.csv, one per caption; all captions differ, so 96 at most.
        num_order_train, num_order_val, num_order_test: "order" videos, which only the questions ask about.

    Raises:
        ValueError: on impossible numbers, a folder of other parameters, or a folder that is not of this kind.
    """
    parameters = {
        "seed": seed,
        "num_train": num_train,
        "num_test": num_test,
        "num_order_train": num_order_train,
        "num_order_val": num_order_val,
        "num_order_test": num_order_test,
    }
    if num_train < 1 or min(parameters.values()) < 0:
        raise ValueError(f"motion needs a training video at least and no negative number; got {parameters}")
    root = Path(root)
    description = {
        "name": "motion",
        "version": VERSION,
        "parameters": parameters,
        "frames": NUM_FRAMES,
        "fps": FPS,
        "size": SIZE,
    }
    if _is_finished(root, description):
        return root
    entries = _draw_videos(**parameters)
    with _lock(root):
        if not _is_finished(root, description):  # another process may have finished while this one waited
            shutil.rmtree(root / "videos", ignore_errors=True)
            (root / "videos").mkdir()
            _write_videos(root / "videos", entries)
            _write_annotations(root, entries, np.random.default_rng([seed, 1]))
            _write_retrieval_lists(root, entries, num_train, num_test)
            _write_text(root / "motion.json", json.dumps(description, indent=1))
    return root


def _draw_videos(
    seed: int, num_train: int, num_test: int, num_order_train: int, num_order_val: int, num_order_test: int
) -> list[Entry]:
    """All videos in the order of their numbers: retrieval training, retrieval test, then the order videos."""
    rng = np.random.default_rng([seed, 0])
    combinations = list(itertools.product(COLORS, SHAPES, DIRECTIONS))
    if num_test > len(combinations):
        raise ValueError(f"only {len(combinations)} test captions differ: num_test={num_test} is too many")
    first_val = num_train - num_train // 20
    train = [combinations[i] for i in rng.integers(len(combinations), size=num_train)]
    test = [combinations[i] for i in rng.permutation(len(combinations))[:num_test]]
    return [
        *(("train", _random_move(rng, *words)) for words in train[:first_val]),
        *(("validate", _random_move(rng, *words)) for words in train[first_val:]),
        *(("test", _random_move(rng, *words)) for words in test),
        *(("train", _random_order(rng)) for _ in range(num_order_train)),
        *(("validate", _random_order(rng)) for _ in range(num_order_val)),
        *(("test", _random_order(rng)) for _ in range(num_order_test)),
    ]


def _random_move(rng: np.random.Generator, color: str, shape: str, direction: str) -> MoveVideo:
    # Everything drawn here is independent of the sign of the direction. A long path and little scatter let a
    # small model learn the direction within minutes; at its ends the outline may just leave the frame.
    along, across = rng.uniform(-1.5, 1.5), rng.uniform(-4, 4)
    x, y = (along, across) if direction in ("left", "right") else (across, along)
    thing = Thing(color, shape, x, y, radius=rng.uniform(11, 14))
    return MoveVideo(thing, direction, extent=rng.uniform(15, 17), background=_random_background(rng))


def _random_order(rng: np.random.Generator) -> OrderVideo:
    colors = rng.choice(list(COLORS), size=2, replace=False).tolist()
    shapes = rng.choice(SHAPES, size=2, replace=False).tolist()
    first, second = (
        Thing(color, shape, rng.uniform(-8, 8), rng.uniform(-8, 8), rng.uniform(11, 14))
        for color, shape in zip(colors, shapes, strict=True)
    )
    return OrderVideo(first, second, background=_random_background(rng))


def _random_background(rng: np.random.Generator) -> str:
    return str(rng.choice(list(BACKGROUNDS)))


def _questions(video: MotionVideo, rng: np.random.Generator) -> list[tuple[str, str]]:
    """Question and answer pairs; the first of a move video and both of an order video need time."""
    if isinstance(video, MoveVideo):
        appearance = [
            ("what color is the object", video.thing.color),
            ("what shape is the object", video.thing.shape),
            ("what color is the background", video.background),
        ]
        left_out = rng.integers(len(appearance))
        return [
            ("which way does the object move", video.direction),
            *(pair for i, pair in enumerate(appearance) if i != left_out),
        ]
    things = {"first": video.first, "last": video.second}
    by_color, by_shape = rng.choice(list(things), size=2).tolist()
    return [
        (f"which color appears {by_color}", things[by_color].color),
        (f"which shape appears {by_shape}", things[by_shape].shape),
    ]


def question_kind(question: str) -> str:
    """What a question of the embedded data set asks for: direction and order need time, the others a single frame."""
    return _KINDS[question]


_KINDS = {
    "which way does the object move": "direction",
    "what color is the object": "color",
    "what shape is the object": "shape",
    "what color is the background": "background",
    **{f"which {what} appears {when}": "order" for what in ("color", "shape") for when in ("first", "last")},
}


def _write_videos(folder: Path, entries: list[Entry]) -> None:
    def write(number: int) -> None:
        _, video = entries[number]
        write_video(folder / f"video{number}.mp4", render_frames(video))

    # Threads and not processes: much of the time is inside the encoder, which releases the interpreter lock, and
    # a caller needs no `if __name__ == "__main__"`.
    with ThreadPoolExecutor(max_workers=2) as pool:
        for _ in pool.map(write, range(len(entries))):
            pass  # asking for the results raises what went wrong


def _write_annotations(root: Path, entries: list[Entry], rng: np.random.Generator) -> None:
    videos: list[dict[str, Any]] = []
    sentences: list[dict[str, Any]] = []
    questions: dict[str, list[dict[str, Any]]] = {"train": [], "validate": [], "test": []}
    question_ids = itertools.count()
    for number, (split, video) in enumerate(entries):
        category = int(isinstance(video, OrderVideo))
        videos.append({"video_id": f"video{number}", "id": number, "category": category, "split": split})
        for caption in video.captions()[: 1 if split == "test" else None]:
            sentences.append({"video_id": f"video{number}", "caption": caption, "sen_id": len(sentences)})
        for question, answer in _questions(video, rng):
            pair = {"answer": answer, "category_id": category, "id": next(question_ids)}
            questions[split].append({**pair, "question": question, "video_id": number})
    _write_text(root / "MSRVTT_data.json", json.dumps({"videos": videos, "sentences": sentences}))
    for split, name in (("train", "train_qa"), ("validate", "val_qa"), ("test", "test_qa")):
        _write_text(root / f"{name}.json", json.dumps(questions[split]))


def _write_retrieval_lists(root: Path, entries: list[Entry], num_train: int, num_test: int) -> None:
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


def _is_finished(root: Path, description: dict[str, Any]) -> bool:
    path = root / "motion.json"
    if not path.exists():
        return False
    found = load_json(path)
    if found != description:
        raise ValueError(
            f"{root} holds the motion data set of other parameters: expected {description}, found {found}. "
            "Choose another folder or delete this one"
        )
    return True


@contextmanager
def _lock(root: Path) -> Iterator[None]:
    """Hold the folder's lock; the system releases it when the process dies."""
    if root.exists() and not root.is_dir():
        raise ValueError(f"{root}: expected a folder")
    root.mkdir(parents=True, exist_ok=True)
    lock = root / _LOCK
    if os.path.lexists(lock):
        check_regular(lock)
    # The lock file comes before all others and stays, so it tells a folder of ours from, say, the real MSRVTT.
    if any(root.iterdir()) and not lock.exists():
        raise ValueError(f"{root} is not empty and was not made by render_motion: choose an empty folder")
    with lock.open("a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _captions(place: Place, split: str) -> RetrievalSplit:
    return msrvtt.read_split(replace(place, data_root=render_motion(place.root)), split)


def _asked(place: Place, split: str) -> QASplit:
    return msrvtt_qa.read_split(replace(place, data_root=render_motion(place.root)), split, "motion")


DATASET = DataSet(
    title="rendered by this package",
    files="written with the videos",
    captions=Texts(_captions, msrvtt.SPLITS, SplitNames("train_9k", None, "test_1k", holdout=96)),
    questions=Texts(_asked),
    root=MOTION_ROOT,
    rendered=True,
    options={"frame_cache": str(MOTION_ROOT / "frames"), "decode_timeout": None, "max_words": 12},
    question_kind=question_kind,
)
