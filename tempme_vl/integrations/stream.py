"""A video that is encoded while it comes in."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from PIL.Image import Image
from torch import Tensor

from tempme_vl.integrations.base import Host, VisualTokens
from tempme_vl.integrations.parts import cut_up, frame_size
from tempme_vl.integrations.videos import SampledVideo, as_frames, ascending, mean_fps


class Stream:
    """Frames in any portions, and the tokens of all that came so far, in the memory of a few frames.

    Every frame counts: of more than `num_frames` none is left out, as `Compressed.prepare` leaves some out. A stream of
    just as many has the tokens of the same video in `prepare`. A longer one goes on with the same plan of merging, and
    what is learnt for each clip starts over behind every `num_frames`. If the last clip is short, its last frame is
    repeated; inside the towers of the Qwen family it merges as it is.

    Args:
        host: whose method cuts videos.
        fps: frames a second of all frames.

    Raises:
        ValueError: a host or method that knows no token of a video before its end.
    """

    def __init__(self, host: Host, fps: float | None = None):
        host.check_stream()
        self.host, self.fps = host, fps
        self._parts: list[Any] = []
        self._rest: np.ndarray | None = None  # frames of a clip that is not complete
        self._times: list[float] = []
        self._done = self._count = 0  # frames that are encoded, and all

    @torch.no_grad()
    def add(
        self, frames: np.ndarray | Tensor | Sequence[Image | np.ndarray | Tensor], times: Sequence[float] | None = None
    ) -> VisualTokens | None:
        """The frames that come next.

        Args:
            frames: T in any form that `Compressed.prepare` takes, all of one size.
            times: their seconds.

        Returns:
            what the frames whose clips are complete now would be as a video of their own; None where no clip is.

        Raises:
            ValueError: other frames, times that do not go on, or times of some frames alone.
        """
        new = as_frames(frames)
        if self._rest is not None and new.shape[1:] != self._rest.shape[1:]:
            raise ValueError(f"expected frames of {self._rest.shape[1:]} as before; got {new.shape[1:]}")
        self._note_times(times, len(new))
        self._count += len(new)
        self._rest = np.concatenate([new[:0] if self._rest is None else self._rest, new])
        ready = len(self._rest) - len(self._rest) % self.host.cut(self._rest.shape[1:3])
        if not ready:
            return None
        parts = self._encode(self._rest[:ready])
        ended = self._video(self._done, ready)
        self._parts += parts
        self._done += ready
        self._rest = self._rest[ready:].copy()
        return self.host.join_parts(parts, ended)

    @torch.no_grad()
    def finish(self) -> VisualTokens:
        """The tokens of all frames so far. More may come afterwards.

        Raises:
            ValueError: no frame has come.
        """
        video, rest = self.video, self._rest
        assert rest is not None
        if not len(rest):
            return self.host.join_parts(self._parts, video)
        held = self.host.held(len(rest), self.host.cut(frame_size(video)))
        parts = self._encode(np.concatenate([rest, *[rest[-1:]] * held]))
        return self.host.join_parts([*self._parts, *parts], video.held(held))

    @property
    def video(self) -> SampledVideo:
        """Of all frames, which themselves are gone: (0, H, W, 3).

        Raises:
            ValueError: no frame has come.
        """
        if self._rest is None:
            raise ValueError("expected frames before the end of a stream: give them to add()")
        return self._video(0, self._count)

    def _video(self, first: int, count: int) -> SampledVideo:
        assert self._rest is not None
        times = tuple(self._times[first : first + count]) or None
        fps = self.fps if times is None else mean_fps(times)
        return SampledVideo(self._rest[:0], tuple(range(first, first + count)), fps, times, count)

    def _encode(self, frames: np.ndarray) -> list[Any]:
        """Whole clips, as many at a time as fit."""
        host = self.host
        video = SampledVideo(frames, tuple(range(len(frames))))
        cut = host.cut(frame_size(video))
        size = max(cut, (host.frames_at_once or host.num_frames) // cut * cut)
        return [host.encode_part(part, self._done + first) for first, part in cut_up(video, size, host.num_frames)]

    def _note_times(self, times: Sequence[float] | None, count: int) -> None:
        mixed = self._count > 0 and (times is None) == bool(self._times)
        if mixed or (times is not None and self.fps is not None):
            raise ValueError("expected times of all frames of a stream, or of none, or its fps")
        if times is not None:
            self._times += ascending([*self._times[-1:], *times], count + len(self._times[-1:]))[-count:]
