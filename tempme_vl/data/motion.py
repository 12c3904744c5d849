"""The embedded data set "motion": small rendered videos that cannot be told apart without looking at time.

A video and its time reversal hold the same set of single frames and differ only in their order: an object moves left
or right along the same places, or two objects appear in turn. The videos are real H.264 files in the file layout of
MSRVTT and MSRVTT-QA, rendered from a seed on first use.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import ClassVar

import numpy as np

from tempme_vl.data import msrvtt, msrvtt_qa
from tempme_vl.data.dataset import DataSet, Place, SplitNames, Texts
from tempme_vl.data.drawing import COLORS, SHAPES, Thing, draw
from tempme_vl.data.options import MOTION_ROOT
from tempme_vl.data.rendered import HOLD, NUM_PICTURES, SIZE, Entry, Rendering, meanings, render
from tempme_vl.data.splits import RetrievalSplit
from tempme_vl.data.videoqa import QASplit

VERSION = 3  # raise it with every change to what is rendered or written

BACKGROUNDS = {"black": (4, 4, 4), "navy": (4, 8, 95), "brown": (84, 46, 6)}  # all dark: docs/LOG.md
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


@dataclass(frozen=True)
class MoveVideo:
    """`thing` moves through its place, from `extent` pixels before it to `extent` pixels behind it."""

    thing: Thing
    direction: str
    extent: float
    background: str
    category: ClassVar[int] = 0

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

    def frames(self) -> np.ndarray:
        return render_frames(self)

    def questions(self, rng: np.random.Generator) -> list[tuple[str, str]]:
        """The first of them needs time."""
        appearance = [
            ("what color is the object", self.thing.color),
            ("what shape is the object", self.thing.shape),
            ("what color is the background", self.background),
        ]
        left_out = rng.integers(len(appearance))
        return [
            ("which way does the object move", self.direction),
            *(pair for i, pair in enumerate(appearance) if i != left_out),
        ]


@dataclass(frozen=True)
class OrderVideo:
    """`first` is seen in the first half, `second`, of another colour and shape, in the second half."""

    first: Thing
    second: Thing
    background: str
    category: ClassVar[int] = 1

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

    def frames(self) -> np.ndarray:
        return render_frames(self)

    def questions(self, rng: np.random.Generator) -> list[tuple[str, str]]:
        """Both need time."""
        things = {"first": self.first, "last": self.second}
        by_color, by_shape = rng.choice(list(things), size=2).tolist()
        return [
            (f"which color appears {by_color}", things[by_color].color),
            (f"which shape appears {by_shape}", things[by_shape].shape),
        ]


MotionVideo = MoveVideo | OrderVideo


def render_frames(video: MotionVideo) -> np.ndarray:
    """The video before compression: uint8 (NUM_FRAMES, SIZE, SIZE, 3), RGB."""
    return np.repeat(draw(video.pictures(), BACKGROUNDS[video.background], SIZE), HOLD, axis=0)


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
    """Render the data set under `root`, unless it is there already, and return `root`; see `rendered.render`.

    Takes some 20 s and 87 MB at the default size.

    Args:
        root: a new or empty folder, or one that an earlier call made.
        num_train: "move" videos in MSRVTT_train.9k.csv. The first 7010/9000 of them, MSRVTT's own share, make
            MSRVTT_train.7k.csv; the last 5 % are the questions' validation videos, in no training question.
        num_test: videos in MSRVTT_JSFUSION_test.csv, one per caption; all captions differ, so 96 at most.
        num_order_train, num_order_val, num_order_test: "order" videos, which only the questions ask about.

    Raises:
        ValueError: on impossible numbers, a folder of other parameters, or a folder that is not of this kind.
    """
    orders = {"num_order_train": num_order_train, "num_order_val": num_order_val, "num_order_test": num_order_test}
    rendering = Rendering("motion", VERSION, seed, num_train, num_test, tuple(orders.items()))
    return render(root, rendering, partial(draw_motion, seed, num_train, num_test, *orders.values()))


def draw_motion(
    seed: int, num_train: int, num_test: int, num_order_train: int, num_order_val: int, num_order_test: int
) -> list[Entry]:
    """All videos in the order of their numbers: retrieval training, retrieval test, then the order videos."""
    rng = np.random.default_rng([seed, 0])
    combinations = list(itertools.product(COLORS, SHAPES, DIRECTIONS))
    train, val, test = meanings(rng, combinations, num_train, num_test)
    return [
        *(("train", _random_move(rng, *words)) for words in train),
        *(("validate", _random_move(rng, *words)) for words in val),
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


def _captions(place: Place, split: str) -> RetrievalSplit:
    return msrvtt.read_split(replace(place, data_root=render_motion(place.root)), split)


def _asked(place: Place, split: str) -> QASplit:
    return msrvtt_qa.read_split(replace(place, data_root=render_motion(place.root)), split, "motion")


DATASET = DataSet(
    title="rendered by this package: time decides",
    files="written with the videos",
    captions=Texts(_captions, msrvtt.SPLITS, SplitNames("train_9k", None, "test_1k", holdout=96)),
    questions=Texts(_asked),
    root=MOTION_ROOT,
    rendered=True,
    options={"frame_cache": str(MOTION_ROOT / "frames"), "decode_timeout": None, "max_words": 12},
    question_kind=question_kind,
)
