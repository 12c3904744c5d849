import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from video_files import write_video

from tempme_vl.data import decoder, decoder_process, video
from tempme_vl.data.decoder_process import DecoderProcess, DecoderTimeout
from tempme_vl.data.pictures import DecodeError
from tempme_vl.data.video import VideoError, read_frames

# A decoder that hangs or crashes on files of these names; its other answers are the real one's.
FAULTY = f"""
import os, runpy, time
real = runpy.run_path({decoder.__file__!r})

def faulty(path, **arguments):
    name = os.path.basename(path)
    if "hang" in name and ("pyav" not in name or arguments["backend"] == "pyav"):
        time.sleep(1000)
    if "crash" in name:
        os.abort()
    if "killed" in name and not os.path.exists(path + ".seen"):
        open(path + ".seen", "w").close()
        os.kill(os.getpid(), 9)
    if "greedy" in name:
        bytearray(1 << 30)  # whatever the header said
    if "slow" in name:
        time.sleep(0.4)
    if "noise" in name:
        os.write(1, b"a library's chatter")
    return real["frames"](path, **arguments)

real["serve"]({{"index": real["index"], "frames": faulty}})
"""


@pytest.fixture
def faulty(tmp_path, monkeypatch):
    script = tmp_path / "faulty.py"
    script.write_text(FAULTY)
    process = DecoderProcess(script)
    monkeypatch.setattr(video, "_decoder_process", process)
    yield process
    process.close()


def test_with_and_without_a_limit_the_frames_are_the_same(tmp_path):
    path = write_video(tmp_path / "a.mp4")
    here, there = read_frames(path, 6), read_frames(path, 6, timeout=60)
    np.testing.assert_array_equal(here.pixels, there.pixels)
    np.testing.assert_array_equal(here.indices, there.indices)
    assert here.backend == there.backend
    assert there.pixels.flags.writeable


def test_a_hanging_decoder_is_stopped_and_the_next_call_works(tmp_path, faulty):
    good, bad = write_video(tmp_path / "good.mp4"), write_video(tmp_path / "hang.mp4")
    read_frames(good, 4, timeout=60)  # the process has started
    began = time.monotonic()
    with pytest.raises(VideoError, match=r"hang\.mp4: decoding did not finish within 0\.6 s"):
        read_frames(bad, 4, timeout=0.6)
    assert time.monotonic() - began < 5
    assert read_frames(good, 4, timeout=60).pixels.shape == (4, 64, 96, 3)


def test_decord_answers_when_only_pyav_hangs(tmp_path, faulty):
    path = write_video(tmp_path / "hang pyav.mp4")
    assert read_frames(path, 4, timeout=6).backend == "decord"


def test_a_crash_is_an_error_and_the_next_call_works(tmp_path, faulty):
    good, bad = write_video(tmp_path / "good.mp4"), write_video(tmp_path / "crash.mp4")
    with pytest.raises(VideoError, match=r"crash\.mp4.*pyav: the decoder crashed \(signal 6\); decord: the decoder"):
        read_frames(bad, 4, timeout=60)
    assert read_frames(good, 4, timeout=60).backend == "pyav"


def test_a_process_that_was_killed_says_nothing_of_its_video(tmp_path, faulty):
    path = write_video(tmp_path / "killed.mp4")
    frames = read_frames(path, 4, timeout=60)
    np.testing.assert_array_equal(frames.pixels, read_frames(path, 4).pixels)
    assert (tmp_path / "killed.mp4.seen").exists()


class Interruption(Exception):
    """Of a user's own time limit."""


@pytest.mark.parametrize("delay", [0.0001, 0.001, 0.003, 0.01, 0.05, 0.2])
def test_an_interrupted_call_leaves_no_answer_for_the_next(tmp_path, faulty, delay):
    slow, other = write_video(tmp_path / "slow.mp4"), write_video(tmp_path / "other.mp4", 30, height=48)
    expected = read_frames(other, 4)
    read_frames(other, 4, timeout=60)  # the process has started

    def interrupt(*_):
        raise Interruption

    before = signal.signal(signal.SIGALRM, interrupt)
    try:
        with pytest.raises(Interruption):
            signal.setitimer(signal.ITIMER_REAL, delay)
            read_frames(slow, 4, timeout=60)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    got = read_frames(other, 4, timeout=60)
    np.testing.assert_array_equal(got.pixels, expected.pixels)
    np.testing.assert_array_equal(got.indices, expected.indices)


def test_the_end_of_a_process_waits_for_no_lock_of_popen(tmp_path, faulty, monkeypatch):
    """An exception of a signal handler inside `Popen.poll` may leave it taken, and `Popen.wait` then never returns."""
    read_frames(write_video(tmp_path / "a.mp4"), 2, timeout=60)
    child = faulty._process
    for method in ("wait", "kill", "poll"):
        monkeypatch.setattr(child, method, lambda *_, **__: pytest.fail("it may wait for ever"))
    faulty.close()
    assert child.returncode == -signal.SIGKILL
    with pytest.raises(ProcessLookupError):
        os.kill(child.pid, 0)


def test_a_number_that_may_be_another_processs_gets_no_signal(tmp_path, faulty, monkeypatch):
    """An interrupted `Popen.poll` may have reaped the process without telling."""
    path = write_video(tmp_path / "a.mp4")
    read_frames(path, 2, timeout=60)
    child = faulty._process
    child.send_signal(signal.SIGKILL)
    os.waitpid(child.pid, 0)
    monkeypatch.setattr(os, "kill", lambda *_: pytest.fail("it may be another process"))
    faulty.close()
    monkeypatch.undo()
    assert child.returncode is not None


