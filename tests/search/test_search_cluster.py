"""Indexing on several machines: what is refused, what makes whole files, and that a cluster makes the same index."""

from __future__ import annotations

import os
import shutil
import socket
import sys
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from search.search_runs import LENGTHS, SETTINGS, rows_of

import tempme_vl.search
from tempme_vl.data.decoder_process import DecoderProcess
from tempme_vl.search import Embedder, IndexFolderError, cluster, rows
from tempme_vl.search.decoding import Reading
from tempme_vl.search.files import VideoFile, find_videos
from tempme_vl.search.rows import Made, in_pieces, make_rows
from tempme_vl.search.segments import Segments
from tempme_vl.search.store import MissingPackageError, Row, Store


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"ray": "local", "workers": 2}, "--workers is for one machine"),
        ({"ray": "local", "device": "cuda:1"}, "with --ray, --device is cpu or cuda.* got cuda:1"),
        ({"ray": "ray://head:10001"}, "--ray must be auto .* got ray://head:10001"),
        ({"ray": "head"}, "--ray must be auto .* got head"),
    ],
)
def test_options_that_do_not_go_with_a_cluster(given: dict[str, Any], said: str, videos: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=said):
        tempme_vl.search.build(videos, tmp_path / "index", **given)
    assert not (tmp_path / "index").exists()


