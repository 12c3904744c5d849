"""Files decoded by threads, each with a decoder process of its own, a little ahead of the model."""

from __future__ import annotations

import queue
import threading
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from tempme_vl.data.decoder_process import DecoderProcess
from tempme_vl.data.parts import FrameParts, Plan, read_parts
from tempme_vl.data.pictures import Fit
from tempme_vl.data.video import VideoError
from tempme_vl.search.files import VideoFile, inside
from tempme_vl.search.scenes import find_cuts
from tempme_vl.search.segments import Segments

AHEAD = 2  # results a thread that wait for the model


@dataclass(frozen=True)
class Decoded:
    """Some segments of a file, or why it cannot be read."""

    file: VideoFile
    parts: FrameParts | None
    error: str = ""


@dataclass(frozen=True)
class Reading:
    """How the files of a folder are read; the same in whichever process does it.

    Attributes:
        folder: the videos.
        frames, sampling: of each segment.
        scenes, timeout, memory: see `IndexOptions`.
        fit: the size that the model takes.
    """

    folder: Path
    frames: int
    sampling: str
    segments: Segments
    scenes: bool
    timeout: float | None
    memory: float | None
    fit: Fit

    def decode(self, file: VideoFile, process: DecoderProcess) -> Iterator[Decoded]:
        """The segments of a file, some at a time; the last item says why no more of it can be read."""
        try:
            for parts in self._parts(file, process):
                yield Decoded(file, parts)
        except VideoError as error:
            yield Decoded(file, None, error.cause or str(error))
        except OSError as error:
            yield Decoded(file, None, error.strerror or str(error))
        except ValueError as error:
            yield Decoded(file, None, str(error))

    def _parts(self, file: VideoFile, process: DecoderProcess) -> Iterator[FrameParts]:
        def read(frames: int, plan: Plan, sampling: str, fit: Fit) -> Iterator[FrameParts]:
            return read_parts(
                inside(self.folder, file.path),
                frames,
                plan,
                sampling=sampling,
                timeout=self.timeout,
                memory_gib=self.memory,
                fit=fit,
                process=process,
            )

        cuts = find_cuts(read) if self.scenes else ()
        return read(self.frames, partial(self.segments.of, cuts=cuts), self.sampling, self.fit)


def decode_all(files: Sequence[VideoFile], reading: Reading, workers: int) -> Iterator[Decoded]:
    """All files, in no particular order where there are several workers."""
    wanted: queue.SimpleQueue[VideoFile] = queue.SimpleQueue()
    for file in files:
        wanted.put(file)
    found: queue.Queue[Decoded | BaseException | None] = queue.Queue(AHEAD * workers)
    ended = threading.Event()

    def give(item: Decoded | BaseException | None) -> None:
        while not ended.is_set():
            with suppress(queue.Full):
                return found.put(item, timeout=0.1)

    def work() -> None:
        process = DecoderProcess()
        try:
            with suppress(queue.Empty):
                while not ended.is_set():
                    for item in reading.decode(wanted.get_nowait(), process):
                        give(item)
        except BaseException as error:  # for the thread that waits
            give(error)
        finally:
            process.close()
            give(None)

    threads = [threading.Thread(target=work, daemon=True) for _ in range(workers)]
    for thread in threads:
        thread.start()
    try:
        left = workers
        while left:
            item = found.get()
            if isinstance(item, BaseException):
                raise item
            if item is None:
                left -= 1
            else:
                yield item
    finally:
        ended.set()
        for thread in threads:
            thread.join(timeout=1.0)  # one may be decoding; its process ends with this one
