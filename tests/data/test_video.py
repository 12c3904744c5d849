import os
import pickle
import socket
import tracemalloc

import av
import decord
import numpy as np
import pytest
from video_files import picture, write_video

from tempme_vl.data import video
from tempme_vl.data.pictures import DecodeError, Fit
from tempme_vl.data.transforms import Preprocess, resize
from tempme_vl.data.video import VideoError, read_frames

# Seeking into groups of pictures with B frames is where decoders go wrong.
GROUPS = {"g": "8", "bf": "2"}


def nearest(pixels: np.ndarray, count: int, turns: int = 0) -> list[int]:
    """Which `picture` each frame shows, turned by `turns` quarter turns counterclockwise."""
    size = pixels.shape[1:3] if turns % 2 == 0 else pixels.shape[2:0:-1]
    known = np.stack([np.rot90(picture(number, *size), turns) for number in range(count)]).astype(int)
    if (pixels == pixels[..., :1]).all():  # a grey video
        known = known @ [[0.299] * 3, [0.587] * 3, [0.114] * 3]
    return [int(np.abs(known - frame.astype(int)).mean((1, 2, 3)).argmin()) for frame in pixels]


VARIANTS = {
    "groups": {"num_frames": 60, "options": GROUPS},
    "vfr": {"num_frames": 12, "times": [0, 1, 2, 7, 8, 20, 21, 22, 23, 40, 41, 60]},
    "late start": {"shift": 9},
    "444 odd size": {"height": 65, "width": 97, "pixel_format": "yuv444p"},
    "full range": {"pixel_format": "yuvj420p"},
    "grey": {"pixel_format": "gray"},
    "rotated 90": {"rotation": 90},
    "rotated 180": {"rotation": 180},
    "rotated 270": {"rotation": 270},
    "rotated 90, odd size": {"rotation": 90, "height": 65, "width": 97, "pixel_format": "yuv444p"},
    "half a frame a second": {"num_frames": 3, "fps": 1, "times": [0, 2, 4]},
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_decord_and_pyav_return_the_same_bits_and_the_right_pictures(tmp_path, variant):
    options = VARIANTS[variant]
    path = write_video(tmp_path / "a.mp4", **{"num_frames": 20, **options})
    count = options.get("num_frames", 20)
    for num_frames in (1, 5, 12):
        by_decord = read_frames(path, num_frames, backend="decord")
        by_pyav = read_frames(path, num_frames, backend="pyav")
        assert (by_decord.backend, by_pyav.backend) == ("decord", "pyav")
        assert by_decord.pixels.dtype == np.uint8
        assert by_decord.fps == by_pyav.fps
        np.testing.assert_array_equal(by_decord.indices, by_pyav.indices)
        np.testing.assert_array_equal(by_decord.pixels, by_pyav.pixels)
        turns = -options.get("rotation", 0) // 90
        assert nearest(by_pyav.pixels, count, turns) == by_pyav.indices.tolist()


# What decord decodes inexactly or not at all: each is left to PyAV, and the frames are right.
LEFT_TO_PYAV = {
    "open groups": ("a.mp4", {"num_frames": 60, "options": GROUPS | {"x264-params": "open-gop=1"}}, "later frames"),
    "B frames of MPEG-4": (
        "a.mp4",
        {"num_frames": 60, "codec": "mpeg4", "options": {"bf": "2"}},
        "before the key frame",
    ),
    "edit list": ("a.mp4", {"num_frames": 20, "shift": -7, "options": {"bf": "2"}}, "edit list"),
    "h264 in avi": ("a.avi", {"num_frames": 60, "options": GROUPS}, "decord"),
    "transport stream": ("a.ts", {"num_frames": 60, "options": GROUPS}, "mpegts"),
    "odd 4:2:0": ("a.webm", {"height": 65, "width": 97, "codec": "libvpx"}, "odd size"),
    "4:2:0 of odd height": ("a.webm", {"height": 65, "width": 96, "codec": "libvpx"}, "odd size"),
    "4:2:0 of odd width": ("a.webm", {"height": 64, "width": 97, "codec": "libvpx"}, "odd size"),
    "4:2:2": ("a.mp4", {"pixel_format": "yuv422p"}, "yuv422p"),
    "10 bit": ("a.mp4", {"pixel_format": "yuv420p10le"}, "yuv420p10le"),
    "tiny": ("a.mp4", {"height": 16, "width": 16}, "size must exactly match"),
    "gif": ("a.gif", {"codec": "gif", "pixel_format": "rgb8"}, "pixel format"),
}


@pytest.mark.parametrize("variant", LEFT_TO_PYAV)
def test_what_decord_gets_wrong_is_left_to_pyav(tmp_path, variant):
    name, options, cause = LEFT_TO_PYAV[variant]
    path = write_video(tmp_path / name, **{"num_frames": 20, **options})
    frames = read_frames(path, 7)
    assert frames.backend == "pyav"
    hidden = -min(options.get("shift", 0), 0)
    assert nearest(frames.pixels, 60) == (frames.indices + hidden).tolist()
    with pytest.raises(VideoError, match=cause):
        read_frames(path, 7, backend="decord")


@pytest.mark.parametrize(
    ("method", "answer", "cause"),
    [
        ("__len__", lambda reader: 19, "decord counts 19 frames where 20 are shown"),
        ("get_frame_timestamp", lambda reader, frames: np.zeros((20, 2)), "no usable timestamps"),
    ],
)
def test_where_decord_and_the_scan_disagree_decord_is_not_believed(tmp_path, monkeypatch, method, answer, cause):
    path = write_video(tmp_path / "a.mp4", 20)
    monkeypatch.setattr(decord.VideoReader, method, answer)
    assert read_frames(path, 7).backend == "pyav"
    with pytest.raises(VideoError, match=cause):
        read_frames(path, 7, backend="decord")


def test_a_stream_that_changes_its_size_keeps_that_of_its_first_frame(tmp_path):
    sizes = {"large.ts": (64, 96), "small.ts": (32, 48)}
    parts = [
        write_video(tmp_path / name, 10, height=height, width=width, codec="mpeg2video")
        for name, (height, width) in sizes.items()
    ]
    path = tmp_path / "both.ts"
    path.write_bytes(b"".join(part.read_bytes() for part in parts))
    frames = read_frames(path, 20, sampling="uniform")
    assert frames.pixels.shape == (20, 64, 96, 3) and frames.indices[-1] > 15
    first = frames.indices < 9  # the last one of a part may get lost where parts are put together
    assert nearest(frames.pixels[first], 10) == frames.indices[first].tolist()


@pytest.mark.parametrize("default", [0, 1])
def test_of_two_streams_the_default_one_is_read(tmp_path, default):
    path = tmp_path / "two.mp4"
    sizes = [(32, 48), (64, 96)]
    with av.open(str(path), "w") as container:
        streams = []
        for number, (height, width) in enumerate(sizes):
            stream = container.add_stream("libx264", rate=10)
            stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
            stream.disposition = av.stream.Disposition.default.value if number == default else 0
            streams.append(stream)
        for number in range(20):
            for stream in streams:
                pixels = picture(number, stream.height, stream.width)
                container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        for stream in streams:
            container.mux(stream.encode())
    # decord's older FFmpeg does not always choose the same one.
    frames = read_frames(path, 4)
    assert frames.backend == "pyav"
    assert frames.pixels.shape == (4, *sizes[default], 3)
    with pytest.raises(VideoError, match="several video streams"):
        read_frames(path, 4, backend="decord")


def test_short_videos_repeat_frames(tmp_path):
    frames = read_frames(write_video(tmp_path / "a.mp4", 3), 12)
    assert frames.pixels.shape[0] == 12
    assert nearest(frames.pixels, 3) == frames.indices.tolist()
    assert set(frames.indices) == {0, 1, 2}


def test_start_and_end_choose_by_timestamps(tmp_path):
    path = write_video(tmp_path / "a.mp4", 50)  # 5 s at 10 frames a second
    frames = read_frames(path, 10, start=1.0, end=2.0, sampling="uniform")
    assert frames.indices.tolist() == list(range(10, 20))
    assert read_frames(path, 4, start=4.8, sampling="uniform").indices.tolist() == [48, 48, 48, 49]
    assert read_frames(path, 2, end=99.0, sampling="uniform").indices.tolist() == [0, 49]
    # Between two frames: the one on show.
    assert read_frames(path, 2, start=2.52, end=2.58).indices.tolist() == [25, 25]
    # At a variable rate, time is not the index.
    varying = write_video(tmp_path / "b.mp4", 6, times=[0, 1, 2, 30, 31, 32])
    assert read_frames(varying, 3, start=2.9, end=3.15, sampling="uniform").indices.tolist() == [3, 3, 4]
    with pytest.raises(VideoError, match=r"start 7 s lies behind its last frame, shown at 4\.9 s"):
        read_frames(path, 4, start=7)


def test_a_segments_limits_are_decimals_of_times_that_are_none(tmp_path):
    path = write_video(tmp_path / "a.mp4", 60, fps=30)  # frame 20 is shown at 0.66666...
    for limit, first in ((0.666666, 20), (0.666667, 20), (0.668, 21), (0.665, 20)):
        assert read_frames(path, 2, start=limit, sampling="uniform").indices[0] == first
        assert read_frames(path, 2, end=limit, sampling="uniform").indices[-1] == first - 1


def test_times_are_those_of_the_frames_in_the_file(tmp_path):
    path = write_video(tmp_path / "a.mp4", 50)  # 10 frames a second
    for segment in ({}, {"start": 1.0, "end": 2.0}):
        frames = read_frames(path, 6, sampling="uniform", **segment)
        np.testing.assert_allclose(frames.times, frames.indices / 10, atol=1e-9)
        assert frames.times.dtype == np.float64
    shown = [0, 1, 2, 30, 31, 32]
    varying = write_video(tmp_path / "b.mp4", 6, times=shown, shift=3)
    for sampling, count in (("uniform", 6), ("uniform", 9), ("segment", 3)):
        frames = read_frames(varying, count, sampling=sampling, timeout=60)
        np.testing.assert_allclose(frames.times, np.array(shown)[frames.indices] / 10, atol=1e-9)
        assert nearest(frames.pixels, 6) == frames.indices.tolist()


def test_a_stream_that_promises_more_than_it_holds(tmp_path):
    whole = write_video(tmp_path / "a.mp4", 200, options={"g": "200", "movflags": "faststart"})
    front = write_faststart(whole, tmp_path / "front.mp4")
    cut = tmp_path / "cut.mp4"
    cut.write_bytes(front.read_bytes()[: front.stat().st_size * 6 // 10])
    with pytest.raises(VideoError, match=r"only \d+ of the 200 frames") as caught:
        read_frames(cut, 8)
    assert caught.value.path == cut


def write_faststart(source, target):
    """The same packets with the header in front."""
    with av.open(str(source)) as old, av.open(str(target), "w", options={"movflags": "faststart"}) as new:
        stream = new.add_stream_from_template(old.streams.video[0])
        for packet in old.demux(video=0):
            if packet.dts is not None:
                packet.stream = stream
                new.mux(packet)
    return target


def test_names_in_a_file_that_are_no_utf8_do_not_matter(tmp_path):
    whole, named = write_video(tmp_path / "a.mp4"), tmp_path / "named.mp4"
    data = whole.read_bytes()
    assert data.count(b"VideoHandler") == 1
    named.write_bytes(data.replace(b"VideoHandler", b"Vid\xe9o\xffandler"))
    assert np.array_equal(read_frames(named, 4, backend="pyav").pixels, read_frames(whole, 4, backend="pyav").pixels)


@pytest.mark.timeout(60)
@pytest.mark.filterwarnings("ignore:This process:DeprecationWarning")
def test_a_forked_process_reads_on(tmp_path):
    """As a loader's workers do, where the process that they come from has read videos itself."""
    path = write_video(tmp_path / "a.mp4")
    before = read_frames(path, 4, backend="pyav", timeout=None)
    child = os.fork()
    if child == 0:
        after = read_frames(path, 4, backend="pyav", timeout=None)
        os._exit(0 if np.array_equal(after.pixels, before.pixels) else 1)
    assert os.waitpid(child, 0) == (child, 0)


def test_packets_without_a_frame_of_their_own_are_not_counted(tmp_path, monkeypatch):
    path = write_video(tmp_path / "a.mkv", 20)
    index = video.decoder.HANDLERS["index"]

    def overcounting(path, exact, memory, kept):
        info, rows = index(path, exact)
        another = rows[:, -1] + [0.1, 100, 100, 0]  # seconds; milliseconds of Matroska
        return (info, rows) if exact else (info, np.column_stack([rows, another]))

    monkeypatch.setitem(video.decoder.HANDLERS, "index", overcounting)
    frames = read_frames(path, 5, sampling="uniform")
    assert frames.indices.tolist() == np.linspace(0, 19, 5).astype(int).tolist()
    assert nearest(frames.pixels, 20) == frames.indices.tolist()


def damaged(path, name, change):
    data = bytearray(path.read_bytes())
    copy = path.with_name(name)
    copy.write_bytes(bytes(change(data)))
    return copy


def test_broken_files_raise_the_typed_error(tmp_path):
    good = write_video(tmp_path / "a.mp4", 60, options=GROUPS)

    def flip(data):
        for place in range(len(data) // 4, len(data) // 2, 7):
            data[place] ^= 0xFF
        return data

    broken = [
        tmp_path / "missing.mp4",
        damaged(good, "empty.mp4", lambda data: b""),
        damaged(good, "text.mp4", lambda data: b"not a video at all"),
        damaged(good, "half.mp4", lambda data: data[: len(data) // 2]),
        damaged(good, "flipped.mp4", flip),
    ]
    for path in broken:
        for timeout in (None, 60.0):
            with pytest.raises(VideoError) as caught:
                read_frames(path, 8, timeout=timeout)
            assert isinstance(caught.value, ValueError)
            assert caught.value.path == path
            assert caught.value.cause
            assert str(path) in str(caught.value) and caught.value.cause in str(caught.value)


@pytest.mark.parametrize("timeout", [None, 60.0])
def test_what_is_no_regular_file_says_so_and_is_not_opened(tmp_path, timeout):
    os.mkfifo(tmp_path / "pipe.mp4")  # opening it would wait for ever
    (tmp_path / "folder.mp4").mkdir()
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(os.path.relpath(tmp_path / "socket.mp4"))
        cases = {
            tmp_path / "pipe.mp4": "it is a named pipe",
            tmp_path / "folder.mp4": "it is a folder",
            tmp_path / "socket.mp4": "it is a socket",
            "/dev/zero": "it is a device",
            tmp_path / "none.mp4": "No such file",
            tmp_path / "nul\0.mp4": "null",
            tmp_path / ("n" * 300): "name too long",
            "http://127.0.0.1:9/a.mp4": "No such file or directory; download it first",
        }
        for path, cause in cases.items():
            with pytest.raises(VideoError, match=cause) as caught:
                read_frames(path, 4, timeout=timeout)
            assert caught.value.path == type(caught.value.path)(path)


def test_a_file_named_like_a_protocol_is_a_file(tmp_path, monkeypatch):
    write_video(tmp_path / "a.mp4").rename(tmp_path / "concat:a.mp4")
    monkeypatch.chdir(tmp_path)
    assert read_frames("concat:a.mp4", 4).pixels.shape == (4, 64, 96, 3)


FITS = [Fit(32, "shortest", "bicubic"), Fit(40, "squash", "bilinear"), Fit(200, "shortest", "bilinear")]


@pytest.mark.parametrize("backend", ["pyav", "decord"])
@pytest.mark.parametrize("fit", FITS)
def test_frames_resized_while_they_are_read_are_those_resized_afterwards(tmp_path, backend, fit):
    path = write_video(tmp_path / "a.mp4", 20)
    preprocess = Preprocess(*fit[:1], resize=fit.resize, interpolation=fit.interpolation)
    assert preprocess.fit == fit
    for count in (4, 30):  # more than there are
        expected = resize(read_frames(path, count, backend=backend).pixels, preprocess)
        for timeout in (None, 60):
            got = read_frames(path, count, backend=backend, timeout=timeout, fit=fit)
            np.testing.assert_array_equal(got.pixels, expected)


@pytest.mark.parametrize("backend", ["pyav", "decord"])
def test_of_frames_that_are_resized_few_are_held_at_a_time(tmp_path, backend):
    path = write_video(tmp_path / "a.mp4", 24, height=512, width=512)
    one = 512 * 512 * 3

    def peak(**arguments):
        tracemalloc.start()  # numpy's arrays, where all pictures come by
        read_frames(path, 24, sampling="uniform", backend=backend, **arguments)
        try:
            return tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()

    peak(fit=Fit(32, "squash", "bicubic"))  # imports
    assert peak(fit=Fit(32, "squash", "bicubic")) < 4 * one
    assert 24 * one < peak() < 28 * one  # and of others, one copy


@pytest.mark.parametrize("backend", ["auto", "pyav", "decord"])
@pytest.mark.parametrize("timeout", [None, 60.0])
def test_a_video_beyond_the_memory_limit_is_an_error(tmp_path, backend, timeout):
    path = write_video(tmp_path / "a.mp4", 24, height=256, width=256)
    one = 256 * 256 * 3 / 2**30
    read = {"backend": backend, "timeout": timeout, "sampling": "uniform"}
    with pytest.raises(VideoError, match=r"a\.mp4: its frames of 256 x 256 pixels would take .* are allowed"):
        read_frames(path, 20, memory_gib=20 * one, **read)
    with pytest.raises(VideoError, match=r"are allowed"):
        read_frames(path, 1, memory_gib=one, fit=Fit(8, "squash", "bicubic"), **read)
    with pytest.raises(VideoError, match=r"are allowed"):  # a frame many times
        read_frames(path, 60, memory_gib=40 * one, start=1.0, end=1.1, **read)
    assert read_frames(path, 20, memory_gib=30 * one, **read).pixels.shape == (20, 256, 256, 3)
    assert read_frames(path, 20, memory_gib=7 * one, fit=Fit(8, "squash", "bicubic"), **read).pixels.shape[1] == 8
    assert read_frames(path, 20, memory_gib=None, **read).pixels.shape[0] == 20


def test_when_both_backends_fail_the_error_holds_both_causes(tmp_path, monkeypatch):
    def failing(path, backend, **arguments):
        raise DecodeError(f"{backend} is out of order")

    monkeypatch.setitem(video.decoder.HANDLERS, "frames", failing)
    with pytest.raises(VideoError, match=r"pyav is out of order.*decord is out of order"):
        read_frames(write_video(tmp_path / "a.mp4"), 4)


def test_the_error_survives_pickling_and_a_data_loader():
    error = VideoError("a.mp4", "is broken")
    copy = pickle.loads(pickle.dumps(error))
    assert (str(copy), copy.path, copy.cause) == (str(error), error.path, error.cause)
    assert str(VideoError("worker 0: a.mp4: is broken")) == "worker 0: a.mp4: is broken"


@pytest.mark.parametrize(
    "arguments",
    [
        {"num_frames": 0},
        {"sampling": "all"},
        {"backend": "opencv"},
        {"timeout": 0.0},
        {"memory_gib": 0.0},
        {"start": 3, "end": 3},
        {"start": -1},
    ],
)
def test_wrong_arguments(tmp_path, arguments):
    with pytest.raises(ValueError, match=r"expected|must be|known") as caught:
        read_frames(tmp_path / "a.mp4", **{"num_frames": 4, **arguments})
    assert not isinstance(caught.value, VideoError)
