"""Clips as input: cached, augmented, and accounted for when they cannot be read."""

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
from clips import different, write_clip
from torch.utils.data import DataLoader

from tempme_vl.data import reader as module
from tempme_vl.data.reader import ClipReader, broken_clips
from tempme_vl.data.retrieval import EvalClips
from tempme_vl.data.splits import Clip
from tempme_vl.data.transforms import ClipTransform, Preprocess
from tempme_vl.data.video import VideoError

SMALL = ClipTransform(Preprocess(image_size=32))


def make_reader(folder: Path, **changes: Any) -> ClipReader:
    return ClipReader(
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


def test_a_clip_becomes_input(tmp_path: Path) -> None:
    video, real, _ = make_reader(tmp_path)(Clip("a", write_clip(tmp_path / "a.mp4")))
    assert real
    assert (video.shape, video.dtype) == ((4, 3, 32, 32), torch.float32)
    assert not torch.equal(video[0], video[3])


@pytest.mark.parametrize("cache", [None, "memory", "folder"])
def test_every_frame_has_its_time_in_the_clip(tmp_path: Path, cache: str | None) -> None:
    shown = [0, 1, 2, 7, 8, 20, 21, 22, 23, 40, 41, 60]  # tenths of a second
    path = write_clip(tmp_path / "a.mp4", 12, times=shown)
    read = make_reader(tmp_path, sampling="uniform", cache=tmp_path / "cache" if cache == "folder" else cache)
    for _ in range(2):
        whole = read(Clip("whole", path))
        assert (whole.times.shape, whole.times.dtype) == ((4,), torch.float32)
        np.testing.assert_allclose(whole.times, [0.0, 0.7, 2.2, 6.0], atol=1e-6)
        # The clip begins 0.2 s after the fifth frame, which is still on show.
        np.testing.assert_allclose(read(Clip("one", path, 1.0, 1.5)).times, [0, 0, 0, 0], atol=1e-6)
        np.testing.assert_allclose(read(Clip("part", path, 0.75, 2.25)).times, [0.05, 1.25, 1.35, 1.45], atol=1e-6)
    assert whole.valid
    none = read(Clip("none", tmp_path / "none.mp4"))
    assert not none.valid and none.times.tolist() == [0, 1, 2, 3]


@pytest.mark.parametrize("place", ["memory", "folder"])
def test_cached_pixels_are_the_same_and_decoded_once(tmp_path: Path, decoded: list[Path], place: str) -> None:
    cache = "memory" if place == "memory" else tmp_path / "cache"
    whole = Clip("a", write_clip(tmp_path / "a.mp4"))
    part = Clip("b", whole.path, start=0.5, end=1.5)
    plain, cached = make_reader(tmp_path), make_reader(tmp_path, cache=cache)
    expected = {clip: plain(clip)[0] for clip in (whole, part)}
    assert not torch.equal(expected[whole], expected[part])
    decoded.clear()
    for _ in range(3):
        for clip in (whole, part):
            assert torch.equal(cached(clip)[0], expected[clip])
    assert len(decoded) == 2
    if place == "folder":  # another process finds it there
        assert torch.equal(make_reader(tmp_path, cache=cache)(whole)[0], expected[whole])
        assert len(decoded) == 2
        assert not list((tmp_path / "cache").glob("*.partial"))


@pytest.mark.filterwarnings("ignore:This DataLoader will create")
def test_workers_share_the_memory_and_decode_each_clip_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clips = [Clip(str(number), write_clip(tmp_path / f"{number}.mp4", 5)) for number in range(8)]
    counted, original = tmp_path / "decoded.txt", module.read_frames

    def counting(path: Path, *args: Any, **named: Any) -> Any:
        with counted.open("a") as file:
            file.write(f"{path.name}\n")
        time.sleep(0.05)
        return original(path, *args, **named)

    monkeypatch.setattr(module, "read_frames", counting)
    reader = make_reader(tmp_path, cache="memory")
    often = [clip for clip in clips for _ in range(3)]  # several workers at once want the same
    for batch in DataLoader(EvalClips(often, reader), batch_size=1, num_workers=4):
        assert batch["valid"].all()
    assert sorted(counted.read_text().split()) == [clip.path.name for clip in clips]
    epochs = [
        torch.cat([batch["video"] for batch in DataLoader(EvalClips(clips, read), batch_size=2, num_workers=workers)])
        for read, workers in ((reader, 2), (replace(reader), 0), (pickle.loads(pickle.dumps(reader)), 0))
    ]
    assert all(torch.equal(epochs[0], other) for other in epochs[1:])
    assert sorted(counted.read_text().split()) == [clip.path.name for clip in clips]


def test_a_full_memory_costs_time_alone(tmp_path: Path, decoded: list[Path], caplog: pytest.LogCaptureFixture) -> None:
    clips = [Clip(str(number), write_clip(tmp_path / f"{number}.mp4", 5 + number)) for number in range(3)]
    cached = make_reader(tmp_path, cache="memory", cache_gib=2.5 * 4 * 32 * 32 * 3 / 2**30)
    plain = make_reader(tmp_path)
    for _ in range(2):
        for clip in clips:
            assert torch.equal(cached(clip)[0], plain(clip)[0])
    assert len(decoded) == 6 + 4
    assert caplog.text.count("is full") == 1


def test_a_damaged_cache_file_is_decoded_again(
    tmp_path: Path, decoded: list[Path], caplog: pytest.LogCaptureFixture
) -> None:
    clip = Clip("a", write_clip(tmp_path / "a.mp4"))
    cached = make_reader(tmp_path, cache=tmp_path / "cache")
    first = cached(clip)
    (file,) = (tmp_path / "cache").glob("*.npy")
    file.write_bytes(file.read_bytes()[:-1])
    for _ in range(2):
        again = cached(clip)
        assert torch.equal(again.video, first.video) and torch.equal(again.times, first.times)
    assert len(decoded) == 2 and str(file) in caplog.text


def test_cache_tells_files_of_one_size_and_segments_of_one_start_apart(tmp_path: Path) -> None:
    path, longer = (write_clip(tmp_path / name, num_frames) for name, num_frames in (("a.mp4", 20), ("b.mp4", 40)))
    missing = longer.stat().st_size - path.stat().st_size
    path.write_bytes(path.read_bytes() + missing.to_bytes(4, "big") + b"free" + bytes(missing - 8))
    cached = make_reader(tmp_path, cache="memory")
    first = cached(Clip("a", path))[0]
    path.write_bytes(longer.read_bytes())
    os.utime(path, ns=(1, 1))
    whole, part = cached(Clip("a", path)), cached(Clip("a", path, None, 2.0))
    assert not torch.equal(whole[0], first) and whole.times[-1] > 2 > part.times[-1]
    assert torch.equal(part[0], make_reader(tmp_path)(Clip("a", path, None, 2.0))[0])


@pytest.mark.parametrize("place", ["memory", "folder"])
def test_cache_notices_a_changed_file_and_other_settings(tmp_path: Path, decoded: list[Path], place: str) -> None:
    cache = "memory" if place == "memory" else tmp_path / "cache"
    clip = Clip("a", write_clip(tmp_path / "a.mp4"))
    cached = make_reader(tmp_path, cache=cache)
    before = cached(clip)[0]
    write_clip(clip.path, num_frames=30, fps=5)
    os.utime(clip.path, ns=(1, 1))
    after = cached(clip)[0]
    assert not torch.equal(before, after)
    assert torch.equal(after, make_reader(tmp_path)(clip)[0])
    for changes in (
        {"num_frames": 3},
        {"sampling": "uniform"},
        {"transform": ClipTransform(Preprocess(image_size=16))},
        {"transform": ClipTransform(Preprocess(image_size=32, resize="squash"))},
        {"transform": ClipTransform(Preprocess(image_size=32, interpolation="bilinear"))},
    ):
        other = replace(cached, **changes)
        assert torch.equal(other(clip)[0], make_reader(tmp_path, **changes)(clip)[0])


def test_augmentation_comes_after_the_cache_and_random_frames_bypass_it(tmp_path: Path, decoded: list[Path]) -> None:
    clip = Clip("a", write_clip(tmp_path / "a.mp4"))
    augmented = {"transform": ClipTransform(SMALL.preprocess, "randaugment")}
    cached, plain = make_reader(tmp_path, cache="memory", **augmented), make_reader(tmp_path, **augmented)
    outputs = []
    for seed in range(3):
        video = cached(clip, np.random.default_rng(seed))[0]
        assert torch.equal(video, plain(clip, np.random.default_rng(seed))[0])
        outputs.append(video)
    assert different(outputs) == 3
    assert len(decoded) == 1 + 3

    segments, plain = (make_reader(tmp_path, cache=cache, sampling="segment") for cache in ("memory", None))
    videos = [segments(clip, np.random.default_rng(seed))[0] for seed in range(4)]
    assert different(videos) == 4
    for seed, video in enumerate(videos):
        assert torch.equal(video, plain(clip, np.random.default_rng(seed))[0])
    assert torch.equal(segments(clip)[0], segments(clip)[0])
    assert torch.equal(segments(clip)[0], plain(clip)[0])


def test_a_broken_clip_is_recorded_once_a_process(tmp_path: Path) -> None:
    broken, missing = tmp_path / "broken.mp4", tmp_path / "missing.mp4"
    broken.write_bytes(b"no video")
    log = tmp_path / "logs" / "broken.jsonl"
    for cache in (None, "memory"):
        read = make_reader(tmp_path, broken_log=log, cache=cache)
        for _ in range(3):
            for clip in (Clip("b", broken), Clip("m", missing)):
                video, real, _ = read(clip)
                assert not real
                assert (video.shape, video.dtype) == ((4, 3, 32, 32), torch.float32)
                assert not video.any()
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    assert [line["video_id"] for line in lines] == ["b", "m", "b", "m"]  # two readers, as two processes
    assert {line["path"] for line in lines} == {str(broken), str(missing)}
    found = broken_clips(log)
    assert found.keys() == {"b", "m"}
    assert all(found.values())
    assert broken_clips(tmp_path / "none.jsonl") == {}


@pytest.mark.parametrize("cache", [None, "memory"])
def test_a_repaired_clip_leaves_the_list(tmp_path: Path, cache: str | None) -> None:
    broken = Clip("b", tmp_path / "b.mp4")
    read = make_reader(tmp_path, cache=cache)
    assert not read(broken).valid
    assert list(broken_clips(tmp_path / "broken")) == ["b"]
    write_clip(broken.path)
    assert read(broken).valid and read(broken).valid
    assert broken_clips(tmp_path / "broken") == {}
    broken.path.unlink()
    assert not read(broken).valid
    assert list(broken_clips(tmp_path / "broken")) == ["b"]


def test_the_backend_and_the_memory_are_the_readers_choice(tmp_path: Path) -> None:
    clip = Clip("a", write_clip(tmp_path / "a.avi", 60, options={"g": "8"}))  # decord finds no timestamps in it
    expected = make_reader(tmp_path)(clip).video
    assert torch.equal(make_reader(tmp_path, backend="pyav")(clip).video, expected)
    assert not make_reader(tmp_path, backend="decord")(clip).valid
    for augment in ("none", "crop_flip"):
        small = make_reader(
            tmp_path, memory_gib=5e-5, on_broken="raise", transform=replace(SMALL, augment=augment), timeout=60
        )
        with pytest.raises(VideoError, match=r"a\.avi: .*96 x 64 pixels .* are allowed"):
            small(clip, np.random.default_rng(0))


def test_a_broken_clip_is_an_error_by_choice(tmp_path: Path) -> None:
    (tmp_path / "b.mp4").write_bytes(b"no video")
    read = make_reader(tmp_path, on_broken="raise", broken_log=None)
    with pytest.raises(VideoError, match=r"b\.mp4: "):
        read(Clip("b", tmp_path / "b.mp4"))


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
