"""A decoder in a process of its own, which is killed when it takes too long and started again when needed."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from tempme_vl.data import decoder
from tempme_vl.data.pictures import DecodeError

_PACKAGES = str(Path(__file__).parents[2])
START_LIMIT = 120.0  # seconds for a fresh interpreter to import numpy, PyAV


class DecoderTimeout(DecodeError):
    """The limit passed; the process was killed."""


class DecoderCrash(DecodeError):
    """The process ended by itself, or something ended it."""


class DecoderProcess:
    """Calls the handlers of a script like decoder.py in a child process, each with a time limit.

    The child starts with the first call, lives on between calls, and ends with this process. It is an ordinary
    subprocess, since multiprocessing forbids children of the daemonic workers of a DataLoader.
    """

    def __init__(self, script: str | Path = decoder.__file__) -> None:
        self._script = str(script)
        self._process: subprocess.Popen[bytes] | None = None
        self._owes_an_answer = False
        self._lock = threading.RLock()
        os.register_at_fork(after_in_child=self._forget)

    def call(self, name: str, timeout: float, **arguments: Any) -> decoder.Answer:
        """Runs one handler. A child that dies is replaced once: what ended it need not have been the video.

        Raises:
            DecodeError: with its cause.
            DecoderTimeout: after `timeout` seconds, both tries together.
        """
        with self._lock:
            self.start()
            deadline = time.monotonic() + timeout
            try:
                return self._try(name, arguments, timeout)
            except DecoderCrash:
                left = deadline - time.monotonic()
                self.start()
                return self._try(name, arguments, max(left, 0.001))

    def start(self) -> None:
        """Starts the child unless it runs. Done by `call`, outside its time limit."""
        with self._lock:
            # A call may have been left at any point, by an exception of a signal handler or a handler that reads a
            # video itself: the answer still owed is not the next call's.
            if self._owes_an_answer or (self._process is not None and self._process.poll() is not None):
                self.close()
            if self._process is None:
                self._process = self._start()

    def close(self) -> None:
        """Ends the child, if there is one."""
        with self._lock:
            if self._process is not None:
                _end(self._process)
                self._process = None
            self._owes_an_answer = False

    def _try(self, name: str, arguments: dict[str, Any], timeout: float) -> decoder.Answer:
        process = self._process
        assert process is not None
        self._owes_an_answer = True
        try:
            request = {"call": name, "arguments": arguments}
            meta, array = _limited(process, timeout, lambda: _exchange(process, request))
        except (EOFError, BrokenPipeError) as error:
            how = _end(process, patience=5.0)
            raise DecoderCrash(f"the decoder crashed ({how})") from error
        except BaseException:
            _end(process)
            raise
        self._owes_an_answer = False
        if "error" in meta:
            raise getattr(decoder, meta["kind"])(meta["error"])
        return meta, array

    def _start(self) -> subprocess.Popen[bytes]:
        # Not `python decoder.py`: that would put this folder in front of the import path. This package's is put behind.
        run = "import runpy, sys; sys.path.append(sys.argv[2]); runpy.run_path(sys.argv[1], run_name='__main__')"
        process = subprocess.Popen(
            [sys.executable, "-c", run, self._script, _PACKAGES],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
        )
        stdout = process.stdout
        assert stdout is not None
        try:
            _limited(process, START_LIMIT, lambda: decoder.read_message(stdout))
        except EOFError as error:
            raise DecodeError(f"the decoder process did not start ({_end(process, patience=5.0)})") from error
        except BaseException:
            _end(process)
            raise
        return process

    def _forget(self) -> None:
        """After a fork the child belongs to the parent; this copy closes its ends of the pipes."""
        self._lock = threading.RLock()
        self._owes_an_answer = False
        if self._process is not None:
            for pipe in (self._process.stdin, self._process.stdout):
                if pipe is not None:
                    pipe.close()
            self._process.returncode = 0  # not ours to wait for
            self._process = None


def _limited(process: subprocess.Popen[bytes], timeout: float, action: Callable[[], Any]) -> Any:
    """`action`, with `process` killed when it takes longer than `timeout` seconds (which ends a blocking read)."""
    expired = threading.Event()

    def expire() -> None:
        expired.set()
        process.kill()

    timer = threading.Timer(timeout, expire)
    timer.daemon = True  # one that an exception of a signal handler keeps from being cancelled holds up no exit
    try:
        timer.start()
        return action()
    except (EOFError, BrokenPipeError):
        if expired.is_set():
            raise DecoderTimeout(f"did not finish within {timeout:g} s and was stopped") from None
        raise
    finally:
        timer.cancel()


def _exchange(process: subprocess.Popen[bytes], request: dict[str, Any]) -> decoder.Answer:
    """The whole answer to a request, straight into its array: frames are large."""
    assert process.stdin is not None and process.stdout is not None
    decoder.write_message(process.stdin, request)
    process.stdin.flush()
    answer = decoder.read_message(process.stdout)
    array = np.empty(answer["shape"], answer["dtype"])
    decoder.read_into(process.stdout, array)
    return answer["meta"], array


def _end(process: subprocess.Popen[bytes], patience: float = 0.0) -> str:
    """Kills and reaps; says how it ended, by itself if it does so within `patience` seconds.

    Not by methods of Popen: an exception of a signal handler inside `poll` may leave its lock taken for ever.
    """
    code, deadline = process.returncode, time.monotonic() + patience
    known = True
    while code is None:
        try:
            pid, status = os.waitpid(process.pid, os.WNOHANG)
        except ChildProcessError:  # reaped by an interrupted `poll`: its number may be another process's by now
            code, known = 0, False
        else:
            if pid:
                code = os.waitstatus_to_exitcode(status)
            elif time.monotonic() >= deadline:
                os.kill(process.pid, signal.SIGKILL)
            time.sleep(0 if pid else 0.001)
    process.returncode = code
    for pipe in (process.stdin, process.stdout):
        if pipe is not None:
            # RuntimeError: from a signal handler that interrupts a read of this very pipe
            with contextlib.suppress(BrokenPipeError, RuntimeError):
                pipe.close()
    if not known:
        return "how is not known"
    return f"signal {-code}" if code < 0 else f"exit status {code}"
