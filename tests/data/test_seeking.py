"""A few frames of a long stream: the very frames of decoding it whole, with a small part of the work."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import av
import numpy as np
import pytest
from video_files import write_video

from tempme_vl.data import decoder, seeking
from tempme_vl.data.listing import timed
from tempme_vl.data.packets import Units
from tempme_vl.data.seeking import Cut, Listed, Place, Unsure, frames_at, from_file, from_memory
from tempme_vl.data.video import read_frames

QUIET = {"x265-params": "log-level=error:pools=none"}
GROUPS = {"g": "8", "bf": "2"}
LAYERS = {"x265-params": "log-level=error:pools=none:temporal-layers=2:keyint=16:bframes=3"}
STREAMS: dict[str, tuple[str, dict[str, Any]]] = {
    "groups": ("a.mp4", {"options": GROUPS}),
    "one group": ("a.mkv", {"options": {"g": "100", "bf": "3"}}),
    "open groups": ("a.mp4", {"options": GROUPS | {"x264-params": "open-gop=1"}}),
    "refreshed by columns": ("a.mp4", {"options": GROUPS | {"x264-params": "intra-refresh=1"}}),
    "key frames alone": ("a.mov", {"codec": "mjpeg", "pixel_format": "yuvj420p"}),
    "transport stream": ("a.ts", {"options": GROUPS}),
    "edit list": ("a.mp4", {"shift": -7, "options": GROUPS}),
    "late start": ("a.mp4", {"shift": 9, "options": GROUPS}),
    "HEVC, open groups": ("a.mp4", {"codec": "libx265", "options": QUIET | GROUPS}),
    "HEVC, in a transport stream": ("a.ts", {"codec": "libx265", "options": QUIET | GROUPS}),
    "HEVC, layers in time": ("a.mp4", {"codec": "libx265", "options": LAYERS}),
    "VP8": ("a.webm", {"codec": "libvpx", "options": {"g": "8"}}),
    "VP8, hidden frames": (
        "a.webm",
        {"codec": "libvpx", "options": {"g": "20", "auto-alt-ref": "1", "lag-in-frames": "8"}},
    ),
    "VP9": ("a.webm", {"codec": "libvpx-vp9", "options": {"g": "8"}}),
    "AV1": ("a.mkv", {"codec": "libsvtav1", "options": {"g": "8", "preset": "12", "svtav1-params": "lp=1"}}),
    "MPEG-2": ("a.mkv", {"codec": "mpeg2video", "options": GROUPS}),
    "MPEG-4": ("a.mp4", {"codec": "mpeg4", "options": GROUPS}),
}
COUNT = 48


def located(path: Path) -> tuple[Listed, np.ndarray]:
    """The frames of a file, and their pixels by decoding it from its start."""
    listed = Listed(*decoder.index(str(path))[1])
    count = len(listed.times)
    return listed, decoder.frames(str(path), list(range(count)), count, "pyav")[1]


def pictures(path: Path, places: list[Place] | None, kept: bool = False) -> np.ndarray:
    """Raises Unsure. `kept`: of packets in memory."""
    assert places is not None
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        if kept:
            packets = from_memory(stream, [packet for packet in container.demux(stream) if packet.size])
        else:
            packets = from_file(container, stream)
        frames = frames_at(stream.codec_context, packets, places)
        return np.stack([frame.to_ndarray(format="rgb24") for frame in frames])


@pytest.mark.parametrize("kept", [False, True])
@pytest.mark.parametrize("stream", STREAMS)
def test_any_frames_are_those_of_the_whole_stream(tmp_path: Path, stream: str, kept: bool) -> None:
    name, options = STREAMS[stream]
    path = write_video(tmp_path / name, **{"num_frames": COUNT, **options})
    listed, whole = located(path)
    everything = list(range(len(whole)))
    rng = np.random.default_rng(0)
    choices = [[number] for number in everything[::3]] + [everything, everything[-1:]]
    choices += [sorted(rng.choice(everything, 5, replace=False).tolist()) for _ in range(5)]
    for numbers in choices:
        np.testing.assert_array_equal(pictures(path, listed.places(numbers), kept), whole[numbers])


# Packets given to the decoder for one frame; decoding from the start takes 24.5.
WORK = {"groups": 5, "transport stream": 5, "open groups": 22, "HEVC, open groups": 5, "VP9": 6, "key frames alone": 1}


@pytest.mark.parametrize("stream", WORK)
def test_little_is_decoded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stream: str) -> None:
    name, options = STREAMS[stream]
    path = write_video(tmp_path / name, **{"num_frames": COUNT, **options})
    listed, _ = located(path)
    rounds: list[object] = []
    needed = seeking._needed

    def counting(*given: Any) -> Any:
        for packet in needed(*given):
            rounds.append(packet)
            yield packet

    monkeypatch.setattr(seeking, "_needed", counting)
    for number in range(COUNT):
        pictures(path, listed.places([number]))
    assert len(rounds) / COUNT - 1 <= WORK[stream]  # the last round takes what is left in the decoder


def test_a_stream_that_is_not_what_its_packets_promise_is_decoded_from_the_start(tmp_path: Path) -> None:
    path = write_video(tmp_path / "a.mp4", COUNT, options=GROUPS)
    listed, whole = located(path)
    (good,) = listed.places([30]) or []
    assert good.cut is not None
    between = Cut(good.cut.pts + 1, good.cut.dts)
    no_key = Cut(*(int(row[29]) for row in (listed.pts, listed.dts)))
    with pytest.raises(Unsure):
        pictures(path, [good._replace(pts=good.pts + 1)])
    for place in (good._replace(cut=between), good._replace(cut=no_key)):
        for kept in (False, True):
            with pytest.raises(Unsure):
                pictures(path, [place], kept)
        np.testing.assert_array_equal(decoder.frames(str(path), [30], COUNT, "pyav", places=[place])[1], whole[[30]])


@pytest.mark.parametrize("place", [14, 29, 36])
def test_a_damaged_picture_is_the_one_of_the_whole_stream(tmp_path: Path, place: int) -> None:
    """FFmpeg hides damage by what it decoded before, which lies in front of the cut."""
    path = write_video(tmp_path / "a.mp4", COUNT, options=GROUPS)
    with av.open(str(path)) as container:
        packet = [packet for packet in container.demux(video=0) if packet.size][place]
    data = bytearray(path.read_bytes())
    assert packet.pos is not None
    data[packet.pos + packet.size // 2] ^= 0x10
    path.write_bytes(data)
    listed, whole = located(path)
    for number in range(COUNT):
        _, found = decoder.frames(str(path), [number], COUNT, "pyav", places=listed.places([number]))
        np.testing.assert_array_equal(found, whole[[number]])


def test_a_frame_that_the_decoder_calls_damaged_is_not_believed() -> None:
    with pytest.raises(Unsure):
        damaged = SimpleNamespace(decode=lambda packet: [SimpleNamespace(pts=3, is_corrupt=True)])
        list(seeking._decoded(damaged, iter([SimpleNamespace(pts=3, is_discard=False)]), None, {3}))


def test_frames_that_come_out_in_another_order_are_not_believed(tmp_path: Path) -> None:
    """AVI has no times of B frames: FFmpeg numbers packets as they lie in the file."""
    path = write_video(tmp_path / "a.avi", COUNT, options=GROUPS)
    listed, _ = located(path)
    assert len(set(listed.pts)) == COUNT
    with pytest.raises(Unsure):
        pictures(path, listed.places(list(range(COUNT))))


def test_where_timestamps_lack_nothing_is_known_of_places(tmp_path: Path) -> None:
    path = write_video(tmp_path / "a.mp4", 5)
    assert Listed(*decoder.index(str(path), exact=True)[1]).places([0, 4]) is None
    assert Listed(*timed([(0, 0, False), (None, 1, True)], 0.1, 10.0)).places([0]) is None
    assert Listed(*timed([(0, 0, False), (0, 1, True)], 0.1, 10.0)).places([1]) is None
    assert Listed(*timed([(8, 0, False), (3, None, True)], 0.1, 10.0)).places([0, 1]) == [
        Place(3, Cut(3, 3)),
        Place(8, Cut(3, 3)),
    ]


def units(*parts: str, start_codes: bool = False) -> memoryview:
    data = [bytes.fromhex(part) for part in parts]
    fronts = [b"\0\0\1" if start_codes else len(part).to_bytes(4, "big") for part in data]
    return memoryview(b"".join(front + part for front, part in zip(fronts, data, strict=True)))


AVC, HVC, HVC_OF_TWO = (
    bytes.fromhex(text) for text in ("014d401fff", "01" + 20 * "00" + "0f", "01" + 20 * "00" + "17")
)


@pytest.mark.parametrize("start_codes", [False, True])
def test_units_of_h264(start_codes: bool) -> None:
    """nal_unit_type and nal_ref_idc of H.264's table 7-1: 67 and 68 are parameter sets, 06 tells more."""
    of = Units.of("h264", b"" if start_codes else AVC)
    cases = {
        ("6742", "68ce", "65aa"): (True, False),  # an IDR picture
        ("6742", "68ce", "0605", "41aa"): (False, False),
        ("09f0", "01aa", "01bb"): (False, True),
        ("01aa", "41bb"): (False, False),  # of two fields one is referred to
        ("0605",): (False, False),
        (): (False, False),
    }
    for parts, (cut, unused) in cases.items():
        packet = units(*parts, start_codes=start_codes)
        assert (of.is_cut(packet), of.is_idr(packet), of.is_unused(packet)) == (cut, cut, unused), parts


