"""The detail data set: one dot in a few frames is all that tells a video from another."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from tempme_vl.data import msrvtt
from tempme_vl.data.dataset import Place
from tempme_vl.data.detail import COLUMNS, ROWS, SHOWN, DetailVideo, _draw_videos, render_detail
from tempme_vl.data.drawing import COLORS
from tempme_vl.data.rendered import HOLD, NUM_FRAMES, SIZE

CELL = SIZE // 4


def saturation(frames: np.ndarray) -> np.ndarray:
    """(T, 4, 4): how far the middle of each cell is from grey."""
    middles = frames[:, CELL // 2 :: CELL, CELL // 2 :: CELL].astype(int)
    return middles.max(-1) - middles.min(-1)


@pytest.mark.parametrize(("color", "row", "column", "first"), [("red", 0, 3, 0), ("cyan", 2, 1, 4)])
def test_one_cell_is_colored_for_a_moment(color: str, row: int, column: int, first: int) -> None:
    video = DetailVideo(color, row, column, first, seed=7)
    frames = video.frames()
    assert frames.shape == (NUM_FRAMES, SIZE, SIZE, 3) and frames.dtype == np.uint8
    colored = np.argwhere(saturation(frames) > 40)
    shown = range(HOLD * first, HOLD * (first + SHOWN))
    assert colored.tolist() == [[frame, row, column] for frame in shown]
    middle = frames[HOLD * first, CELL * row + CELL // 2, CELL * column + CELL // 2]
    assert tuple(middle) == COLORS[color]
    assert video.captions() == [f"a {color} dot at the {ROWS[row]} {COLUMNS[column]}"]


def test_the_rest_of_a_frame_says_nothing() -> None:
    """The same dots around it, wherever and whatever it is; and no two pictures have the same ones."""
    one, other = (DetailVideo(*said, seed=3).frames() for said in (("red", 0, 0, 2), ("blue", 3, 3, 2)))
    differs = (one != other).any(-1).any(0).reshape(4, CELL, 4, CELL).any((1, 3))
    assert np.argwhere(differs).tolist() == [[0, 0], [3, 3]]
    assert len({picture.tobytes() for picture in one[::HOLD]}) == NUM_FRAMES // HOLD
    assert np.array_equal(one[::HOLD], one[1::HOLD])  # rules that draw 8 of 16 frames see every picture once


def test_what_is_said_is_balanced_and_independent_of_the_time() -> None:
    videos = [video for split, video in _draw_videos(0, 4000, 96) if split == "train"]
    assert len(Counter(v.captions()[0] for v in videos)) == 96
    for said in (lambda v: v.color, lambda v: v.row, lambda v: v.column):
        counts = Counter(map(said, videos))
        assert min(counts.values()) > 0.8 * max(counts.values())
        means = [np.mean([v.first for v in videos if said(v) == value]) for value in counts]
        assert max(means) - min(means) < 0.6
    test = [video.captions()[0] for split, video in _draw_videos(0, 4000, 96) if split == "test"]
    assert len(set(test)) == len(test) == 96


def test_its_files_are_msrvtts_without_questions(tmp_path: Path) -> None:
    root = render_detail(tmp_path / "data", num_train=20, num_test=6)
    split = msrvtt.read_split(Place(root), "test_1k")
    assert len(set(split.captions)) == len(split.videos) == 6
    assert all(video.path.is_file() for video in split.videos)
    assert not list(root.glob("*_qa.json")) and len(list((root / "videos").iterdir())) == 26
    assert json.loads((root / "detail.json").read_text())["name"] == "detail"
    with pytest.raises(ValueError, match="holds the detail data set of other parameters"):
        render_detail(root, num_train=21, num_test=6)
