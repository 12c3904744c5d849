"""`tempme-vl cache build`: what it keeps is what is read, and whatever happens a second start completes it."""

from __future__ import annotations

import logging
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from data.video_files import write_video

from tempme_vl import cli
from tempme_vl.data import reader as reading
from tempme_vl.data.frame_cache import FrameCache
from tempme_vl.data.frame_files import pack, unpack
from tempme_vl.data.reader import VideoReader
from tempme_vl.data.splits import Video
from tempme_vl.data.transforms import Preprocess, VideoTransform

NAMES = ("a.mp4", "b.mkv", "below/c.mov", "d.mp4")
SIZE = len(pack(np.zeros((4, 32, 32, 3), np.uint8), np.zeros(4)))


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    """Takes back that commands log to the screen."""
    logger = logging.getLogger("tempme_vl")
    before = list(logger.handlers), logger.level
    yield
    logger.handlers[:], logger.level = before


@pytest.fixture
def videos(tmp_path: Path) -> Path:
    folder = tmp_path / "videos"
    (folder / "below").mkdir(parents=True)
    for number, name in enumerate(NAMES):
        write_video(folder / name, 10 + number)
    (folder / "broken.mp4").write_bytes(b"no video")
    (folder / "notes.txt").write_text("not a video")
    return folder


def build(capsys: pytest.CaptureFixture[str], videos: Path, cache: Path, *more: str) -> str:
    """The first line that it prints, without the time."""
    shape = ("--num-frames", "4", "--image-size", "32", "--decode-timeout", "none", "--workers", "0")
    cli.main(["cache", "build", "--videos", str(videos), "--frame-cache", str(cache), *shape, *more])
    lines = capsys.readouterr().out.splitlines()
    assert lines[2].startswith("could not read broken.mp4: ") if len(lines) > 2 else "room" in lines[0]
    return lines[0].partition(": ")[2]


def kept(cache: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in cache.iterdir() if file.suffix in (".npy", ".jpegs")}


def reader(cache: Path | None, **options: Any) -> VideoReader:
    transform = VideoTransform(Preprocess(32))
    return VideoReader(4, transform, timeout=None, cache=cache, on_broken="raise", **options)