def test_units_of_hevc() -> None:
    """nal_unit_type of H.265's table 7-1: 40 is a parameter set."""
    of = Units.of("hevc", HVC)
    cases = {
        ("4001", "2601aa"): (True, True, False),  # IDR_W_RADL
        ("4001", "2a01aa"): (True, False, False),  # CRA
        ("0001aa",): (False, False, True),  # TRAIL_N
        ("0201aa",): (False, False, False),  # TRAIL_R
        ("1001aa", "1201aa"): (False, False, False),  # RASL_N and RASL_R
    }
    for parts, expected in cases.items():
        packet = units(*parts)
        assert (of.is_cut(packet), of.is_idr(packet), of.is_unused(packet)) == expected, parts
    assert not Units.of("hevc", HVC_OF_TWO).is_unused(units("0001aa"))  # the second layer may refer to it
    assert not Units.of("hevc", b"").is_unused(units("0001aa", start_codes=True))


def test_units_that_are_cut_off_or_none() -> None:
    of = Units.of("h264", AVC)
    for data in (b"", b"\0", b"\0\0\0\0", b"\0\0\0\5", b"\xff\xff\xff\xff\x65"):
        assert not of.is_unused(memoryview(data))
    for codec, cut in (("mpeg4", True), ("gif", False)):
        assert Units.of(codec, b"").is_cut(memoryview(b"")) is cut
        assert not Units.of(codec, b"").is_unused(memoryview(b""))