def test_a_signal_handler_may_read_a_video_itself(tmp_path, faulty):
    slow, other = write_video(tmp_path / "slow.mp4"), write_video(tmp_path / "other.mp4", 30, height=48)
    read_frames(other, 4, timeout=60)
    inside = []
    before = signal.signal(signal.SIGALRM, lambda *_: inside.append(read_frames(other, 4, timeout=60)))
    try:
        signal.setitimer(signal.ITIMER_REAL, 0.2)
        outside = read_frames(slow, 4, timeout=60)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    np.testing.assert_array_equal(inside[0].pixels, read_frames(other, 4).pixels)
    np.testing.assert_array_equal(outside.pixels, read_frames(slow, 4).pixels)


def test_what_is_wrong_in_an_exchange_does_not_outlive_it(tmp_path, faulty, monkeypatch):
    """Any exception, not only a signal's: here, no memory for the answer."""
    slow, other = write_video(tmp_path / "slow.mp4"), write_video(tmp_path / "other.mp4", 30, height=48)
    read_frames(other, 4, timeout=60)
    with monkeypatch.context() as patch:
        patch.setattr(decoder, "read_message", lambda stream: (_ for _ in ()).throw(MemoryError))
        with pytest.raises(MemoryError):
            read_frames(slow, 4, timeout=60)
    assert read_frames(other, 4, timeout=60).pixels.shape == (4, 48, 96, 3)


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux limits what a process maps")
def test_the_child_cannot_grow_beyond_the_limit(tmp_path, faulty):
    greedy, good = write_video(tmp_path / "greedy.mp4"), write_video(tmp_path / "good.mp4")
    with pytest.raises(VideoError, match=r"greedy\.mp4: it takes more than the 0\.5 GiB of memory that are allowed"):
        read_frames(greedy, 4, timeout=60, memory_gib=0.5)
    assert read_frames(good, 4, timeout=60, memory_gib=0.5).pixels.shape == (4, 64, 96, 3)
    for memory in (2.0, None):  # a limit is one call's
        assert read_frames(greedy, 4, timeout=60, memory_gib=memory).pixels.shape == (4, 64, 96, 3)


def test_the_terminal_interrupt_does_not_end_the_child(tmp_path, faulty):
    path = write_video(tmp_path / "a.mp4")
    read_frames(path, 4, timeout=60)
    first = faulty._process
    for number in (signal.SIGINT, signal.SIGTERM):
        first.send_signal(number)
    read_frames(path, 4, timeout=60)
    assert faulty._process is first


def test_what_libraries_print_does_not_enter_the_protocol(tmp_path, faulty):
    assert read_frames(write_video(tmp_path / "noise.mp4"), 4, timeout=60).pixels.shape == (4, 64, 96, 3)


def test_the_child_lives_on_between_calls_and_is_given_up_after_a_fork(tmp_path, faulty):
    path = write_video(tmp_path / "a.mp4")
    read_frames(path, 4, timeout=60)
    first = faulty._process
    read_frames(path, 4, timeout=60)
    assert faulty._process is first
    child = os.fork()
    if child == 0:
        works = faulty._process is None and read_frames(path, 4, timeout=60).backend == "pyav"
        faulty.close()
        os._exit(0 if works else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert read_frames(path, 4, timeout=60).backend == "pyav"
    assert faulty._process is first


def test_the_child_ends_with_its_parent_even_while_it_hangs(faulty):
    receiver, sender = os.pipe()
    parent = os.fork()
    if parent == 0:
        faulty.start()
        os.write(sender, str(faulty._process.pid).encode())
        faulty.call("frames", 500, path="hang.mp4", indices=[0], num_raw=1, backend="pyav")
        os._exit(0)
    decoder_pid = int(os.read(receiver, 100))
    time.sleep(0.3)  # it hangs now
    assert is_running(decoder_pid)
    os.kill(parent, signal.SIGKILL)
    os.waitpid(parent, 0)
    deadline = time.monotonic() + 30
    while is_running(decoder_pid) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert not is_running(decoder_pid)


def is_running(pid: int) -> bool:
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_the_decoder_imports_little() -> None:
    """No torch, and of this package only what reads packets and makes pictures."""
    check = (
        "import runpy, sys; sys.path.append(sys.argv[2]); runpy.run_path(sys.argv[1]); "
        "print(*(name for name in sys.modules if name.split('.')[0] in ('torch', 'tempme_vl')))"
    )
    run = [sys.executable, "-c", check, decoder.__file__, decoder_process._PACKAGES]
    found = subprocess.run(run, timeout=60, capture_output=True, text=True, check=True).stdout.split()
    own = {f"tempme_vl.data.{name}" for name in ("listing", "opened", "packets", "pictures", "seeking")}
    assert set(found) == own | {"tempme_vl", "tempme_vl.data"}


def test_a_script_that_does_not_start_is_an_error(tmp_path):
    script = tmp_path / "broken.py"
    script.write_text("raise SystemExit(3)")
    with pytest.raises(DecodeError, match=r"did not start \(exit status 3\)"):
        DecoderProcess(script).call("index", 60, path="a.mp4")


def test_timeout_of_a_single_call(faulty, tmp_path):
    with pytest.raises(DecoderTimeout, match=r"did not finish within 0\.3 s"):
        faulty.call("frames", 0.3, path="hang", indices=[0], num_raw=1, backend="pyav")
