"""The parts that an index is made of: segments, files, and tokens in few bytes."""

from __future__ import annotations

import itertools
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from towers import every_way, tiny_frontend, way

from tempme_vl import MergeSchedule
from tempme_vl.search.embed import fingerprint
from tempme_vl.search.files import find_videos
from tempme_vl.search.segments import Segments
from tempme_vl.search.tokens import pack_source, pack_tokens, unpack_source, unpack_tokens


@pytest.mark.parametrize(
    ("duration", "expected"),
    [
        (12.5, [(0, 12.5)]),
        (30.0, [(0, 30)]),
        (31.0, [(0, 30), (1, 31)]),
        (55.0, [(0, 30), (25, 55)]),
        (80.5, [(0, 30), (25, 55), (50, 80), (50.5, 80.5)]),
    ],
)
def test_segments_cover_a_file(duration: float, expected: list[tuple[float, float]]) -> None:
    assert Segments(30, 5).of(duration) == expected


def test_no_segment_goes_across_a_cut() -> None:
    assert Segments(30, 5).of(80.5, [10.0, 45.0, 80.5]) == [(0, 10), (10, 40), (15, 45), (45, 75), (50.5, 80.5)]


@pytest.mark.parametrize("seconds", [2.0, 7.3])
@pytest.mark.parametrize("overlap", [0.0, 0.5, 1.9])
def test_no_moment_is_left_out(seconds: float, overlap: float) -> None:
    for duration in np.random.default_rng(0).uniform(0.1, 100, 50):
        found = Segments(seconds, overlap).of(float(duration))
        assert found[0].start == 0 and found[-1].end == pytest.approx(duration)
        for before, after in itertools.pairwise(found):
            assert before.start < after.start <= before.end - overlap + 1e-9
            assert after.end - after.start == pytest.approx(seconds)


def test_tokens_of_a_byte_are_near_and_those_of_two_nearer() -> None:
    tokens = np.random.default_rng(0).normal(size=(127, 512)).astype(np.float32)
    tokens /= np.linalg.norm(tokens, axis=1, keepdims=True)
    tokens[3] = 0
    sizes = {"none": 0, "float16": 127 * 512 * 2, "int8": 127 * (512 + 4)}
    for form, worst in (("float16", 1e-4), ("int8", 1e-3)):
        packed = pack_tokens(tokens, form)
        assert len(packed) == sizes[form]
        assert np.abs(unpack_tokens(packed, 512, form) - tokens).max() < worst
    assert pack_tokens(tokens, "none") == b"" and unpack_tokens(b"", 512, "none").shape == (0, 512)


@pytest.mark.parametrize("schedule", every_way(), ids=way)
def test_what_tokens_stand_for_is_read_back(schedule: MergeSchedule) -> None:
    with torch.no_grad():
        output = tiny_frontend(schedule)(torch.randn(1, 6, 3, 32, 32), trace_source=True)
    assert output.source is not None
    source = output.source[0].view(6, 17).numpy()
    packed = pack_source(source)
    np.testing.assert_array_equal(unpack_source(packed, 6, 17), source)


def test_numbers_of_many_tokens_are_read_back() -> None:
    source = np.arange(70_000).reshape(2, -1)
    np.testing.assert_array_equal(unpack_source(pack_source(source), 2, 35_000), source)


def test_files_are_found_by_their_endings(tmp_path: Path) -> None:
    for name in ("b.MP4", "a/c.webm", "a/notes.txt", "index/d.mp4"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"12")
    found = find_videos(tmp_path, tmp_path / "index")
    assert [(file.path, file.size) for file in found.files] == [("b.MP4", 2), ("a/c.webm", 2)]
    assert found.others == 1 and found.problems == ()
    assert found.vanished("a/gone.mp4") and not found.vanished("b.MP4")


def test_files_of_a_closed_folder_are_not_gone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "closed").mkdir()
    listed = os.scandir

    def refuse(path: str) -> object:
        if path.endswith("closed"):
            raise PermissionError(13, "Permission denied", path)
        return listed(path)

    monkeypatch.setattr(os, "scandir", refuse)
    found = find_videos(tmp_path, tmp_path / "index")
    (problem,) = found.problems
    assert problem.path == "closed" and problem.reason == "the folder cannot be listed: Permission denied"
    assert not found.vanished("closed/a.mp4") and found.vanished("other.mp4")


def test_a_fingerprint_is_of_what_is_read(model: Path, tmp_path: Path) -> None:
    import shutil

    copy = tmp_path / "copy"
    shutil.copytree(model, copy)
    assert fingerprint(copy) == fingerprint(model)
    (copy / "README.md").write_text("another card")
    (copy / "notes.txt").write_text("nobody's")
    assert fingerprint(copy) == fingerprint(model)
    (copy / "manifest.json").unlink()
    assert fingerprint(copy) == fingerprint(model)
    config = (copy / "config.json").read_text()
    (copy / "config.json").write_text(config.replace("fps1", "uniform"))
    assert config.count("fps1") == 1 and fingerprint(copy) != fingerprint(model)