def cut_off(source: Path, target: Path, packets: int) -> Path:
    """A stream without its first packets, as a recording that began in the middle."""
    with av.open(str(source)) as read, av.open(str(target), "w") as written:
        stream = read.streams.video[0]
        out = written.add_stream_from_template(stream)
        for number, packet in enumerate(read.demux(stream)):
            if packet.dts is not None and number >= packets:
                packet.stream = out
                written.mux(packet)
    return target


@pytest.mark.parametrize(("start", "end"), [(0.0, 0.9), (3.0, 4.0), (2.0, None)])
def test_frames_of_a_stream_without_its_start_have_their_own_times(
    start: float, end: float | None, tmp_path: Path
) -> None:
    """Its first packets refer to what is gone and give no frames, so that positions are not those of packets."""
    whole = write_video(tmp_path / "a.mp4", 60, options={"g": "8", "bf": "3"})
    path = cut_off(whole, tmp_path / "a.ts", 5)
    with av.open(str(path)) as container:
        decoded = [(frame.pts, frame.to_ndarray(format="rgb24")) for frame in container.decode(video=0)]
        step = float(container.streams.video[0].time_base)
    found = read_frames(path, 2, start=start, end=end, timeout=None)
    shown = {round((pts - decoded[0][0]) * step, 3): pixels for pts, pixels in decoded}
    for time, pixels in zip(found.times, found.pixels, strict=True):
        assert np.array_equal(pixels, shown[round(float(time), 3)])


def test_another_frame_than_packets_promise_is_not_taken_for_it(tmp_path: Path) -> None:
    path = write_video(tmp_path / "a.mp4", 20, options={"g": "8"})
    with av.open(str(path)) as container:
        second = [frame.pts for frame in container.decode(video=0)][1]
    assert decoder.frames(str(path), [1], 20, "pyav", places=[Place(second, None)])[1].shape[0] == 1
    with pytest.raises(decoder.ShortStream, match="frame 1 of 20 is not the one that its packets promise"):
        decoder.frames(str(path), [1], 20, "pyav", places=[Place(second + 1, None)])
