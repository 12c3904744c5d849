"""Opening a video file, and keeping the packets of a short one, so that it need not be opened and read again."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import av
import numpy as np

from tempme_vl.data.pictures import DecodeError, TooLarge

# Bytes of packets that are kept: those of a minute of most videos, and far less than `decoder.LIBRARIES`.
PACKETS_KEPT = 2**24
PACKET_BYTES = 2**10  # of memory that a packet takes beside its data

# Titles and the like that are not UTF-8 are no reason to refuse a video; from PyAV 19 on they never are.
_LENIENT: dict[str, Any] = {"metadata_errors": "ignore"} if int(av.__version__.partition(".")[0]) < 19 else {}
# For the decoders by which FFmpeg learns of a file's streams while it is opened, and whose pictures nobody sees.
_PROBING = {"skip_loop_filter": "all"}
AVDISCARD_ALL = 48  # FFmpeg's number


# What a handler of the decoder's process returns: some JSON and an array.
Answer = tuple[dict[str, Any], np.ndarray]


def open_container(path: str) -> Any:
    return av.open(path, options=_PROBING, **_LENIENT)


def video_stream(container: Any) -> Any:
    """The stream that FFmpeg calls best; packets of others are not read from now on. Raises DecodeError."""
    stream = container.streams.best("video")
    if stream is None:
        raise DecodeError("no video stream in it")
    if stream.codec_context is None:
        raise DecodeError("no decoder for the codec of its video stream")
    for other in container.streams:
        if other.index != stream.index and hasattr(other, "discard"):  # from PyAV 18 on
            other.discard = AVDISCARD_ALL
    return stream


def typed(error: Exception, memory: int | None, where: str = "") -> DecodeError:
    """The error of a library with its cause alone; its message may hold the path."""
    if isinstance(error, MemoryError) and memory is not None:
        return TooLarge(f"it takes more than the {memory / 2**30:.3g} GiB of memory that are allowed")
    return DecodeError((getattr(error, "strerror", None) or str(error) or repr(error)) + where)


class Packets:
    """The packets of a stream, in the file's order, as long as they are few: then `all` is empty and `few` false."""

    def __init__(self) -> None:
        self.all: list[Any] = []
        self.few = True
        self._size = 0

    def add(self, packet: Any, size: int) -> None:
        """`size`: of its data, in bytes."""
        self._size += size + PACKET_BYTES
        if self._size <= PACKETS_KEPT:
            self.all.append(packet)
        elif self.few:
            self.few = False
            self.all.clear()


class Kept:
    """What is known of the file that was listed last.

    Attributes:
        path: of it.
        times: (n,) of its frames by its packets, sorted, in the stream's time base; NaN: not known.
        in_order: whether frames come out of the decoder in the order of their packets' times.
        counted: whether decoding has shown that the frames are those of the packets.
        stream: open, its packets read and not decoded; None: they were too many, or have been taken.
        packets: of the stream.
    """

    def __init__(self) -> None:
        self._close: Callable[[], None] = lambda: None
        self.forget()

    def forget(self) -> None:
        self.release()
        self.remember("", np.empty(0), True)

    def remember(self, path: str, times: np.ndarray, in_order: bool) -> None:
        self.path, self.times, self.in_order, self.counted = path, times, in_order, False

    def hold(self, stream: Any, packets: Sequence[Any], close: Callable[[], None]) -> None:
        """`close`: closes the file of the stream."""
        self.stream, self.packets, self._close = stream, packets, close

    def release(self) -> None:
        """Closes the file and lets its packets go."""
        close = self._close
        self.hold(None, (), lambda: None)
        close()
