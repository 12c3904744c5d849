"""Parts of a file: the same frames as one by one, listed once and decoded once."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from data.video_files import write_video

from tempme_vl.data import decoder
from tempme_vl.data import parts as reading
from tempme_vl.data.decoder import ShortStream
from tempme_vl.data.parts import Part, read_parts
from tempme_vl.data.pictures import Fit
from tempme_vl.data.video import VideoError, read_frames

PARTS = [Part(0.0, 2.0), Part(1.0, 3.0), Part(2.5, 4.0)]


@pytest.fixture(scope="module")
def video(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_video(tmp_path_factory.mktemp("parts") / "a.mp4", 40)


@pytest.mark.parametrize("at_once", [1, 2, 16])
@pytest.mark.parametrize("timeout", [None, 60.0])
def test_parts_are_what_reading_each_gives(
    at_once: int, timeout: float | None, video: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reading, "PARTS_AT_ONCE", at_once)
    fit = Fit(32, "shortest", "bicubic")
    groups = list(read_parts(video, 6, lambda duration: PARTS, sampling="uniform", timeout=timeout, fit=fit))
    assert [len(group.parts) for group in groups] == {1: [1, 1, 1], 2: [2, 1], 16: [3]}[at_once]
    assert [group.last for group in groups] == [False] * (len(groups) - 1) + [True]
    assert all(group.duration == pytest.approx(4.0) for group in groups)
    for part, frames in zip(PARTS, (frames for group in groups for frames in group.frames), strict=True):
        alone = read_frames(video, 6, sampling="uniform", start=part.start, end=part.end, fit=fit)
        np.testing.assert_array_equal(frames.pixels, alone.pixels)
        np.testing.assert_array_equal(frames.indices, alone.indices)
        np.testing.assert_array_equal(frames.times, alone.times)


def test_a_file_is_listed_once_and_a_frame_is_decoded_once(video: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: Counter[str] = Counter()
    wanted: list[int] = []

    def counted(name: str):
        def call(**arguments: object) -> decoder.Answer:
            calls[name] += 1
            wanted.extend(arguments.get("indices", ()))
            return handler(**arguments)

        handler = decoder.HANDLERS[name]
        return call

    monkeypatch.setattr(decoder, "HANDLERS", {name: counted(name) for name in decoder.HANDLERS})
    (group,) = read_parts(video, 20, lambda duration: PARTS, sampling="uniform", timeout=None)
    assert calls == {"index": 1, "frames": 1} and len(group.frames) == 3
    assert len(wanted) == len(set(wanted)) < sum(len(set(frames.indices)) for frames in group.frames)


def test_a_stream_without_the_frames_of_its_packets_is_listed_anew(
    video: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As where packets hold no frame of their own; the file ends earlier than they say."""
    index, frames = decoder.HANDLERS["index"], decoder.HANDLERS["frames"]
    tried: list[bool] = []

    def listed(exact: bool, **arguments: object) -> decoder.Answer:
        tried.append(exact)
        info, rows = index(exact=exact, **arguments)
        return info, rows[:, :30] if exact else rows

    def taken(num_raw: int, **arguments: object) -> decoder.Answer:
        if num_raw > 30:
            raise ShortStream("fewer frames")
        return frames(num_raw=40, **arguments)

    monkeypatch.setattr(decoder, "HANDLERS", {"index": listed, "frames": taken})
    plan = [Part(0.0, 2.0), Part(1.0, 3.5), Part(3.0, 4.0)]
    (group,) = read_parts(video, 4, lambda duration: plan, sampling="uniform", timeout=None)
    assert tried == [False, True] and group.last
    assert group.parts == (Part(0.0, 2.0), Part(1.0, pytest.approx(3.0)))
    assert [frames.indices.tolist() for frames in group.frames] == [[0, 6, 12, 19], [10, 16, 22, 29]]


def test_a_broken_file_is_an_error_that_names_it(tmp_path: Path) -> None:
    (tmp_path / "broken.mp4").write_bytes(b"not a video")
    for name, cause in (("broken.mp4", "Invalid data"), ("none.mp4", "No such file")):
        with pytest.raises(VideoError, match=rf"{name}: {cause}"):
            list(read_parts(tmp_path / name, 4, lambda duration: PARTS))


def test_the_limit_grows_with_the_place_in_the_file(video: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reading, "PARTS_AT_ONCE", 1)
    monkeypatch.setattr(reading, "LIMITED_SECONDS", 2.0)
    limits = []
    monkeypatch.setattr(reading, "_deadline", lambda seconds: limits.append(seconds))
    list(read_parts(video, 4, lambda duration: PARTS, timeout=10.0))
    assert limits == [10.0, 10.0, 20.0, 20.0]
