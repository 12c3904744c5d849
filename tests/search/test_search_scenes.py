"""Cuts from one scene to another: found to the frame, and not where something flashes, fades or moves."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
from search.search_runs import rows_of, scene

import tempme_vl.search
from tempme_vl.data.parts import FrameParts, read_parts
from tempme_vl.data.rendered import FPS, write_video
from tempme_vl.search import Embedder, IndexFolderError
from tempme_vl.search.scenes import find_cuts
from tempme_vl.search.store import Store


def cuts_of(path: Path) -> list[float]:
    def frames_of(frames: int, plan: Any, sampling: str, fit: Any) -> Iterator[FrameParts]:
        return read_parts(path, frames, plan, sampling=sampling, timeout=None, fit=fit)

    return find_cuts(frames_of)


def plain(value: int, seconds: float) -> np.ndarray:
    return np.full((round(seconds * FPS), 64, 64, 3), value, np.uint8)


def stripes(seconds: float, step: int) -> np.ndarray:
    """Wide stripes that move by so many pixels a frame."""
    ground = (np.arange(128) // 16 % 2 * 255).astype(np.uint8)
    rows = [np.roll(ground, step * frame)[:64] for frame in range(round(seconds * FPS))]
    return np.stack([np.broadcast_to(row[None, :, None], (64, 64, 3)) for row in rows])


def test_cuts_are_found_to_the_frame(tmp_path: Path) -> None:
    lengths = [3.3, 1.0, 7.9, 2.1, 12.4]  # the first part of eight seconds ends inside the third scene
    write_video(tmp_path / "a.mp4", np.concatenate([scene(seed, length) for seed, length in enumerate(lengths)]))
    expected = np.cumsum([round(length * FPS) for length in lengths])[:-1] / FPS
    assert cuts_of(tmp_path / "a.mp4") == pytest.approx(expected.tolist())


def test_a_cut_between_two_parts(tmp_path: Path) -> None:
    write_video(tmp_path / "a.mp4", np.concatenate([plain(40, 8.0), plain(200, 4.0)]))
    assert cuts_of(tmp_path / "a.mp4") == pytest.approx([8.0])


@pytest.mark.parametrize("rate", [1, 3, 60])
def test_few_and_many_frames_a_second(tmp_path: Path, rate: int) -> None:
    still = np.random.default_rng(0).integers(0, 255, (2, 1, 64, 64, 3), dtype=np.uint8)
    frames = np.concatenate([np.repeat(still[0], 7 * rate, 0), np.repeat(still[1], 9 * rate, 0)])
    with av.open(str(tmp_path / "a.mp4"), "w") as container:
        stream = container.add_stream("libx264", rate, pix_fmt="yuv420p", width=64, height=64)
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame)))
        container.mux(stream.encode())
    assert cuts_of(tmp_path / "a.mp4") == pytest.approx([7.0])


@pytest.mark.parametrize(
    "frames",
    [
        np.concatenate([plain(20, 2.0), plain(250, 0.1), plain(20, 2.0)]),
        np.concatenate([plain(20, 2.0), *(plain(value, 0.1) for value in range(20, 250, 20)), plain(250, 2.0)]),
        stripes(4.0, 5),
        scene(0, 4.0),
        np.concatenate([plain(20, 3.0), plain(250, 0.5)]),
        plain(20, 0.1),
    ],
    ids=["flash", "fade", "motion", "one scene", "an end that is shorter than a scene", "one frame"],
)
def test_no_cut(tmp_path: Path, frames: np.ndarray) -> None:
    write_video(tmp_path / "a.mp4", frames)
    assert cuts_of(tmp_path / "a.mp4") == []


def test_an_index_by_scenes(tmp_path: Path, embedder: Embedder) -> None:
    videos, out = tmp_path / "videos", tmp_path / "index"
    videos.mkdir()
    build = partial(tempme_vl.search.build, videos, out, embedder)
    write_video(videos / "a.mp4", np.concatenate([scene(0, 3.0), scene(1, 5.0)]))
    build(segment_seconds=4.0, overlap=1.0, scenes=True)
    write_video(videos / "b.mp4", np.concatenate([scene(2, 2.0), scene(3, 2.0)]))
    (videos / "broken.mp4").write_bytes(b"not a video")
    report = build()  # as it was made
    assert report.added == ["b.mp4"] and [problem.path for problem in report.broken] == ["broken.mp4"]
    assert [(row[0], *map(float, row[2:4])) for row in rows_of(out)] == [
        ("a.mp4", 0.0, 3.0),
        ("a.mp4", 3.0, 7.0),
        ("a.mp4", 4.0, 8.0),
        ("b.mp4", 0.0, 2.0),
        ("b.mp4", 2.0, 4.0),
    ]
    assert Store(out).settings.scenes
    with pytest.raises(IndexFolderError, match=r"was made with --scenes; got --no-scenes\. Leave it out"):
        build(scenes=False)


def test_scenes_are_no_option_of_an_index_without(made: Path, videos: Path, embedder: Embedder) -> None:
    tempme_vl.search.build(videos, made, embedder, scenes=False)
    with pytest.raises(IndexFolderError, match=r"was made with --no-scenes; got --scenes\. Leave it out"):
        tempme_vl.search.build(videos, made, embedder, scenes=True)
