"""Videos as input: cached, augmented, and accounted for when they cannot be read."""

from __future__ import annotations

import json
import os
import pickle
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader
from video_files import different, write_video

from tempme_vl.data import reader as module
from tempme_vl.data.reader import VideoReader, broken_videos
from tempme_vl.data.retrieval import EvalVideos
from tempme_vl.data.splits import Video
from tempme_vl.data.transforms import Preprocess, VideoTransform
from tempme_vl.data.video import VideoError

SMALL = VideoTransform(Preprocess(image_size=32))


def make_reader(folder: Path, **changes: Any) -> VideoReader:
    return VideoReader(
        **{"num_frames": 4, "transform": SMALL, "timeout": None, "broken_log": folder / "broken"} | changes
    )


@pytest.fixture
def decoded(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """The files decoded so far."""
    paths: list[Path] = []
    original = module.read_frames

    def counting(path: Path, *args: Any, **named: Any) -> Any:
        paths.append(path)
        return original(path, *args, **named)

    monkeypatch.setattr(module, "read_frames", counting)
    return paths


def test_a_video_becomes_input(tmp_path: Path) -> None:
    video, real, _ = make_reader(tmp_path)(Video("a", write_video(tmp_path / "a.mp4")))
    assert real
    assert (video.shape, video.dtype) == ((4, 3, 32, 32), torch.float32)
    assert not torch.equal(video[0], video[3])


@pytest.mark.parametrize("cache", [None, "memory", "folder"])
def test_every_frame_has_its_time_in_the_video(tmp_path: Path, cache: str | None) -> None:
    shown = [0, 1, 2, 7, 8, 20, 21, 22, 23, 40, 41, 60]  # tenths of a second
    path = write_video(tmp_path / "a.mp4", 12, times=shown)
    read = make_reader(tmp_path, sampling="uniform", cache=tmp_path / "cache" if cache == "folder" else cache)
    for _ in range(2):
        whole = read(Video("whole", path))
        assert (whole.times.shape, whole.times.dtype) == ((4,), torch.float32)
        np.testing.assert_allclose(whole.times, [0.0, 0.7, 2.2, 6.0], atol=1e-6)
        # The video begins 0.2 s after the fifth frame, which is still on show.
        np.testing.assert_allclose(read(Video("one", path, 1.0, 1.5)).times, [0, 0, 0, 0], atol=1e-6)
        np.testing.assert_allclose(read(Video("part", path, 0.75, 2.25)).times, [0.05, 1.25, 1.35, 1.45], atol=1e-6)
    assert whole.valid
    none = read(Video("none", tmp_path / "none.mp4"))
    assert not none.valid and none.times.tolist() == [0, 1, 2, 3]


@pytest.mark.parametrize("place", ["memory", "folder"])
def test_cached_pixels_are_the_same_and_decoded_once(tmp_path: Path, decoded: list[Path], place: str) -> None:
    cache = "memory" if place == "memory" else tmp_path / "cache"
    whole = Video("a", write_video(tmp_path / "a.mp4"))
    part = Video("b", whole.path, start=0.5, end=1.5)
    plain, cached = make_reader(tmp_path), make_reader(tmp_path, cache=cache)
    expected = {video: plain(video)[0] for video in (whole, part)}
    assert not torch.equal(expected[whole], expected[part])
    decoded.clear()
    for _ in range(3):
        for video in (whole, part):
            assert torch.equal(cached(video)[0], expected[video])
    assert len(decoded) == 2
    if place == "folder":  # another process finds it there
        assert torch.equal(make_reader(tmp_path, cache=cache)(whole)[0], expected[whole])
        assert len(decoded) == 2
        assert not list((tmp_path / "cache").glob("*.partial"))


@pytest.mark.filterwarnings("ignore:This DataLoader will create")
def test_workers_share_the_memory_and_decode_each_video_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    videos = [Video(str(number), write_video(tmp_path / f"{number}.mp4", 5)) for number in range(8)]
    counted, original = tmp_path / "decoded.txt", module.read_frames

    def counting(path: Path, *args: Any, **named: Any) -> Any:
        with counted.open("a") as file:
            file.write(f"{path.name}\n")
        time.sleep(0.05)
        return original(path, *args, **named)

    monkeypatch.setattr(module, "read_frames", counting)
    reader = make_reader(tmp_path, cache="memory")
    often = [video for video in videos for _ in range(3)]  # several workers at once want the same
    for batch in DataLoader(EvalVideos(often, reader), batch_size=1, num_workers=4):
        assert batch["valid"].all()
    assert sorted(counted.read_text().split()) == [video.path.name for video in videos]
    epochs = [
        torch.cat([batch["video"] for batch in DataLoader(EvalVideos(videos, read), batch_size=2, num_workers=workers)])
        for read, workers in ((reader, 2), (replace(reader), 0), (pickle.loads(pickle.dumps(reader)), 0))
    ]
    assert all(torch.equal(epochs[0], other) for other in epochs[1:])
    assert sorted(counted.read_text().split()) == [video.path.name for video in videos]


def test_a_full_memory_costs_time_alone(tmp_path: Path, decoded: list[Path], caplog: pytest.LogCaptureFixture) -> None:
    videos = [Video(str(number), write_video(tmp_path / f"{number}.mp4", 5 + number)) for number in range(3)]
    cached = make_reader(tmp_path, cache="memory", cache_gib=2.5 * 4 * 32 * 32 * 3 / 2**30)
    plain = make_reader(tmp_path)
    for _ in range(2):
        for video in videos:
            assert torch.equal(cached(video)[0], plain(video)[0])
    assert len(decoded) == 6 + 4
    assert caplog.text.count("is full") == 1


def test_a_damaged_cache_file_is_decoded_again(
    tmp_path: Path, decoded: list[Path], caplog: pytest.LogCaptureFixture
) -> None:
    video = Video("a", write_video(tmp_path / "a.mp4"))
    cached = make_reader(tmp_path, cache=tmp_path / "cache")
    first = cached(video)
    (file,) = (tmp_path / "cache").glob("*.npy")
    file.write_bytes(file.read_bytes()[:-1])
    for _ in range(2):
        again = cached(video)
        assert torch.equal(again.video, first.video) and torch.equal(again.times, first.times)
    assert len(decoded) == 2 and str(file) in caplog.text


def test_cache_tells_files_of_one_size_and_segments_of_one_start_apart(tmp_path: Path) -> None:
    path, longer = (write_video(tmp_path / name, num_frames) for name, num_frames in (("a.mp4", 20), ("b.mp4", 40)))
    missing = longer.stat().st_size - path.stat().st_size
    path.write_bytes(path.read_bytes() + missing.to_bytes(4, "big") + b"free" + bytes(missing - 8))
    cached = make_reader(tmp_path, cache="memory")
    first = cached(Video("a", path))[0]
    path.write_bytes(longer.read_bytes())
    os.utime(path, ns=(1, 1))
    whole, part = cached(Video("a", path)), cached(Video("a", path, None, 2.0))
    assert not torch.equal(whole[0], first) and whole.times[-1] > 2 > part.times[-1]
    assert torch.equal(part[0], make_reader(tmp_path)(Video("a", path, None, 2.0))[0])


@pytest.mark.parametrize("place", ["memory", "folder"])
def test_cache_notices_a_changed_file_and_other_settings(tmp_path: Path, decoded: list[Path], place: str) -> None:
    cache = "memory" if place == "memory" else tmp_path / "cache"
    video = Video("a", write_video(tmp_path / "a.mp4"))
    cached = make_reader(tmp_path, cache=cache)
    before = cached(video)[0]
    write_video(video.path, num_frames=30, fps=5)
    os.utime(video.path, ns=(1, 1))
    after = cached(video)[0]
    assert not torch.equal(before, after)
    assert torch.equal(after, make_reader(tmp_path)(video)[0])
    for changes in (
        {"num_frames": 3},
        {"sampling": "uniform"},
        {"transform": VideoTransform(Preprocess(image_size=16))},
        {"transform": VideoTransform(Preprocess(image_size=32, resize="squash"))},
        {"transform": VideoTransform(Preprocess(image_size=32, interpolation="bilinear"))},
    ):
        other = replace(cached, **changes)
        assert torch.equal(other(video)[0], make_reader(tmp_path, **changes)(video)[0])


def test_augmentation_comes_after_the_cache_and_random_frames_bypass_it(tmp_path: Path, decoded: list[Path]) -> None:
    video = Video("a", write_video(tmp_path / "a.mp4"))
    augmented = {"transform": VideoTransform(SMALL.preprocess, "randaugment")}
    cached, plain = make_reader(tmp_path, cache="memory", **augmented), make_reader(tmp_path, **augmented)
    outputs = []
    for seed in range(3):
        outputs.append(cached(video, np.random.default_rng(seed))[0])
        assert torch.equal(outputs[-1], plain(video, np.random.default_rng(seed))[0])
    assert different(outputs) == 3
    assert len(decoded) == 1 + 3

    segments, plain = (make_reader(tmp_path, cache=cache, sampling="segment") for cache in ("memory", None))
    outputs = [segments(video, np.random.default_rng(seed))[0] for seed in range(4)]
    assert different(outputs) == 4
    for seed, output in enumerate(outputs):
        assert torch.equal(output, plain(video, np.random.default_rng(seed))[0])
    assert torch.equal(segments(video)[0], segments(video)[0])
    assert torch.equal(segments(video)[0], plain(video)[0])


def test_a_broken_video_is_recorded_once_a_process(tmp_path: Path) -> None:
    broken, missing = tmp_path / "broken.mp4", tmp_path / "missing.mp4"
    broken.write_bytes(b"no video")
    log = tmp_path / "logs" / "broken.jsonl"
    for cache in (None, "memory"):
        read = make_reader(tmp_path, broken_log=log, cache=cache)
        for _ in range(3):
            for video in (Video("b", broken), Video("m", missing)):
                frames, real, _ = read(video)
                assert not real
                assert (frames.shape, frames.dtype) == ((4, 3, 32, 32), torch.float32)
                assert not frames.any()
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    assert [line["video_id"] for line in lines] == ["b", "m", "b", "m"]  # two readers, as two processes
    assert {line["path"] for line in lines} == {str(broken), str(missing)}
    found = broken_videos(log)
    assert found.keys() == {"b", "m"}
    assert all(found.values())
    assert broken_videos(tmp_path / "none.jsonl") == {}


@pytest.mark.parametrize("cache", [None, "memory"])
def test_a_repaired_video_leaves_the_list(tmp_path: Path, cache: str | None) -> None:
    broken = Video("b", tmp_path / "b.mp4")
    read = make_reader(tmp_path, cache=cache)
    assert not read(broken).valid
    assert list(broken_videos(tmp_path / "broken")) == ["b"]
    write_video(broken.path)
    assert read(broken).valid and read(broken).valid
    assert broken_videos(tmp_path / "broken") == {}
    broken.path.unlink()
    assert not read(broken).valid
    assert list(broken_videos(tmp_path / "broken")) == ["b"]


def test_the_backend_and_the_memory_are_the_readers_choice(tmp_path: Path) -> None:
    video = Video("a", write_video(tmp_path / "a.avi", 60, options={"g": "8"}))  # decord finds no timestamps in it
    expected = make_reader(tmp_path)(video).video
    assert torch.equal(make_reader(tmp_path, backend="pyav")(video).video, expected)
    assert not make_reader(tmp_path, backend="decord")(video).valid
    for augment in ("none", "crop_flip"):
        small = make_reader(
            tmp_path, memory_gib=5e-5, on_broken="raise", transform=replace(SMALL, augment=augment), timeout=60
        )
        with pytest.raises(VideoError, match=r"a\.avi: .*96 x 64 pixels .* are allowed"):
            small(video, np.random.default_rng(0))


def test_a_broken_video_is_an_error_by_choice(tmp_path: Path) -> None:
    (tmp_path / "b.mp4").write_bytes(b"no video")
    read = make_reader(tmp_path, on_broken="raise", broken_log=None)
    with pytest.raises(VideoError, match=r"b\.mp4: "):
        read(Video("b", tmp_path / "b.mp4"))


def test_wrong_settings(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="'raise' or 'record'; got 'ignore'"):
        make_reader(tmp_path, on_broken="ignore")
    with pytest.raises(ValueError, match="needs a broken_log"):
        make_reader(tmp_path, broken_log=None)
    with pytest.raises(ValueError, match="unknown backend 'opencv'; known: auto, decord, pyav"):
        make_reader(tmp_path, backend="opencv")
    for wrong in ({"cache_gib": 0.0}, {"memory_gib": -1.0}):
        with pytest.raises(ValueError, match="must be positive"):
            make_reader(tmp_path, **wrong)
