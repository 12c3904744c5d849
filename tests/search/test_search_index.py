"""Indexing a folder: what is read anew, what is dropped, what is refused, and that no end of a process does harm."""

from __future__ import annotations

import json
import os
import resource
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from search import search_runs
from search.search_runs import LENGTHS, SETTINGS, rows_of, save_model, scene

import tempme_vl.search
from tempme_vl.data.rendered import write_video
from tempme_vl.search import Embedder, IndexFolderError, decoding
from tempme_vl.search import index as indexing
from tempme_vl.search.store import Store

RUNS = str(Path(search_runs.__file__))
Copies = Callable[[], tuple[Path, Path]]
SEGMENTS = {"a.mp4": 1, "deep/b.mp4": 1, "deep/er/c.mp4": 3, "d'quoted.mp4": 2}  # of 2 s that overlap by half a second


def counts(folder: Path) -> dict[str, int]:
    paths = [row[0] for row in rows_of(folder)]
    return {path: paths.count(path) for path in paths}


def test_every_video_is_cut_into_segments(made: Path) -> None:
    assert counts(made) == SEGMENTS
    times = [(start, end) for path, _, start, end, *_ in rows_of(made) if path == "deep/er/c.mp4"]
    assert times == [(0.0, 2.0), (1.5, 3.5), (2.5, 4.5)]


def test_a_second_run_reads_no_video_and_no_model(
    videos: Path, made: Path, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(indexing, "decode_all", None)
    monkeypatch.setattr(Embedder, "from_pretrained", None)
    report = tempme_vl.search.build(videos, made)
    assert (report.added, report.changed, report.removed, report.unchanged) == ([], [], [], len(LENGTHS))
    assert [problem.path for problem in report.broken] == ["broken.mp4"]


def test_new_changed_gone_and_broken_files(copied: Copies, embedder: Embedder) -> None:
    videos, out = copied()
    write_video(videos / "new.mp4", scene(9, 1.0))
    write_video(videos / "deep" / "er" / "c.mp4", scene(8, 1.0))  # of fewer segments than before
    (videos / "d'quoted.mp4").unlink()
    (videos / "a.mp4").write_bytes(b"not a video any more")
    write_video(videos / "broken.mp4", scene(7, 1.0))
    report = tempme_vl.search.build(videos, out, embedder)
    assert report.added == ["broken.mp4", "new.mp4"] and report.changed == ["deep/er/c.mp4"]
    assert report.removed == ["d'quoted.mp4"] and [problem.path for problem in report.broken] == ["a.mp4"]
    assert "Invalid data" in report.broken[0].reason and report.unchanged == 1
    assert counts(out) == {"broken.mp4": 1, "deep/b.mp4": 1, "deep/er/c.mp4": 1, "new.mp4": 1}
    # the same as an index of the folder as it is now
    tempme_vl.search.build(videos, videos / "fresh", embedder, **SETTINGS)
    assert [row[:5] for row in rows_of(videos / "fresh")] == [row[:5] for row in rows_of(out)]


def test_broken_files_are_tried_again_only_when_asked(copied: Copies, embedder: Embedder) -> None:
    videos, out = copied()
    tried = []
    read = decoding.read_parts
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            decoding, "read_parts", lambda path, *given, **more: tried.append(path.name) or read(path, *given, **more)
        )
        tempme_vl.search.build(videos, out, embedder)
        assert tried == []
        report = tempme_vl.search.build(videos, out, embedder, retry_broken=True)
    assert tried == ["broken.mp4"] and [problem.path for problem in report.broken] == ["broken.mp4"]


def test_an_empty_folder_does_not_empty_the_index(copied: Copies, embedder: Embedder) -> None:
    videos, out = copied()
    shutil.rmtree(videos)
    with pytest.raises(ValueError, match=r"expected a folder of videos; .* is not there"):
        tempme_vl.search.build(videos, out, embedder)
    videos.mkdir()
    with pytest.raises(IndexFolderError, match=r"no video any more, .* has 4: is it not mounted"):
        tempme_vl.search.build(videos, out, embedder)
    assert counts(out) == SEGMENTS


def test_what_does_not_fit_an_index_is_refused(videos: Path, made: Path, embedder: Embedder, tmp_path: Path) -> None:
    other = save_model(tmp_path / "other", seed=1)
    with pytest.raises(IndexFolderError, match=r"made by another model: expected the one of .*model.* got .*other"):
        tempme_vl.search.build(videos, made, other)
    with pytest.raises(IndexFolderError, match="made with --tokens float16; got --tokens int8"):
        tempme_vl.search.build(videos, made, embedder, tokens="int8")
    with pytest.raises(IndexFolderError, match=r"made with --overlap 0.5; got --overlap 1.0"):
        tempme_vl.search.build(videos, made, embedder, overlap=1.0)
    shutil.copytree(videos, tmp_path / "videos")
    with pytest.raises(IndexFolderError, match=r"is the index of .* say --moved"):
        tempme_vl.search.build(tmp_path / "videos", made, embedder)
    with pytest.raises(ValueError, match="an overlap from 0 to below that; got --segment-seconds 3 --overlap 3"):
        tempme_vl.search.build(videos, tmp_path / "none", embedder, segment_seconds=3.0, overlap=3.0)
    assert not (tmp_path / "none").exists() and counts(made) == SEGMENTS


def test_a_folder_that_moved(copied: Copies, embedder: Embedder) -> None:
    videos, out = copied()
    there = videos.rename(videos.with_name("elsewhere"))
    report = tempme_vl.search.build(there, out, embedder, moved=True)
    assert report.unchanged == 4 and tempme_vl.search.open(out).file("a.mp4") == there.resolve() / "a.mp4"


