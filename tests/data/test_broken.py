"""Videos that are missing or cannot be read: found before a run, and accounted for in it."""

from __future__ import annotations

import os
import pickle
from pathlib import Path

import pytest

from tempme_vl.data.broken import MissingVideosError, check_videos
from tempme_vl.data.splits import Clip


def test_missing_videos_are_listed_once_and_too_many_are_an_error(tmp_path: Path) -> None:
    for name in "abcdefgh":
        (tmp_path / name).write_bytes(b"not opened")
    (tmp_path / "folder").mkdir()
    os.mkfifo(tmp_path / "fifo")  # opening it would wait for ever
    (tmp_path / "link").symlink_to(tmp_path / "a")
    (tmp_path / "nowhere").symlink_to(tmp_path / "gone")
    here = [Clip(name, tmp_path / name) for name in (*"abcdefgh", "link")]
    absent = [tmp_path / name for name in ("x", "folder", "fifo", "nowhere")]
    gone = [Clip(path.name, path) for path in absent]
    parts = [Clip("x@1", tmp_path / "x", 1.0, 2.0), Clip("a@1", tmp_path / "a", 1.0, 2.0)]
    assert check_videos(here) == []
    assert check_videos([]) == []
    assert check_videos([*gone, *here, *parts], most_missing=4 / 13) == absent
    assert check_videos(gone, most_missing=1.0) == absent
    with pytest.raises(MissingVideosError, match=r"^4 of 13 videos are missing, .*share of 0\.3 .*: \S+x, ") as caught:
        check_videos([*here, *parts, *gone], most_missing=0.3)
    assert set(caught.value.paths) == set(absent)
    assert pickle.loads(pickle.dumps(caught.value)).paths == caught.value.paths
    with pytest.raises(MissingVideosError, match="1 of 10 videos"):
        check_videos([*here, gone[0]])
    for share in (-0.1, 1.5, float("nan")):
        with pytest.raises(ValueError, match="share from 0 to 1"):
            check_videos(here, share)
