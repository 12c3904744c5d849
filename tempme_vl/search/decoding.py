"""Files decoded by threads, each with a decoder process of its own, a little ahead of the model."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass

from tempme_vl.data.decoder_process import DecoderProcess
from tempme_vl.data.parts import FrameParts
from tempme_vl.data.video import VideoError
from tempme_vl.search.files import VideoFile

AHEAD = 2  # results a thread that wait for the model


@dataclass(frozen=True)
class Decoded:
    """Some segments of a file, or why it cannot be read."""

    file: VideoFile
    parts: FrameParts | None
    error: str = ""


Read = Callable[[VideoFile, DecoderProcess], Iterator[FrameParts]]


def decode_all(files: Sequence[VideoFile], read: Read, workers: int) -> Iterator[Decoded]:
    """All files, in no particular order where there are several workers.

    Args:
        read: the parts of a file; raises VideoError.
    """
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
                    for item in _decoded(wanted.get_nowait(), read, process):
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


def _decoded(file: VideoFile, read: Read, process: DecoderProcess) -> Iterator[Decoded]:
    try:
        for parts in read(file, process):
            yield Decoded(file, parts)
    except VideoError as error:
        yield Decoded(file, None, error.cause or str(error))
    except OSError as error:
        yield Decoded(file, None, error.strerror or str(error))
    except ValueError as error:
        yield Decoded(file, None, str(error))
