"""The embedded data set "events": long videos that a bag of frames cannot tell apart.

A video shows four of six events, one after the other, and a paragraph tells them in order. The test has all 24 orders
of the same events, and these 24 videos hold the very same frames: whoever forgets their order is right in one of 24
cases. An event has 8 pictures that differ, each for three frames, so 32 frames sampled evenly are each picture once,
whatever the order, and 96 are all there are. The files are those of motion, MSRVTT's, without questions.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import ClassVar

import numpy as np

from tempme_vl.data import msrvtt
from tempme_vl.data.dataset import DataSet, Place, SplitNames, Texts
from tempme_vl.data.drawing import COLORS, SHAPES, Thing, draw
from tempme_vl.data.rendered import Entry, Rendering, render
from tempme_vl.data.splits import RetrievalSplit

VERSION = 1  # raise it with every change to what is rendered or written
ROOT = Path("runs/events-data")

# one color and one shape an event, so that a small tower tells them apart at once and has its minutes for the order
EVENTS = tuple(zip(COLORS, itertools.cycle(SHAPES), strict=False))
TOLD = 4  # events of a video
ORDERS = math.factorial(TOLD)
PICTURES = 8  # of an event
HOLD = 3  # frames of a picture
FRAMES = TOLD * PICTURES * HOLD
SIZE = 32
BACKGROUND = (4, 4, 4)


@dataclass(frozen=True)
class EventsVideo:
    """Events in order.

    Attributes:
        events: (number in EVENTS, seed of its pictures) each.
    """

    events: tuple[tuple[int, int], ...]
    category: ClassVar[int] = 0

    def frames(self) -> np.ndarray:
        things = [thing for event in self.events for thing in _pictures(*event)]
        return draw(things, BACKGROUND, SIZE).repeat(HOLD, axis=0)

    def captions(self) -> list[str]:
        seen = [" ".join(EVENTS[number]) for number, _ in self.events]
        return [" then ".join(seen)]

    def questions(self, rng: np.random.Generator) -> list[tuple[str, str]]:
        return []


def _pictures(number: int, seed: int) -> list[Thing]:
    """What an event looks like does not depend on when it is."""
    rng = np.random.default_rng(seed)
    drawn = zip(*rng.uniform(-4, 4, size=(2, PICTURES)), rng.uniform(8, 11, size=PICTURES), strict=True)
    return [Thing(*EVENTS[number], x, y, radius) for x, y, radius in drawn]


def render_events(root: str | Path, *, seed: int = 0, num_train: int = 1500, num_test: int = 96) -> Path:
    """Render the data set under `root`, unless it is there already, and return `root`; see `rendered.render`.

    Args:
        root: a new or empty folder, or one that an earlier call made.
        num_train: videos in MSRVTT_train.9k.csv.
        num_test: videos in MSRVTT_JSFUSION_test.csv, one per caption: all orders of a few of the 15 choices of events.

    Raises:
        ValueError: on impossible numbers, a folder of other parameters, or a folder that is not of this kind.
    """
    draw_videos = partial(_draw_videos, seed, num_train, num_test)
    return render(root, Rendering("events", VERSION, seed, num_train, num_test, frames=FRAMES, size=SIZE), draw_videos)


def _draw_videos(seed: int, num_train: int, num_test: int) -> Sequence[Entry]:
    choices = list(itertools.combinations(range(len(EVENTS)), TOLD))
    if num_test % ORDERS or num_test > ORDERS * len(choices):
        raise ValueError(
            f"the test has all {ORDERS} orders of up to {len(choices)} choices of events: expected a multiple of "
            f"{ORDERS}, {ORDERS * len(choices)} at most; got num_test={num_test}"
        )
    rng = np.random.default_rng([seed, 0])
    first_val = num_train - num_train // 20
    videos: list[Entry] = []
    for number in range(num_train):
        told = rng.permutation(len(EVENTS))[:TOLD].tolist()
        videos.append(("train" if number < first_val else "validate", EventsVideo(_seeded(told, rng))))
    for choice in rng.permutation(len(choices))[: num_test // ORDERS]:
        orders = itertools.permutations(_seeded(choices[choice], rng))
        videos += (("test", EventsVideo(events)) for events in orders)
    return videos


def _seeded(events: Sequence[int], rng: np.random.Generator) -> tuple[tuple[int, int], ...]:
    return tuple((event, int(rng.integers(2**32))) for event in events)


def _captions(place: Place, split: str) -> RetrievalSplit:
    return msrvtt.read_split(replace(place, data_root=render_events(place.root)), split)


DATASET = DataSet(
    title="rendered by this package: the order of events decides",
    files="written with the videos",
    captions=Texts(_captions, msrvtt.SPLITS, SplitNames("train_9k", None, "test_1k", holdout=96)),
    num_frames=FRAMES // HOLD,
    root=ROOT,
    rendered=True,
    options={
        "num_frames": FRAMES // HOLD,
        "frame_cache": str(ROOT / "frames"),
        "decode_timeout": None,
        "max_words": 24,
    },
)
