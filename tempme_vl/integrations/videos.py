"""Prompts and videos in the forms that users have them, files too, with the times of the frames, to one form."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal, TypeAlias

import numpy as np
from PIL.Image import Image
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from tempme_vl.data.video import Frames, read_frames

FPS = 24.0  # what hosts assume where nobody told the frames a second
_EXPECTED = (
    "expected a video as uint8 frames (T, H, W, 3) or (T, 3, H, W), an array, tensor or list of images, or as the path "
    "of a file"
)


@dataclass(frozen=True)
class SampledVideo:
    """The frames of a video that the model sees, and when they were shown, where its user told it.

    Attributes:
        frames: (F, H, W, 3) uint8.
        indices: of the F frames in the video that was given, ascending; a short video repeats some.
        fps: frames a second of the video that was given.
        times: seconds of the F frames, ascending.
        total: frames of the video that was given.
        whole: of a part of such a video F of all of it.
    """

    frames: np.ndarray
    indices: tuple[int, ...]
    fps: float | None = None
    times: tuple[float, ...] | None = None
    total: int | None = None
    whole: int | None = None

    def part(self, first: int, count: int, whole: int) -> SampledVideo:
        """`count` of the frames, from one on, of a video of so many."""
        chosen = slice(first, first + count)
        times = None if self.times is None else self.times[chosen]
        return replace(self, frames=self.frames[chosen], indices=self.indices[chosen], times=times, whole=whole)

    def held(self, more: int) -> SampledVideo:
        """With the last frame so many times more."""
        frames = np.concatenate([self.frames, *[self.frames[-1:]] * more])
        times = None if self.times is None else (*self.times, *self.times[-1:] * more)
        return replace(self, frames=frames, indices=(*self.indices, *self.indices[-1:] * more), times=times)

    @property
    def is_timed(self) -> bool:
        """Whether somebody told when the frames were shown."""
        return self.fps is not None or self.times is not None

    @property
    def seconds(self) -> tuple[float, ...]:
        """Of the F frames, at `FPS` where nobody told."""
        return self.times or tuple(index / (self.fps or FPS) for index in self.indices)

    @property
    def interval(self) -> float:
        """Seconds between neighbouring frames in the mean; as hosts have it, of frames spread evenly over all of the
        video where it is known how long that is."""
        fps = self.fps or (FPS if self.times is None else None)
        if fps and self.total:
            return 1 / (len(self.indices) / self.total * fps)
        mean = (self.seconds[-1] - self.seconds[0]) / max(1, len(self.seconds) - 1)
        return mean or (1 / fps if fps else 0.0)

    @property
    def duration(self) -> float:
        """Seconds of the video that was given."""
        if not self.is_timed:
            return self.seconds[-1]
        if self.fps and self.total and (self.times is None or self.total > len(self.indices)):
            return self.total / self.fps
        # the middles of equal parts, and a first and a last frame, lie as far from the video's end as from its start
        return self.seconds[0] + self.seconds[-1] + (1 / self.fps if self.fps and self.total is None else 0.0)


# what users have as one video
VideoInput: TypeAlias = str | Path | Frames | SampledVideo | np.ndarray | Tensor | Sequence[Image | np.ndarray | Tensor]
# frames a second: of all videos, or of each, in order or in a list for every prompt
FpsInput: TypeAlias = float | Sequence[float | None] | Sequence[Sequence[float | None]] | None
# seconds of the frames of each video, in order or in a list for every prompt; of a single video also these themselves
_Times: TypeAlias = Sequence[float] | Tensor | np.ndarray
TimesInput: TypeAlias = _Times | Sequence[_Times | None] | Sequence[Sequence[_Times | None]] | None


def read_sampled(
    path: str | Path,
    num_frames: int,
    sampling: str = "uniform",
    start: float | None = None,
    end: float | None = None,
    timeout: float | None = 60.0,
) -> SampledVideo:
    """Frames of a video file, or of a part of it, with their times in that part.

    Args:
        sampling: a name in `tempme_vl.data.sampling.SAMPLING`; "uniform" takes the first, the last and as many evenly
            between them.
        start, end, timeout: see `tempme_vl.read_video`.

    Raises:
        VideoError: a file that cannot be read.
    """
    frames = read_frames(path, num_frames, sampling=sampling, start=start, end=end, timeout=timeout)
    return _of_frames(frames, start or 0.0)


def _of_frames(frames: Frames, start: float = 0.0) -> SampledVideo:
    times = (frames.times - start).clip(min=0)
    return SampledVideo(frames.pixels, tuple(frames.indices.tolist()), frames.fps, tuple(times.tolist()))


def sample(
    video: VideoInput, num_frames: int, fps: float | None = None, times: Sequence[float] | None = None
) -> SampledVideo:
    """num_frames frames, the middle ones of as many equal parts; all of them if there are as many.

    Args:
        video: T frames; or a file's path, of which `read_sampled` reads the frames; or what `tempme_vl.read_video`
            gave; or a `SampledVideo`, which stays as it is; it is told fps or times if it knows neither.
        fps: frames a second of the T frames.
        times: seconds of each of the T frames.

    Raises:
        VideoError: a file that cannot be read.
        ValueError: not uint8 frames in colour, a `SampledVideo` of another number, times that are not T ascending
            numbers, or fps or times of a file or of `Frames`, which tell them.
    """
    if isinstance(video, (str, Path, Frames)):
        if fps is not None or times is not None:
            what = "fps" if times is None else "times"
            which = "frames of read_video tell" if isinstance(video, Frames) else f"the file {str(video)!r} tells"
            raise ValueError(
                f"{which} when they were shown: give {what} of other videos alone, and None in the place of this one's"
            )
        if isinstance(video, Frames):
            if len(video.pixels) != num_frames:
                return sample(video.pixels, num_frames, times=video.times.tolist())
            return _of_frames(video)
        return read_sampled(video, num_frames)
    if isinstance(video, SampledVideo):
        if len(video.frames) != num_frames:
            raise ValueError(f"expected a SampledVideo of {num_frames} frames; got one of {len(video.frames)}")
        if video.is_timed:
            return video
        return replace(video, fps=fps, times=times if times is None else ascending(times, num_frames))
    frames = as_frames(video)
    total = len(frames)
    indices = tuple((2 * i + 1) * total // (2 * num_frames) for i in range(num_frames))
    if times is not None:
        shown = ascending(times, total)
        times = tuple(shown[index] for index in indices)
        fps = mean_fps(shown)
    return SampledVideo(np.ascontiguousarray(frames[list(indices)]), indices, fps, times, total)


def as_frames(video: np.ndarray | Tensor | Sequence[Image | np.ndarray | Tensor]) -> np.ndarray:
    """Frames in any form as (T, H, W, 3).

    Raises:
        ValueError: not uint8 frames in colour.
    """
    if isinstance(video, (list, tuple)):
        images = [np.asarray(image) for image in video]
        if len({image.shape for image in images}) != 1:
            raise ValueError(f"{_EXPECTED}; got a list of {len(images)} images of differing shapes")
        frames = np.stack(images)
    else:
        frames = video.detach().cpu().numpy() if isinstance(video, Tensor) else np.asarray(video)
    if frames.ndim != 4 or frames.dtype != np.uint8 or 3 not in (frames.shape[1], frames.shape[3]) or not frames.size:
        raise ValueError(f"{_EXPECTED}; got {frames.dtype} of shape {frames.shape}")
    if frames.shape[3] != 3:
        frames = frames.transpose(0, 2, 3, 1)
    return frames


def mean_fps(times: Sequence[float]) -> float | None:
    """Frames a second of frames shown at these times; None where they are all one."""
    return (len(times) - 1) / (times[-1] - times[0]) if times[-1] > times[0] else None


def ascending(times: Sequence[float], count: int) -> tuple[float, ...]:
    """Raises:
    ValueError: not `count` finite numbers in ascending order.
    """
    seconds = tuple(float(time) for time in times)
    in_order = all(a <= b for a, b in pairwise(seconds))
    if len(seconds) != count or not all(map(math.isfinite, seconds)) or not in_order:
        raise ValueError(f"expected times of {count} frames in seconds, finite and ascending; got {_short(seconds)}")
    return seconds


def assumed(video: SampledVideo, fps: float) -> SampledVideo:
    """The same with so many frames a second, if nobody told."""
    return video if video.is_timed else replace(video, fps=fps)


def tell_times(
    videos: Sequence[Sequence[VideoInput]], num_frames: int, fps: FpsInput, times: TimesInput
) -> list[list[SampledVideo]]:
    """Samples videos, which know their times then if their user told any.

    Args:
        videos: for each prompt the list of its videos.
        fps: frames a second of all videos, or a number for each, in order or in a list for every prompt.
        times: for each video, in order or in a list for every prompt, the seconds of its frames; of a single video
            also these themselves.

    Raises:
        ValueError: both, another number of them than of videos, or a fps that is no number above 0.
    """
    count = sum(len(group) for group in videos)
    if fps is not None and times is not None:
        raise ValueError("expected fps or times, which say the same; got both")
    each_fps: list[Any] = [None] * count
    each_times: list[Any] = [None] * count
    if fps is not None:
        each_fps = [fps] * count if _is_number(fps) else _one_each(_as_lists(fps), videos, depth=1, what="fps")
        for number in each_fps:
            if number is not None and not (_is_number(number) and 0 < number < math.inf):
                raise ValueError(f"expected frames a second above 0; got fps={number!r}")
    if times is not None:
        rows = _as_lists(times)
        each_times = _one_each([rows] if _depth(rows) == 1 else rows, videos, depth=2, what="times")
    told = iter(zip(each_fps, each_times, strict=True))
    return [[sample(video, num_frames, *next(told)) for video in group] for group in videos]


def _one_each(values: Any, videos: Sequence[Sequence[VideoInput]], depth: int, what: str) -> list[Any]:
    """A value of `depth` lists for each video, out of one list or of a list for every prompt."""
    counts = [len(group) for group in videos]
    if isinstance(values, list):
        if _depth(values) > depth and [len(group) if isinstance(group, list) else -1 for group in values] == counts:
            values = [value for group in values for value in group]
        if _depth(values) <= depth and len(values) == sum(counts):
            return values
    raise ValueError(f"expected {what} for each of {sum(counts)} videos ({counts} a prompt); got {_short(values)}")


def _as_lists(values: Any) -> Any:
    """Tensors, arrays and tuples as lists, at every depth."""
    if isinstance(values, (Tensor, np.ndarray)):
        return values.tolist()
    return [_as_lists(value) for value in values] if isinstance(values, (list, tuple)) else values


def _depth(values: object) -> int:
    return 1 + max((_depth(value) for value in values), default=0) if isinstance(values, list) else 0


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float, np.number)) and not isinstance(value, bool)


def _short(value: object) -> str:
    text = str(value)
    return text if len(text) <= 100 else f"{text[:100]}..."


def pair_up(
    text: str | Sequence[str],
    visuals: str | Path | Image | Sequence[Any],
    placeholder: str,
    kind: Literal["video", "image"] = "video",
) -> tuple[list[str], list[list[Any]]]:
    """A list of prompts, and for each the list of its videos or images.

    Args:
        visuals: a list for every prompt; or all of them in order, one for each placeholder.
        kind: of the visuals. A list of images is a video, too.

    Raises:
        ValueError: prompts that are no texts, or not one visual for every placeholder.
    """
    prompts = [text] if isinstance(text, str) else list(text)
    if wrong := [prompt for prompt in prompts if not isinstance(prompt, str)]:
        raise ValueError(
            f"expected prompts as texts; got {_short(wrong[0])}. Chat messages become one by the host's own format: "
            "processor.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)"
        )
    if isinstance(visuals, (str, Path, Image)):
        visuals = [visuals]
    counts = [prompt.count(placeholder) for prompt in prompts]
    grouped = [isinstance(v, (list, tuple)) and not (kind == "video" and _is_video(v)) for v in visuals]
    if not any(grouped) and len(visuals) == sum(counts):
        flat = iter(visuals)
        return prompts, [[next(flat) for _ in range(count)] for count in counts]
    groups = [list(v) for v, is_group in zip(visuals, grouped, strict=True) if is_group]
    if not all(grouped) or [len(group) for group in groups] != counts:
        raise ValueError(
            f"expected one {kind} for every {placeholder!r}: the prompts have {counts} of them, the {kind}s come in "
            f"{[len(v) if is_group else 'one' for v, is_group in zip(visuals, grouped, strict=True)]}"
        )
    return prompts, groups


def without_start(text: str, tokenizer: PreTrainedTokenizerBase) -> str:
    """A prompt without the start token that a chat format wrote in front of it, where the tokenizer adds one, too."""
    start = tokenizer.bos_token
    doubled = start and text.startswith(start) and tokenizer("")["input_ids"][:1] == [tokenizer.bos_token_id]
    return text.removeprefix(start) if doubled else text


def _is_video(value: Sequence[object]) -> bool:
    """Whether a list holds frames and not videos."""
    return bool(value) and all(isinstance(frame, Image) or getattr(frame, "ndim", 0) == 3 for frame in value)