def test_two_processes_do_not_write_at_once(videos: Path, made: Path, embedder: Embedder) -> None:
    with Store(made).alone(), pytest.raises(IndexFolderError, match="another process is writing"):
        tempme_vl.search.build(videos, made, embedder)


def test_links_out_of_the_folder_are_not_followed(copied: Copies, embedder: Embedder, tmp_path: Path) -> None:
    videos, out = copied()
    outside = tmp_path / "outside"
    outside.mkdir()
    write_video(outside / "secret.mp4", scene(5, 1.0))
    (videos / "link.mp4").symlink_to(outside / "secret.mp4")
    (videos / "folder").symlink_to(outside)
    (videos / "inner.mp4").symlink_to(videos / "a.mp4")
    report = tempme_vl.search.build(videos, out, embedder)
    assert report.added == ["inner.mp4"]
    assert {problem.path: problem.reason.split(";")[0] for problem in report.broken if "link" in problem.path} == {
        "link.mp4": "a link that leads out of the folder"
    }


def test_names_that_no_table_can_hold_are_listed(copied: Copies, embedder: Embedder) -> None:
    videos, out = copied()
    (videos / os.fsdecode(b"\xff.mp4")).write_bytes(b"")
    os.mkfifo(videos / "pipe.mp4")
    report = tempme_vl.search.build(videos, out, embedder)
    found = {problem.path: problem.reason for problem in report.broken}
    assert found["\\udcff.mp4"].startswith("its name is not UTF-8") and found["pipe.mp4"] == "no regular file"


def test_a_file_that_breaks_behind_its_first_segments_leaves_no_row(
    copied: Copies, embedder: Embedder, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tempme_vl.data.video import VideoError

    videos, out = copied()
    write_video(videos / "new.mp4", scene(9, 1.0))
    read = decoding.read_parts

    def breaking(path: Path, *given: object, **more: object):
        yield from (parts._replace(last=False) for parts in read(path, *given, **more))
        raise VideoError(path, "cut off")

    monkeypatch.setattr(decoding, "read_parts", breaking)
    report = tempme_vl.search.build(videos, out, embedder, batch_size=1)
    assert report.added == [] and [problem.reason for problem in report.broken if problem.path == "new.mp4"] == [
        "cut off"
    ]
    assert counts(out) == SEGMENTS


def test_a_full_disk_is_a_clear_end_and_the_next_run_goes_on(copied: Copies, embedder: Embedder) -> None:
    videos, out = copied()
    for number in range(3):
        write_video(videos / f"new{number}.mp4", scene(20 + number, 1.0))
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2000, limits[1]))  # which LanceDB meets as it would a full disk
    try:
        with pytest.raises(OSError, match="no space is left; what was written stays"):
            tempme_vl.search.build(videos, out, embedder)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert counts(out) == SEGMENTS
    assert len(tempme_vl.search.build(videos, out, embedder).added) == 3
    assert counts(out) == {**SEGMENTS, **{f"new{number}.mp4": 1 for number in range(3)}}


def test_a_damaged_index_says_what_to_do(copied: Copies, embedder: Embedder) -> None:
    videos, out = copied()
    (out / "broken.json").write_text("[{]")
    with pytest.raises(IndexFolderError, match=r"broken\.json is damaged; delete it"):
        tempme_vl.search.build(videos, out, embedder)
    (out / "broken.json").unlink()
    for file in (out / "segments.lance" / "_versions").glob("*.manifest"):
        file.write_bytes(b"damaged")
    with pytest.raises(IndexFolderError, match=r"cannot be opened .*: delete the folder and index again"):
        tempme_vl.search.open(out)
    shutil.rmtree(out / "segments.lance" / "_versions")  # as if killed before the first version was there
    report = tempme_vl.search.build(videos, out, embedder)
    assert len(report.added) == 4 and counts(out) == SEGMENTS


def test_an_index_of_an_earlier_version_says_what_it_lacks(copied: Copies) -> None:
    _, index = copied()
    Store(index).table.drop_columns(["attention"])
    with pytest.raises(IndexFolderError, match="earlier version of tempme_vl, without attention: delete the folder"):
        tempme_vl.search.open(index)


def test_a_killed_process_loses_and_doubles_nothing(
    videos: Path, model: Path, made: Path, embedder: Embedder, tmp_path: Path
) -> None:
    out = tmp_path / "index"
    done = subprocess.run([sys.executable, RUNS, videos, model, out, "after", "2"], capture_output=True, text=True)
    assert done.returncode == -9, done.stderr
    then = counts(out)
    assert len(then) == 2 and then.items() <= SEGMENTS.items()
    report = tempme_vl.search.build(videos, out, embedder)
    assert report.unchanged == 2 and counts(out) == SEGMENTS
    both = [
        Store(folder).table.to_arrow().sort_by([("path", "ascending"), ("segment", "ascending")])
        for folder in (out, made)
    ]
    np.testing.assert_allclose(*(np.stack(rows.column("vector").to_pylist()) for rows in both), atol=1e-5)


@pytest.mark.slow
def test_no_moment_of_a_kill_does_harm(videos: Path, model: Path, tmp_path: Path) -> None:
    shares = [f"{(number / 20) ** 2:.4f}" for number in range(20)]
    done = subprocess.run([sys.executable, RUNS, videos, model, tmp_path, *shares], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    whole, found = json.loads(done.stdout)
    files = {path: [row for row in whole if row[0] == path] for path in SEGMENTS}
    stages = set()
    for then, after in found:
        paths = sorted({row[0] for row in then})
        assert then == [row for path in paths for row in files[path]]  # whole files, once
        assert after == whole
        stages.add(len(paths))
    assert len(stages) > 2  # some were killed between two files
