"""Frames kept in files: shared by processes, bounded, checked when they are read back, and never a run's end."""

from __future__ import annotations

import gc
import os
import pickle
import resource
import signal
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from tempme_vl.data import frame_cache
from tempme_vl.data.frame_cache import FrameCache, memory_cache
from tempme_vl.data.frame_files import pack

SHAPE = (3, 5, 5, 3)  # no multiple of eight bytes
PIXELS = np.random.default_rng(0).integers(0, 256, SHAPE, np.uint8)
TIMES = np.array([0.0, 1 / 3, 7.25])


@pytest.fixture
def cache(tmp_path: Path) -> FrameCache:
    cache = FrameCache(tmp_path / "cache")
    cache.put("a", PIXELS, TIMES)
    return cache


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where memory caches lie: not among those of other runs."""
    monkeypatch.setattr(frame_cache.os, "access", lambda path, mode: False)
    monkeypatch.setattr(frame_cache.tempfile, "gettempdir", lambda: str(tmp_path))
    return tmp_path


def check(cache: FrameCache, key: str = "a") -> None:
    kept = cache.get(key, SHAPE)
    assert kept is not None
    np.testing.assert_array_equal(kept[0], PIXELS)
    np.testing.assert_array_equal(kept[1], TIMES)
    assert (kept[0].dtype, kept[1].dtype) == (np.uint8, np.float64)
    assert kept[0].flags.writeable


def test_what_is_put_is_got_and_other_tools_can_read_it(cache: FrameCache) -> None:
    check(cache)
    check(pickle.loads(pickle.dumps(cache)))
    assert cache.get("b", SHAPE) is None
    np.testing.assert_array_equal(np.load(cache.folder / "a.npy"), PIXELS)
    assert [path.name for path in cache.folder.iterdir()] == ["a.npy"]


def test_memory_is_checked_too_and_then_shared(place: Path, caplog: pytest.LogCaptureFixture) -> None:
    cache = memory_cache(10**9)
    for data in (b"", b"short", bytes(pack(PIXELS, TIMES)[:-1])):
        (cache.folder / "a.npy").write_bytes(data)
        assert cache.get("a", SHAPE) is None
    assert caplog.text.count("is damaged") == 3
    cache.put("a", PIXELS, TIMES)
    check(cache)
    first, again = (cache.get("a", SHAPE) for _ in range(2))
    assert first is not None and again is not None and np.shares_memory(first[0], again[0])


def test_any_damage_is_noticed_named_and_mended(cache: FrameCache, caplog: pytest.LogCaptureFixture) -> None:
    file = cache.folder / "a.npy"
    whole = file.read_bytes()
    cuts = [whole[:length] for length in (0, 1, 60, 128, len(whole) // 2, len(whole) - 8, len(whole) - 1)]
    flips = [bytearray(whole) for _ in range(len(whole))]
    for position, data in enumerate(flips):
        data[position] ^= 1 << position % 8
    blank = whole[:200] + bytes(16) + whole[216:]
    for data in (*cuts, *flips, blank, whole + b"more", bytes(len(whole))):
        file.write_bytes(data)
        caplog.clear()
        assert cache.get("a", SHAPE) is None
        assert f"{file} is damaged" in caplog.text
        cache.put("a", PIXELS, TIMES)
        assert file.read_bytes() == whole


def test_frames_of_another_shape_are_not_taken_for_these(cache: FrameCache) -> None:
    for shape in ((3, 5, 5, 4), (4, 5, 5, 3), (1, 15, 5, 3), (5, 3, 5, 3)):
        cache.put("a", PIXELS, TIMES)
        assert cache.get("a", shape) is None


@pytest.mark.parametrize("fault", ["folder is a file", "disk is full"])
def test_what_cannot_be_written_is_one_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture, fault: str) -> None:
    cache = FrameCache(tmp_path / "cache")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    if fault == "folder is a file":
        cache.folder.write_bytes(b"")
    else:
        resource.setrlimit(resource.RLIMIT_FSIZE, (100, limits[1]))
    try:
        for key in "abc":
            cache.put(key, PIXELS, TIMES)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert len(caplog.records) == 1 and f"{cache.folder / 'a.npy'} cannot be written" in caplog.text
    assert cache.get("a", SHAPE) is None
    if fault == "disk is full":
        assert list(cache.folder.iterdir()) == []
        cache.put("a", PIXELS, TIMES)  # there is room again
        check(cache)


def test_what_cannot_be_read_is_a_warning(cache: FrameCache, caplog: pytest.LogCaptureFixture) -> None:
    (cache.folder / "b.npy").mkdir()
    for _ in range(2):
        assert cache.get("b", SHAPE) is None
    assert len(caplog.records) == 1 and "b.npy cannot be read" in caplog.text


def test_the_limit_counts_what_all_processes_keep(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    size = len(pack(PIXELS, TIMES))
    caches = [FrameCache(tmp_path, 3 * size + size // 2) for _ in range(2)]
    child = os.fork()
    if child == 0:
        caches[0].put("child", PIXELS, TIMES)
        os._exit(0)
    os.waitpid(child, 0)
    for key in "abcde":
        for cache in caches:
            cache.put(key, PIXELS, TIMES)
    kept = {path.stem for path in tmp_path.glob("*.npy")}
    assert kept == {"child", "a", "b"}
    for key in kept:
        check(caches[1], key)
    assert [record.message.count("is full") for record in caplog.records] == [1, 1]  # each process says so once


@pytest.fixture
def killed(place: Path) -> Iterator[Path]:
    """The folder of a process that was killed."""
    receiver, sender = os.pipe()
    child = os.fork()
    if child == 0:
        cache = memory_cache(10**9)
        os.write(sender, str(cache.folder).encode())
        signal.pause()
    folder = Path(os.read(receiver, 1000).decode())
    living = memory_cache(10**9)
    assert folder.is_dir()  # it is in use
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    yield folder
    del living


def test_memory_is_given_back_when_its_owner_ends_or_is_found_killed(place: Path, killed: Path) -> None:
    cache = memory_cache(10**9)
    assert not killed.exists()
    cache.put("a", PIXELS, TIMES)
    copy = pickle.loads(pickle.dumps(cache))  # a spawned worker's
    child = os.fork()  # a forked worker, which ends first
    if child == 0:
        cache.put("b", PIXELS, TIMES)
        del cache
        gc.collect()
        os._exit(0)
    os.waitpid(child, 0)
    check(copy, "b")
    del copy
    gc.collect()
    check(cache)
    folder = cache.folder
    assert folder.parent == place and folder.is_dir()
    del cache
    gc.collect()
    assert not folder.exists()


def test_memory_is_shared_memory_where_it_is_large_enough(monkeypatch: pytest.MonkeyPatch) -> None:
    usage = frame_cache.shutil.disk_usage("/")
    monkeypatch.setattr(frame_cache.os, "access", lambda path, mode: str(path) == "/dev/shm")
    monkeypatch.setattr(frame_cache.shutil, "disk_usage", lambda path: usage._replace(free=10**6))
    monkeypatch.setattr(frame_cache, "_remove_left_over", lambda place: None)
    monkeypatch.setattr(frame_cache.tempfile, "mkdtemp", lambda prefix, dir: (_ for _ in ()).throw(KeyError(str(dir))))
    with pytest.raises(KeyError, match="/dev/shm"):
        memory_cache(10**6)
    with pytest.raises(KeyError) as caught:
        memory_cache(10**6 + 1)
    assert "shm" not in str(caught.value)
