"""Single frames by seeking are those that reading the whole list of frames finds."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from data.video_files import write_video

pytest.importorskip("fastapi")
from tempme_vl.data.video import VideoError, read_frames
from tempme_vl.search.web import stills
from tempme_vl.search.web.stills import read_still


@pytest.mark.parametrize(
    "how",
    [
        {},
        {"options": {"g": "7", "bf": "3"}},
        {"options": {"g": "1"}},
        {"rotation": 90},
        {"shift": -3},
        {"shift": 5},
        {"times": [0, 1, 2, 9, 10, 11, 12, 13, 30, 31, 32, 33, 34, 35, 36, 60, 61, 62, 63, 64]},
        {"codec": "mpeg4", "options": {"g": "5"}},
    ],
)
def test_the_frame_of_a_time(how: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = write_video(tmp_path / "a.mp4", **how)
    monkeypatch.setattr(stills, "read_frames", None)  # which would be the way out
    times = read_frames(file, 20, sampling="uniform").times
    for time in (0.0, 0.31, 0.5, 1.04, 1.7, float(times[-1])):
        expected = read_frames(file, 1, sampling="uniform", start=time, end=time + 1e-3).pixels[0]
        assert np.array_equal(read_still(file, time), expected), time
    last = read_frames(file, 1, sampling="uniform", start=float(times[-1]), end=None).pixels[0]
    assert np.array_equal(read_still(file, 1e4), last)


def test_what_cannot_be_sought_in_is_read_whole(tmp_path: Path) -> None:
    """A raw stream has no times to seek by."""
    file = write_video(tmp_path / "a.h264", options={"g": "5"})
    expected = read_frames(file, 1, sampling="uniform", start=0.4, end=0.401).pixels[0]
    assert np.array_equal(read_still(file, 0.4), expected)


def test_a_broken_file_says_why(tmp_path: Path) -> None:
    (tmp_path / "a.mp4").write_bytes(b"no video")
    with pytest.raises(VideoError, match="Invalid data"):
        read_still(tmp_path / "a.mp4", 0)


def test_a_colon_in_a_name_is_no_protocol(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_video(tmp_path / "file:a.mp4")
    monkeypatch.chdir(tmp_path)
    assert read_still(Path("file:a.mp4"), 0).shape == (64, 96, 3)