def test_ray_is_named_where_it_is_missing(videos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("ray", "ray.data"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(MissingPackageError, match=r"pip install 'tempme_vl\[ray\]'"):
        tempme_vl.search.build(videos, tmp_path / "index", ray="local")


def piece(name: str, first: int, last: bool = False, error: str = "") -> Made:
    file, none = VideoFile(name, 1, 1), np.zeros(1, np.float32)
    row = Row(file, first, 0.0, 1.0, 1.0, none, b"", b"", b"", none)
    return Made(file, () if error else (row,), first, last, error)


def test_files_are_whole_whatever_the_order_and_once() -> None:
    given = [
        piece("b", 2, last=True),
        piece("a", 0),
        piece("b", 0),
        piece("a", 0),  # of a repeated task
        piece("broken", 1, error="cut off", last=True),
        piece("b", 1),
        piece("b", 1),
        piece("b", 2, last=True),
        piece("broken", 0),
        piece("a", 1, last=True),
        piece("half", 0),
    ]
    found = [
        (one.file.path, [(row.file.path, row.segment) for row in one.rows], one.last, one.error)
        for one in cluster.whole_files(given)
    ]
    assert found == [
        ("b", [("b", 0), ("b", 1), ("b", 2)], True, ""),
        ("broken", [("broken", 0)], True, "cut off"),
        ("a", [("a", 0), ("a", 1)], True, ""),
    ]


@pytest.fixture
def reading(videos: Path, embedder: Embedder) -> Reading:
    cut = Segments(SETTINGS["segment_seconds"], SETTINGS["overlap"])
    fit = embedder.transform.preprocess.fit
    return Reading(videos, embedder.layout.frames, embedder.sampling, cut, False, 60.0, 2.0, fit)


@pytest.fixture
def told(made: Path, model: Path) -> cluster.Model:
    return cluster.Model(str(model), "cpu", Store(made).settings)


def test_a_machine_that_does_not_see_the_folder_or_the_model_is_named(
    reading: Reading, told: cluster.Model, tmp_path: Path
) -> None:
    here = socket.gethostname()
    with pytest.raises(IndexFolderError, match=rf"the machine {here} does not see .*none: .*shared storage"):
        next(cluster.Decode(replace(reading, folder=tmp_path / "none"))({"item": np.empty(0, object)}))
    with pytest.raises(IndexFolderError, match=rf"the machine {here} does not see .*none: .*shared storage"):
        cluster.Encode(replace(told, source=str(tmp_path / "none")))({"item": np.empty(0, object)})
    other = replace(told, settings=replace(told.settings, fingerprint="0" * 64))
    with pytest.raises(IndexFolderError, match=r"another model in .* than the one of the index"):
        cluster.Encode(other)({"item": np.empty(0, object)})


def test_a_file_that_only_another_machine_misses_is_not_broken(
    reading: Reading, told: cluster.Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = [VideoFile("gone.mp4", 1, 1), VideoFile("a.mp4", 1, 1)]
    made = [piece(file.path, 0, last=True, error=os.strerror(2)) for file in files]
    monkeypatch.setattr(cluster, "_connected", nullcontext)
    monkeypatch.setattr(cluster, "_stream", lambda *given: iter(made))
    found = cluster.embed_on_cluster(files, reading, told, 1, "local")
    assert next(found).file.path == "gone.mp4"  # which this machine does not see either
    with pytest.raises(IndexFolderError, match=r"a machine of the cluster does not see .*a\.mp4"):
        next(found)


def test_what_a_repeated_task_leaves_out_is_done_again(
    reading: Reading, told: cluster.Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []

    def stream(files: list[VideoFile], *given: object) -> Iterator[Made]:
        asked.append([file.path for file in files])
        yield from (piece(file.path, 0, last=True) for file in files if file.path != "b" or len(asked) == 2)

    monkeypatch.setattr(cluster, "_connected", nullcontext)
    monkeypatch.setattr(cluster, "_stream", stream)
    names = ("a", "b", "c")
    found = list(cluster.embed_on_cluster([VideoFile(name, 1, 1) for name in names], reading, told, 1, "local"))
    assert [made.file.path for made in found] == ["a", "c", "b"] and asked == [["a", "b", "c"], ["b"]]
    with pytest.raises(IndexFolderError, match="Ray ended without 1 files"):
        list(cluster.embed_on_cluster([VideoFile("b", 1, 1)], reading, told, 1, "local"))


def test_both_stages_make_the_rows_of_one_process(reading: Reading, told: cluster.Model, embedder: Embedder) -> None:
    files = [file for file in find_videos(reading.folder, reading.folder / "index").files if file.path != "a.mp4"]
    process = DecoderProcess()
    decoded = in_pieces((item for file in files for item in reading.decode(file, process)), 1)
    expected = [row for made in make_rows(list(decoded), told.settings, embedder) for row in made.rows]
    process.close()
    encode = cluster.Encode(told)
    batches = cluster.Decode(reading)(cluster.packed(files))
    found = [row for batch in batches for made in cluster.unpacked(encode(batch)) for row in made.rows]
    assert [(row.file, row.segment, row.start) for row in found] == [
        (row.file, row.segment, row.start) for row in expected
    ]
    assert len(found) == 6
    np.testing.assert_allclose([row.vector for row in found], [row.vector for row in expected], atol=1e-6)


def vectors_of(folder: Path) -> np.ndarray:
    found = Store(folder).table.to_arrow().sort_by([("path", "ascending"), ("segment", "ascending")])
    return np.stack(found.column("vector").to_pylist())


@pytest.fixture(scope="module")
def nodes() -> Iterator[Any]:
    """A Ray cluster of a head without a CPU and one machine with one."""
    pytest.importorskip("ray")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        from ray.cluster_utils import Cluster

        memory: dict[str, Any] = {"object_store_memory": 100 * 2**20}
        found = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False, **memory})
        found.add_node(num_cpus=1, **memory)
        yield found
        found.shutdown()


@pytest.mark.slow
def test_two_machines_make_the_same_index(nodes: Any, videos: Path, model: Path, made: Path, tmp_path: Path) -> None:
    second = nodes.add_node(num_cpus=1, object_store_memory=100 * 2**20)
    given = {**SETTINGS, "ray": nodes.address, "batch_size": 2}
    report = tempme_vl.search.build(videos, tmp_path / "index", model, **given)
    nodes.remove_node(second)
    assert sorted(report.added) == sorted(LENGTHS)
    assert [(one.path, one.reason) for one in report.broken] == [
        ("broken.mp4", "Invalid data found when processing input")
    ]
    assert [row[:5] for row in rows_of(tmp_path / "index")] == [row[:5] for row in rows_of(made)]
    np.testing.assert_allclose(vectors_of(tmp_path / "index"), vectors_of(made), atol=1e-6)
    again = tempme_vl.search.build(
        videos, tmp_path / "index", **{**given, "ray": "head:1"}
    )  # nothing to do, nobody asked
    assert again.unchanged == len(LENGTHS)


@pytest.mark.slow
def test_a_machine_that_is_killed_loses_and_doubles_nothing(
    nodes: Any, videos: Path, model: Path, made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The only one that works, after the first file was written; another comes then."""
    many = tmp_path / "videos"
    for number in range(12):
        shutil.copytree(videos, many / str(number))
    put = Store.put
    written: list[int] = []

    def watched(self: Store, *given: Any) -> None:
        put(self, *given)
        if not written:
            nodes.remove_node(next(iter(nodes.worker_nodes)), allow_graceful=False)
            written.append(len(self.files()))
            nodes.add_node(num_cpus=1, object_store_memory=100 * 2**20)

    monkeypatch.setattr(Store, "put", watched)
    monkeypatch.setattr(rows, "COMMIT_SECONDS", 0.0)
    monkeypatch.setattr(cluster, "FILES_AT_ONCE", 1)
    report = tempme_vl.search.build(many, tmp_path / "index", model, **SETTINGS, ray=nodes.address, batch_size=1)
    assert written[0] < 12 * len(LENGTHS) / 2  # killed in the middle
    assert (report.files, len(report.broken)) == (12 * len(LENGTHS), 12)
    one = [row[:5] for row in rows_of(made)]
    assert [row[:5] for row in rows_of(tmp_path / "index")] == sorted(
        [f"{number}/{path}", *facts] for number in range(12) for path, *facts in one
    )


@pytest.mark.slow
def test_a_cluster_that_does_not_answer(videos: Path, model: Path, tmp_path: Path) -> None:
    pytest.importorskip("ray")
    with pytest.raises(IndexFolderError, match=r"no Ray cluster answers at 127\.0\.0\.1:1 .*Connection refused"):
        tempme_vl.search.build(videos, tmp_path / "index", model, ray="127.0.0.1:1")
