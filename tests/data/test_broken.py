"""Videos that are missing or cannot be read: found before a run, and accounted for in it."""

from __future__ import annotations

import json
import logging
import os
import pickle
import resource
from pathlib import Path

import pytest

from tempme_vl.data.broken import BrokenLog, MissingVideosError, broken_videos, check_videos
from tempme_vl.data.splits import Video


def test_missing_videos_are_listed_once_and_too_many_are_an_error(tmp_path: Path) -> None:
    for name in "abcdefgh":
        (tmp_path / name).write_bytes(b"not opened")
    (tmp_path / "folder").mkdir()
    os.mkfifo(tmp_path / "fifo")  # opening it would wait for ever
    (tmp_path / "link").symlink_to(tmp_path / "a")
    (tmp_path / "nowhere").symlink_to(tmp_path / "gone")
    here = [Video(name, tmp_path / name) for name in (*"abcdefgh", "link")]
    absent = [tmp_path / name for name in ("x", "folder", "fifo", "nowhere")]
    gone = [Video(path.name, path) for path in absent]
    parts = [Video("x@1", tmp_path / "x", 1.0, 2.0), Video("a@1", tmp_path / "a", 1.0, 2.0)]
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


A, B, C = (Video(name, Path(f"{name}.mp4")) for name in "abc")


def test_what_can_be_read_again_leaves_the_list_whichever_process_reads_it(tmp_path: Path) -> None:
    path = tmp_path / "runs" / "broken.jsonl"
    one, other = BrokenLog(path), BrokenLog(path)  # as two processes
    one.remove(A)
    assert not path.exists()
    one.add(A, "cut")
    one.add(A, "cut")
    one.add(B, "empty")
    assert broken_videos(path) == {"a": "cut", "b": "empty"}
    other.remove(C)
    other.remove(A)
    other.remove(A)
    assert broken_videos(path) == {"b": "empty"}
    one.add(A, "cut again")  # it broke once more
    assert broken_videos(path) == {"b": "empty", "a": "cut again"}
    one.remove(A)
    BrokenLog(path).remove(B)  # a run that goes on
    assert broken_videos(path) == {}
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert [(line["video_id"], line.get("cause"), line.get("repaired")) for line in lines] == [
        ("a", "cut", None),
        ("b", "empty", None),
        ("a", None, True),
        ("a", "cut again", None),
        ("a", None, True),
        ("b", None, True),
    ]


def test_a_line_that_is_cut_off_costs_that_line_alone(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "broken.jsonl"
    for video in (A, B):
        BrokenLog(path).add(video, "cut")
    whole = path.read_bytes()
    last = len(whole.splitlines()[-1])
    for length in range(len(whole) - last, len(whole) - 1):
        path.write_bytes(whole[:length])
        caplog.clear()
        assert broken_videos(path) == {"a": "cut"}
        warned = [record for record in caplog.records if record.levelno == logging.WARNING]
        assert len(warned) == 1 and f"{path}, line 2" in caplog.text
        BrokenLog(path).add(C, "empty")  # the next line is whole again
        assert broken_videos(path) == {"a": "cut", "c": "empty"}
    for damage in (b"[]\n", b"{}\n", b"null\n", b"\xff\xfe\n", b'{"video_id": ["a"], "cause": "x"}\n', b"\x00\x00"):
        path.write_bytes(damage + b"\n" + whole)
        assert broken_videos(path) == {"a": "cut", "b": "cut"}


def test_a_full_disk_is_an_error_that_names_the_log_and_the_video(tmp_path: Path) -> None:
    path = tmp_path / "broken.jsonl"
    BrokenLog(path).add(A, "cut")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (path.stat().st_size + 5, limits[1]))
    try:
        with pytest.raises(OSError, match=r"listing b\.mp4: .*broken\.jsonl"):
            BrokenLog(path).add(B, "cut")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert broken_videos(path) == {"a": "cut"}
