"""One frame of a video, found by seeking: a page shows many of them, and listing all frames of a film takes seconds.

This file is also run as a script, in a process that can be killed (`tempme_vl.data.decoder_process`): it imports only
what tempme_vl/data/decoder.py does.
"""

from __future__ import annotations

from pathlib import Path

import av
import numpy as np

from tempme_vl.data.decoder import Answer, serve
from tempme_vl.data.decoder_process import DecoderProcess
from tempme_vl.data.pictures import DecodeError, Pictures
from tempme_vl.data.video import read_frames

SECONDS = 20.0  # to decode one frame
MEMORY = 2 << 30  # bytes that this may take


def still(path: str, time: float, memory: int) -> Answer:
    """The frame (1, H, W, 3) uint8 that is shown at a time, seconds after the start; behind the last frame that one.

    Raises:
        DecodeError: a stream that cannot be read or sought in.
    """
    pictures = Pictures([1], None, memory)
    try:
        with av.open(path) as container:
            stream = container.streams.best("video")
            if not isinstance(stream, av.VideoStream) or not stream.time_base:
                raise DecodeError("no video stream in it")
            pictures.check(stream.codec_context.width, stream.codec_context.height)
            stream.codec_context.thread_count = 1
            wanted = (stream.start_time or 0) + round(time / stream.time_base)
            container.seek(wanted, stream=stream)  # to the last frame before it from which others can be decoded
            shown = None
            for frame in container.decode(stream):
                if shown is not None and (frame.pts is None or frame.pts > wanted):
                    break
                shown = frame
            if shown is None:
                raise DecodeError("no frame is there")
            pictures.take(shown)
    except (av.FFmpegError, OSError, UnicodeDecodeError) as error:
        raise DecodeError(str(error)) from error
    assert pictures.array is not None
    return {}, pictures.array


_process = DecoderProcess(__file__)


def read_still(file: Path, time: float) -> np.ndarray:
    """As `still`, (H, W, 3), in a process with limits. A file that cannot be sought in is read as for an index.

    Raises:
        VideoError: it cannot be read.
    """
    try:
        # absolute: FFmpeg takes what stands before a colon for a protocol
        return _process.call("still", SECONDS, path=str(file.resolve()), time=time, memory=MEMORY)[1][0]
    except DecodeError:
        # an interval that is shorter than a frame yields the frame shown at its start
        return read_frames(file, 1, sampling="uniform", start=time, end=time + 1e-3, timeout=SECONDS).pixels[0]


if __name__ == "__main__":
    serve({"still": still})
