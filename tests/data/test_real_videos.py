"""Real and broken files: TEMPME_VIDEOS and TEMPME_VIDEOS_ODD name folders with a manifest.jsonl each."""

import json
import os
from pathlib import Path

import numpy as np

from tempme_vl.data.jsonl import read_caption_lines
from tempme_vl.data.splits import missing_videos
from tempme_vl.data.video import Frames, VideoError, read_frames

VIDEOS, ODD = Path(os.environ["TEMPME_VIDEOS"]), Path(os.environ["TEMPME_VIDEOS_ODD"])


def result(path: Path, backend: str) -> Frames | str:
    """Frames, or the cause of the error."""
    try:
        frames = read_frames(path, 12, backend=backend, timeout=60)
    except VideoError as error:
        assert error.path == path and "did not finish" not in error.cause
        return error.cause
    assert frames.pixels.shape[0] == 12 and frames.pixels.dtype == np.uint8
    return frames


def check(path: Path) -> bool:
    """Whether the file can be read; all backends that can must agree."""
    results = [result(path, backend) for backend in ("auto", "decord", "pyav")]
    readable = [frames for frames in results if isinstance(frames, Frames)]
    for frames in readable[1:]:
        np.testing.assert_array_equal(frames.pixels, readable[0].pixels)
    assert isinstance(results[0], Frames) == bool(readable)
    return bool(readable)


def test_all_real_videos_are_read():
    split = read_caption_lines(VIDEOS / "manifest.jsonl", VIDEOS)
    assert len(split.videos) == len((VIDEOS / "manifest.jsonl").read_text().split("\n{"))
    assert missing_videos(split) == []
    assert all(check(video.path) for video in split.videos)


def test_odd_files_give_frames_or_an_error_and_none_is_lost():
    manifest = [json.loads(line) for line in (ODD / "manifest.jsonl").read_text().splitlines()]
    outcome = {entry["file"]: check(ODD / entry["file"]) for entry in manifest}
    assert len(outcome) == len(manifest)
    # Whatever decord alone could open must still be readable.
    assert all(outcome[entry["file"]] for entry in manifest if entry["decord_ok"])