def test_what_is_built_is_what_is_read(
    videos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert build(capsys, videos, tmp_path / "cache", "--workers", "2") == "4 decoded and kept, 1 unreadable"
    expected = [reader(None)(Video(name, videos / name)) for name in NAMES]
    monkeypatch.setattr(reading, "read_frames", lambda *args, **named: pytest.fail("it is decoded again"))
    for name, (pixels, _, times) in zip(NAMES, expected, strict=True):
        found = reader(tmp_path / "cache")(Video(name, videos / name))
        assert found.video.equal(pixels) and found.times.equal(times)


def test_a_second_start_makes_what_is_damaged_or_changed(
    videos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    cache = tmp_path / "cache"
    build(capsys, videos, cache)
    whole = kept(cache)
    assert build(capsys, videos, cache) == "4 there already, 1 unreadable"
    cut, flipped, *_ = sorted(whole)
    (cache / cut).write_bytes(whole[cut][:1000])
    (cache / flipped).write_bytes(whole[flipped][:999] + bytes([whole[flipped][999] ^ 4]) + whole[flipped][1000:])
    assert build(capsys, videos, cache) == "2 decoded and kept, 2 there already, 1 unreadable"
    assert caplog.text.count("is damaged") == 2
    assert kept(cache) == whole
    write_video(videos / "d.mp4", 20)
    assert build(capsys, videos, cache) == "1 decoded and kept, 3 there already, 1 unreadable"
    assert build(capsys, videos, cache, "--sampling", "uniform").startswith("4 decoded and kept")


class ReplaceOnce:
    """`Path.replace` once; then the process is killed, where the next file lies written and its bytes counted."""

    def __init__(self) -> None:
        self.done = False

    def __get__(self, path: Path, kind: type[Path]) -> Any:
        def replace(target: Path) -> None:
            if self.done:
                os.kill(os.getpid(), signal.SIGKILL)
            self.done = True
            os.replace(path, target)

        return replace


@pytest.mark.parametrize("limit", [(), ("--most-gib", str(4.5 * SIZE / 2**30))])
def test_killed_at_any_point_it_completes_the_same_cache(
    videos: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    limit: tuple[str, ...],
) -> None:
    build(capsys, videos, tmp_path / "whole")
    cache = tmp_path / "cache"
    for point in range(3):
        child = os.fork()
        if child == 0:
            monkeypatch.setattr(Path, "replace", ReplaceOnce())
            build(capsys, videos, cache, *limit)
            os._exit(1)
        assert os.waitpid(child, 0)[1] == signal.SIGKILL
        assert len(kept(cache)) == point + 1 and len(list(cache.glob("*.partial"))) == 1
    build(capsys, videos, cache, *limit)
    assert kept(cache) == kept(tmp_path / "whole")
    assert not list(cache.glob("*.partial"))


def test_what_another_process_writes_is_left_alone(tmp_path: Path) -> None:
    cache = FrameCache(tmp_path)
    original = Path.replace
    seen: list[bool] = []

    def replace(self: Path, target: Path) -> Path:
        child = os.fork()
        if child == 0:
            FrameCache(tmp_path).tidy()
            os._exit(0)
        os.waitpid(child, 0)
        seen.append(self.exists())
        return original(self, target)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Path, "replace", replace)
        assert cache.put("a", np.zeros((1, 2, 2, 3), np.uint8), np.zeros(1))
    assert seen == [True]


def test_the_limit_holds_and_more_can_be_allowed(
    videos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cache = tmp_path / "cache"
    for _ in range(2):
        told = build(capsys, videos, cache, "--most-gib", str(2.5 * SIZE / 2**30))
        assert "2 left out, since there is no room" in told and len(kept(cache)) == 2
    told = build(capsys, videos, cache, "--most-gib", str(4 * SIZE / 2**30))
    assert told == "2 decoded and kept, 2 there already, 1 unreadable"


def test_jpeg_is_small_near_and_said_to_be_jpeg(
    videos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    cache = tmp_path / "cache"
    build(capsys, videos, cache, "--form", "jpeg", "--quality", "95")
    files = kept(cache)
    assert len(files) == 4 and max(map(len, files.values())) < SIZE / 2
    assert build(capsys, videos, cache, "--form", "jpeg") == "4 there already, 1 unreadable"
    assert "holds frames as JPEG" in caplog.text
    expected, found = (reader(folder)(Video("a", videos / "a.mp4")) for folder in (None, cache))
    difference = (expected.video - found.video).abs()
    assert 0 < difference.mean() < 0.05 and found.times.equal(expected.times)
    build(capsys, videos, tmp_path / "rough", "--form", "jpeg", "--quality", "30")
    rough = reader(tmp_path / "rough")(Video("a", videos / "a.mp4"))
    assert (expected.video - rough.video).abs().mean() > 2 * difference.mean()


@pytest.mark.parametrize("quality", [None, 90])
def test_files_of_other_frames_are_not_taken_for_these(quality: int | None) -> None:
    suffix = ".npy" if quality is None else ".jpegs"
    pixels = np.random.default_rng(0).integers(0, 256, (3, 6, 5, 3), np.uint8)
    data = np.frombuffer(pack(pixels, np.arange(3.0), quality), np.uint8)
    entry = unpack(data, pixels.shape, suffix)
    assert entry is not None and entry[0].shape == pixels.shape and entry[1].tolist() == [0, 1, 2]
    for shape in ((3, 5, 6, 3), (2, 6, 5, 3), (4, 6, 5, 3), (1, 18, 5, 3)):
        assert unpack(data, shape, suffix) is None
    other = ".jpegs" if quality is None else ".npy"
    assert unpack(data, pixels.shape, other) is None
    for place in range(len(data)):
        damaged = data.copy()
        damaged[place] ^= 1 << place % 8
        assert unpack(damaged, pixels.shape, suffix) is None


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ((), "expected --videos FOLDER or --dataset NAME"),
        (("--videos", "v", "--dataset", "motion"), "expected --videos FOLDER or --dataset NAME"),
        (("--videos", "empty"), "empty: no videos"),
        (("--dataset", "msrvtt"), "--dataset msrvtt needs --data-root"),
        (("--videos", "some", "--quality", "0"), "--quality must be from 1 to 100; got 0"),
        (("--videos", "some", "--workers", "-1"), "--workers must be 0 or more; got -1"),
        (("--videos", "some", "--num-frames", "0"), "--num-frames must be 1 or more; got 0"),
        (("--videos", "some", "--most-gib", "0"), "--most-gib must be above 0; got 0"),
    ],
)
def test_wrong_options_are_one_line(
    options: tuple[str, ...],
    said: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("empty").mkdir()
    Path("some").mkdir()
    Path("some/a.mp4").touch()
    with pytest.raises(SystemExit):
        cli.main(["cache", "build", "--frame-cache", "cache", *options])
    assert said in capsys.readouterr().err
    assert not Path("cache").exists()


def test_of_a_data_set_all_splits_are_kept(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    texts = {"captions": '"caption": "a bar"', "questions": '"question": "what moves", "answer": "a bar"'}
    parts = [(split, what) for what in texts for split in ("train", "test")]
    for what, text in texts.items():
        lines = [f'{{"file": "{s}_{what}.mp4", {text}, "split": "{s}"}}\n' for s, said in parts if said == what]
        (tmp_path / f"{what}.jsonl").write_text("".join(lines + lines[:1]))
    for split, what in parts:
        write_video(tmp_path / f"{split}_{what}.mp4", 3)
    for number, what in enumerate(texts, start=1):
        place = ("--dataset", "jsonl", "--annotations", str(tmp_path / f"{what}.jsonl"), "--video-root", str(tmp_path))
        cache = ("--frame-cache", str(tmp_path / "cache"), "--workers", "0", "--image-size", "32")
        cli.main(["cache", "build", *place, *cache, *(("--texts", what) if what == "questions" else ())])
        assert capsys.readouterr().out.splitlines()[0].endswith(": 2 decoded and kept")
        assert len(kept(tmp_path / "cache")) == 2 * number
    size = len(pack(np.zeros((12, 32, 32, 3), np.uint8), np.zeros(12)))  # the data set's usual number of frames
    assert {len(file) for file in kept(tmp_path / "cache").values()} == {size}


def test_a_folder_that_cannot_be_written_to_is_no_full_one(
    videos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(SystemExit) as ended:
        build(capsys, videos, tmp_path / "file")
    assert ended.value.code == 2
    assert f"expected a folder to write to; got {tmp_path / 'file'}: " in capsys.readouterr().err
