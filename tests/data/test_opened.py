"""A short file is opened and read once, a long one again; a stream out of order is decoded once."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
from video_files import write_video

from tempme_vl.data import decoder, opened
from tempme_vl.data.decoder_process import DecoderProcess
from tempme_vl.data.opened import Kept
from tempme_vl.data.parts import Part, read_parts
from tempme_vl.data.pictures import Colors
from tempme_vl.data.seeking import Listed
from tempme_vl.data.video import VideoError, read_frames

COUNT = 48
GROUPS = {"g": "8", "bf": "2"}


@pytest.fixture
def opens(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Files opened since."""
    found: list[str] = []
    really = av.open

    def counting(file: str, *rest: Any, **options: Any) -> Any:
        found.append(file)
        return really(file, *rest, **options)

    monkeypatch.setattr(av, "open", counting)
    return found


@pytest.fixture
def decoded(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many frames each decoding from the start gave."""
    found: list[int] = []
    really = decoder.all_frames

    def counting(*arguments: Any) -> Iterator[av.VideoFrame]:
        found.append(0)
        for frame in really(*arguments):
            found[-1] += 1
            yield frame

    monkeypatch.setattr(decoder, "all_frames", counting)
    return found


def whole(path: Path) -> np.ndarray:
    with av.open(str(path)) as container:
        return np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])


def is_open(path: Path) -> bool:
    return str(path) in {os.path.realpath(f"/proc/self/fd/{number}") for number in os.listdir("/proc/self/fd")}


@pytest.mark.parametrize(("most", "times"), [(2**24, 1), (COUNT * 2**10, 2)])
def test_packets_are_kept_where_they_are_few(
    most: int, times: int, tmp_path: Path, opens: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_video(tmp_path / "a.mp4", COUNT, options=GROUPS)
    expected = whole(path)
    monkeypatch.setattr(opened, "PACKETS_KEPT", most)
    opens.clear()
    frames = read_frames(path, 5, sampling="uniform")
    assert opens == times * [str(path)]
    np.testing.assert_array_equal(frames.pixels, expected[frames.indices])


@pytest.mark.skipif(not hasattr(av.stream.Stream, "discard"), reason="from PyAV 18 on")
def test_packets_of_other_streams_are_not_read(tmp_path: Path) -> None:
    """But for some that were read to open the file."""
    path = str(tmp_path / "a.mkv")
    with av.open(path, "w") as container:
        pictures, sound = container.add_stream("libx264", rate=10), container.add_stream("aac", rate=8000)
        pictures.width, pictures.height, pictures.pix_fmt = 96, 64, "yuv420p"
        silence = av.AudioFrame.from_ndarray(np.zeros((1, 40000), np.float32), "fltp", "mono")
        silence.rate = 8000
        for _ in range(50):
            container.mux(pictures.encode(av.VideoFrame(96, 64, "yuv420p")))
        for packets in (sound.encode(silence), sound.encode(), pictures.encode()):
            container.mux(packets)

    def kinds(container: Any) -> Counter[str]:
        return Counter(packet.stream.type for packet in container.demux() if packet.size)

    with av.open(path) as container:
        there = kinds(container)
    with opened.open_container(path) as container:
        assert opened.video_stream(container).type == "video"
        read = kinds(container)
    assert there["video"] == read["video"] == 50
    assert read["audio"] <= 4 < 30 < there["audio"]


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="it lists open files")
def test_no_file_stays_open(tmp_path: Path) -> None:
    path = write_video(tmp_path / "a.mp4", COUNT, options=GROUPS)
    read_frames(path, 5)
    assert not is_open(path)
    with pytest.raises(VideoError, match="behind its last frame") as caught:
        read_frames(path, 5, start=100.0)
    assert not is_open(path) and caught
    parts = read_parts(path, 2, lambda duration: [Part(0.0, 1.0)] * 20, timeout=None)
    next(parts)
    parts.close()
    assert not is_open(path)


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="it lists open files")
def test_what_is_kept_is_of_one_file_and_taken_once(tmp_path: Path) -> None:
    one, other = (write_video(tmp_path / name, COUNT, options=GROUPS) for name in ("a.mp4", "b.mp4"))
    kept = Kept()
    decoder.index(str(one), kept=kept)
    assert kept.stream is not None and is_open(one)
    decoder.index(str(other), kept=kept)
    assert not is_open(one) and is_open(other)
    _, found = decoder.frames(str(one), [1, 30], COUNT, "pyav", kept=kept)
    np.testing.assert_array_equal(found, whole(one)[[1, 30]])
    assert kept.stream is not None
    for _ in range(2):
        _, found = decoder.frames(str(other), [1, 30], COUNT, "pyav", kept=kept)
        np.testing.assert_array_equal(found, whole(other)[[1, 30]])
        assert kept.stream is None and not is_open(other)


def test_the_decoder_process_keeps_packets(tmp_path: Path) -> None:
    """So that a file that is gone after it was listed is read all the same."""
    path = write_video(tmp_path / "a.mp4", COUNT, options=GROUPS)
    expected = whole(path)
    process = DecoderProcess()
    try:
        process.call("index", 60, path=str(path))
        path.unlink()
        _, found = process.call("frames", 60, path=str(path), indices=[3, 40], num_raw=COUNT, backend="pyav")
    finally:
        process.close()
    np.testing.assert_array_equal(found, expected[[3, 40]])


@pytest.mark.parametrize(("codec", "tag"), [("libx264", "H264"), ("mpeg4", "XVID")])
def test_a_stream_out_of_order_is_decoded_once(
    codec: str, tag: str, tmp_path: Path, opens: list[str], decoded: list[int]
) -> None:
    """AVI has no times of B frames: what its packets say of their order is wrong, and of their number right."""
    path = write_video(tmp_path / "a.avi", COUNT, codec=codec, options=GROUPS)
    expected = whole(path)
    opens.clear()
    frames = read_frames(path, 12, sampling="uniform")
    assert (opens, decoded) == ([str(path)], [COUNT])
    np.testing.assert_array_equal(frames.pixels, expected[frames.indices])
    exact = decoder.index(str(path), exact=True)[1]
    np.testing.assert_array_equal(frames.times, exact[0][frames.indices])


def test_a_stream_out_of_order_is_counted_once_for_all_its_parts(tmp_path: Path, decoded: list[int]) -> None:
    path = write_video(tmp_path / "a.avi", COUNT, options=GROUPS)
    expected = whole(path)
    plan = [Part(0.1 * number, 0.1 * number + 0.4) for number in range(20)]
    found = [frames for group in read_parts(path, 3, lambda _: plan, timeout=None) for frames in group.frames]
    assert decoded == [COUNT, found[-1].indices[-1] + 1]
    for frames in found:
        np.testing.assert_array_equal(frames.pixels, expected[frames.indices])


@pytest.mark.parametrize("known", [[], [0.0, 1.0], [*range(COUNT - 1), np.nan]])
def test_a_stream_out_of_order_whose_frames_are_not_those_of_its_packets_is_short(
    known: list[float], tmp_path: Path
) -> None:
    path = write_video(tmp_path / "a.avi", COUNT, options=GROUPS)
    kept = Kept()
    rows = decoder.index(str(path), kept=kept)[1]
    wanted = list(range(0, COUNT, 5))
    places = places_of(rows, wanted)
    kept.times = np.array(known)
    with pytest.raises(decoder.ShortStream, match="is not the one that its packets promise"):
        decoder.frames(str(path), wanted, COUNT, "pyav", places=places, kept=kept)


def places_of(rows: np.ndarray, wanted: list[int]) -> Any:
    return Listed(*rows).places(wanted)


def test_a_stream_that_lost_a_frame_is_not_decoded_to_its_end(tmp_path: Path, decoded: list[int]) -> None:
    path = write_video(tmp_path / "a.mp4", COUNT, options={"g": "8"})
    kept = Kept()
    places = places_of(decoder.index(str(path), kept=kept)[1], [5, 10, 40])
    assert places is not None
    later = [place._replace(pts=place.pts + 1) for place in places]
    with pytest.raises(decoder.ShortStream, match="frame 5 of 48"):
        decoder.frames(str(path), [5, 10, 40], COUNT, "pyav", places=later, kept=kept)
    assert decoded == [6]


def test_frames_of_several_kinds_are_turned_and_colored_as_each_alone(tmp_path: Path) -> None:
    """What is kept between frames is of their kind."""
    kinds = [(64, 96, 90), (96, 64, 90), (64, 96, 180), (64, 96, 0), (64, 96, 270)]
    frames = []
    for height, width, rotation in kinds:
        name = f"{height} {width} {rotation}.mp4"
        path = write_video(tmp_path / name, 3, height=height, width=width, rotation=rotation)
        with av.open(str(path)) as container:
            frames += list(container.decode(video=0))
    together = Colors()
    for frame in frames[::2] + frames[1::2]:
        np.testing.assert_array_equal(together.rgb(frame, None, None), Colors().rgb(frame, None, None))


def test_frames_close_to_each_other_are_decoded_in_one_go(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In HEVC some frames come after the next key frame, which would be decoded a second time."""
    x265 = {"x265-params": "log-level=error:pools=none", "g": "4", "bf": "2"}
    path = write_video(tmp_path / "a.mp4", 16, codec="libx265", options=x265)
    expected = whole(path)
    cuts: list[object] = []
    really = decoder.from_memory

    def counting(*arguments: Any) -> Any:
        packets = really(*arguments)
        return lambda cut: cuts.append(cut) or packets(cut)

    monkeypatch.setattr(decoder, "from_memory", counting)
    for count, jumps in ((16, 1), (3, 3)):
        frames = read_frames(path, count, sampling="uniform")
        np.testing.assert_array_equal(frames.pixels, expected[frames.indices])
        assert len(cuts) == jumps
        cuts.clear()


def test_frames_that_repeat_are_one_array(tmp_path: Path) -> None:
    path = write_video(tmp_path / "a.mp4", 5, options=GROUPS)
    expected = whole(path)
    _, found = decoder.frames(str(path), [0, 0, 0, 2, 4, 4], 5, "pyav")
    np.testing.assert_array_equal(found, expected[[0, 0, 0, 2, 4, 4]])
    pixels = read_frames(path, 12, sampling="uniform").pixels
    assert pixels.base is None and pixels.shape == (12, 64, 96, 3)
