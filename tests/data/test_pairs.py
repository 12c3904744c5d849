"""Pairs of pre-training: pictures are still videos, and both are augmented as in TESTA's code."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from video_files import write_video

from tempme_vl.data.augment import few_operations, random_square
from tempme_vl.data.datasets import Source
from tempme_vl.data.files import AnnotationError
from tempme_vl.data.reader import VideoReader
from tempme_vl.data.retrieval import TrainPairs
from tempme_vl.data.sampling import head_and_tail
from tempme_vl.data.splits import Video
from tempme_vl.data.stills import read_still
from tempme_vl.data.transforms import Preprocess, VideoTransform
from tempme_vl.data.video import VideoError

RNG = np.random.default_rng


def picture(path: Path, width: int = 40, height: int = 24, seed: int = 0) -> Path:
    path.parent.mkdir(exist_ok=True, parents=True)
    noise = RNG(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    Image.fromarray(noise).save(path, **({"quality": 95} if path.suffix == ".jpg" else {}))
    return path


def write(path: Path, entries: list[dict[str, Any]]) -> Path:
    path.write_text(json.dumps(entries))
    return path


def test_both_layouts_and_several_files_are_one_split(tmp_path: Path) -> None:
    write(tmp_path / "b.json", [{"image": "x/1.jpg", "caption": "one"}, {"image": "/far/2.jpg", "caption": "two"}])
    file = write(
        tmp_path / "a.json", [{"path": "v.mp4", "caption": " a dog "}, {"path": "x/1.jpg", "caption": "again"}]
    )
    both = Source("pairs", annotations=tmp_path).captions("train")
    assert [str(video.path) for video in both.videos] == [
        str(tmp_path / "v.mp4"),
        str(tmp_path / "x/1.jpg"),
        "/far/2.jpg",
    ]
    assert both.captions == (("a dog",), ("again", "one"), ("two",))
    alone = Source("pairs", None, Path("/videos"), file).captions()
    assert [str(video.path) for video in alone.videos] == ["/videos/v.mp4", "/videos/x/1.jpg"]
    train, val, test = Source("pairs", annotations=file).all_captions()
    assert val is None and test.videos == train.videos and "trained on" in test.note


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({"caption": "x"}, "entry 0: expected either 'path' or 'image'; got caption"),
        ({"path": "a", "image": "a", "caption": "x"}, "expected either 'path' or 'image'"),
        ({"path": "a "}, "without blanks"),
        ({"path": "../a"}, "without '..'"),
        ({"path": "a.jpg", "caption": ""}, "'caption' must be a text"),
    ],
)
def test_wrong_entries_are_named(tmp_path: Path, entry: dict[str, Any], message: str) -> None:
    file = write(tmp_path / "a.json", [entry])
    with pytest.raises(AnnotationError, match=rf"a\.json, entry 0: .*{message.removeprefix('entry 0: ')}"):
        Source("pairs", annotations=file).captions()
    with pytest.raises(AnnotationError, match=r"expected files NAME\.json in this folder; found a\.txt"):
        file.rename(tmp_path / "a.txt")
        Source("pairs", annotations=tmp_path).captions()


@pytest.mark.parametrize("suffix", [".png", ".PNG", ".bmp"])
def test_every_frame_is_the_picture(tmp_path: Path, suffix: str) -> None:
    path = picture(tmp_path / f"a{suffix}")
    pixels, times = read_still(path, 3)
    expected = RNG(0).integers(0, 256, (24, 40, 3), dtype=np.uint8)
    assert pixels.shape == (3, 24, 40, 3) and (pixels == expected).all()
    assert times.tolist() == [0, 0, 0]
    assert (read_still(path, 2, Preprocess(16).fit)[0][1] == read_still(path, 1, Preprocess(16).fit)[0][0]).all()


def test_pictures_with_other_channels_are_made_rgb(tmp_path: Path) -> None:
    Image.new("RGBA", (8, 8), (10, 20, 30, 0)).save(tmp_path / "a.png")
    Image.new("L", (8, 8), 7).save(tmp_path / "b.png")
    assert (read_still(tmp_path / "a.png", 1)[0] == (10, 20, 30)).all()
    assert (read_still(tmp_path / "b.png", 1)[0] == 7).all()


def test_pictures_that_cannot_be_read_are_counted_like_videos(tmp_path: Path) -> None:
    whole = picture(tmp_path / "cut.png").read_bytes()
    (tmp_path / "cut.png").write_bytes(whole[:500])
    (tmp_path / "gif.png").write_bytes(b"GIF89a" + bytes(40))
    for name, message in (("cut.png", "truncated"), ("gif.png", "cannot identify"), ("none.jpg", "No such file")):
        with pytest.raises(VideoError, match=message):
            read_still(tmp_path / name, 2)
    with pytest.raises(VideoError, match="GiB of memory"):
        read_still(picture(tmp_path / "large.png", 400, 400), 8, memory_gib=1e-4)
    reader = VideoReader(2, VideoTransform(Preprocess(16)), timeout=None, broken_log=tmp_path / "log")
    read = reader(Video("cut.png", tmp_path / "cut.png"))
    assert not read.valid and not read.video.any() and "cut.png" in (tmp_path / "log").read_text()


def reader(augment: str = "crop_augment", pictures: str | None = "crop_flip_augment") -> VideoReader:
    preprocess = Preprocess(14)
    return VideoReader(
        4,
        VideoTransform(preprocess, augment),
        "headtail",
        timeout=None,
        on_broken="raise",
        pictures=None if pictures is None else VideoTransform(preprocess, pictures),
    )


def test_pictures_have_a_transform_of_their_own(tmp_path: Path) -> None:
    still = Video("a.png", picture(tmp_path / "a.png"))
    pixels = read_still(still.path, 4)[0]
    found = reader()(still, RNG(3)).video
    assert torch.equal(found, VideoTransform(Preprocess(14), "crop_flip_augment")(pixels, RNG(3)))
    assert all(torch.equal(frame, found[0]) for frame in found)
    alike = reader("none", None)(still, RNG(3)).video
    assert torch.equal(alike, VideoTransform(Preprocess(14))(pixels))


def test_a_video_is_squashed_cropped_and_augmented(tmp_path: Path) -> None:
    video = Video("v", write_video(tmp_path / "v.mp4"))
    squashed = VideoTransform(Preprocess(14), "crop_augment")
    fit = squashed.fit
    assert fit is not None and (fit.size, fit.resize) == (16, "squash")
    seen = {tuple(reader()(video, RNG(seed)).video.flatten()[:20].tolist()) for seed in range(6)}
    assert len(seen) == 6
    again = reader()(video, RNG(1)).video
    assert again.shape == (4, 3, 14, 14) and torch.equal(again, reader()(video, RNG(1)).video)


def test_a_random_square_is_a_part_of_the_frames_and_can_be_any() -> None:
    pixels = RNG(0).integers(0, 256, (2, 6, 7, 3), dtype=np.uint8)
    parts = {(y, x): pixels[:, y : y + 5, x : x + 5].tobytes() for y in range(2) for x in range(3)}
    found = {random_square(pixels, 5, RNG(seed)).tobytes() for seed in range(60)}
    assert found == set(parts.values())


def test_only_the_named_operations_are_drawn() -> None:
    pixels = RNG(0).integers(0, 256, (2, 6, 8, 3), dtype=np.uint8)
    for seed in range(20):
        assert (few_operations(pixels, RNG(seed), ("identity",), 5) == pixels).all()
    flipped = {few_operations(pixels, RNG(seed), ("flip",), 5).tobytes() for seed in range(20)}
    assert flipped == {pixels.tobytes(), np.ascontiguousarray(pixels[:, :, ::-1]).tobytes()}


def test_head_and_tail_take_as_many_frames_of_either_half() -> None:
    draws = np.stack([head_and_tail(50, 8, RNG(seed)) for seed in range(300)])
    assert (draws[:, :4] < 25).all() and (draws[:, 4:] >= 25).all()
    assert (np.diff(draws, axis=1) > 0).all()  # no frame twice
    assert set(draws.flatten().tolist()) == set(range(50))
    assert head_and_tail(3, 8, RNG(0)).tolist() == [0, 0, 0, 0, *sorted(head_and_tail(3, 8, RNG(0))[4:].tolist())]


def test_a_batch_holds_pictures_and_videos(tmp_path: Path) -> None:
    picture(tmp_path / "a.jpg")
    write_video(tmp_path / "v.mp4")
    write(tmp_path / "all.json", [{"path": "a.jpg", "caption": "one"}, {"path": "v.mp4", "caption": "two"}])
    split = Source("pairs", annotations=tmp_path / "all.json").captions()
    words = {"one": 1, "two": 2}
    pairs = TrainPairs(split, reader(), lambda text: (torch.tensor([words[text]]), torch.ones(1)))
    items = [pairs[0, number] for number in range(2)]
    assert [item["text_ids"].tolist() for item in items] == [[1], [2]]
    assert {tuple(item["video"].shape) for item in items} == {(4, 3, 14, 14)}
