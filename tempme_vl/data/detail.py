"""The embedded data set "detail": what a video says is in one patch of a few of its frames.

Every frame is a 4 x 4 field of small dots, grey ones of a brightness of their own that changes from picture to picture.
In some neighbouring pictures one of them has a color; which color, and where, is all that the caption says. Nothing
moves and no order counts, so looking at frames one by one is enough, but a token that is dropped or blurred may be the
only one that matters. The files are those of motion, MSRVTT's, without questions.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import ClassVar

import numpy as np

from tempme_vl.data import msrvtt
from tempme_vl.data.dataset import DataSet, Place, SplitNames, Texts
from tempme_vl.data.drawing import COLORS
from tempme_vl.data.rendered import HOLD, NUM_PICTURES, SIZE, Entry, Rendering, meanings, render
from tempme_vl.data.splits import RetrievalSplit

VERSION = 1  # raise it with every change to what is rendered or written
ROOT = Path("runs/detail-data")

ROWS = ("top", "upper", "lower", "bottom")
COLUMNS = ("far left", "left", "right", "far right")
CELL = SIZE // len(ROWS)  # pixels; a patch of the tiny towers
RADIUS = 6.0
BACKGROUND = (4, 4, 4)
GREYS = (70, 190)  # of the other dots, as dark and as bright as colors are
SHOWN = 4  # pictures of the eight


@dataclass(frozen=True)
class DetailVideo:
    """A colored dot among grey ones.

    Attributes:
        row, column: its cell.
        first: the first of the `SHOWN` pictures that it is colored in.
        seed: of the other dots.
    """

    color: str
    row: int
    column: int
    first: int
    seed: int
    category: ClassVar[int] = 0

    def frames(self) -> np.ndarray:
        grey = np.random.default_rng(self.seed).integers(*GREYS, size=(NUM_PICTURES, len(ROWS), len(COLUMNS), 1))
        dots = np.repeat(grey, 3, axis=-1)
        dots[self.first : self.first + SHOWN, self.row, self.column] = COLORS[self.color]
        color = dots.repeat(CELL, axis=1).repeat(CELL, axis=2)
        offset = np.arange(SIZE) % CELL - (CELL - 1) / 2
        distance = np.hypot(offset[:, None], offset) - RADIUS
        # One pixel of linear fall-off around the outline is the anti-aliasing.
        coverage = np.clip(0.5 - distance, 0.0, 1.0)[..., None]
        pictures = np.rint(BACKGROUND + coverage * (color - np.array(BACKGROUND))).astype(np.uint8)
        return pictures.repeat(HOLD, axis=0)

    def captions(self) -> list[str]:
        return [f"a {self.color} dot at the {ROWS[self.row]} {COLUMNS[self.column]}"]

    def questions(self, rng: np.random.Generator) -> list[tuple[str, str]]:
        return []


def render_detail(root: str | Path, *, seed: int = 0, num_train: int = 6000, num_test: int = 96) -> Path:
    """Render the data set under `root`, unless it is there already, and return `root`; see `rendered.render`.

    Args:
        root: a new or empty folder, or one that an earlier call made.
        num_train: videos in MSRVTT_train.9k.csv.
        num_test: videos in MSRVTT_JSFUSION_test.csv, one per caption; all captions differ, so 96 at most.

    Raises:
        ValueError: on impossible numbers, a folder of other parameters, or a folder that is not of this kind.
    """
    draw = partial(_draw_videos, seed, num_train, num_test)
    return render(root, Rendering("detail", VERSION, seed, num_train, num_test), draw)


def _draw_videos(seed: int, num_train: int, num_test: int) -> Sequence[Entry]:
    rng = np.random.default_rng([seed, 0])
    combinations = list(itertools.product(COLORS, range(len(ROWS)), range(len(COLUMNS))))
    parts = zip(("train", "validate", "test"), meanings(rng, combinations, num_train, num_test), strict=True)
    last = NUM_PICTURES - SHOWN + 1
    return [
        (split, DetailVideo(color, row, column, int(rng.integers(last)), int(rng.integers(2**32))))
        for split, part in parts
        for color, row, column in part
    ]


def _captions(place: Place, split: str) -> RetrievalSplit:
    return msrvtt.read_split(replace(place, data_root=render_detail(place.root)), split)


DATASET = DataSet(
    title="rendered by this package: small things decide",
    files="written with the videos",
    captions=Texts(_captions, msrvtt.SPLITS, SplitNames("train_9k", None, "test_1k", holdout=96)),
    root=ROOT,
    rendered=True,
    options={"frame_cache": str(ROOT / "frames"), "decode_timeout": None, "max_words": 12},
)
