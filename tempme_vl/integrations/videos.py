"""Prompts and videos in the forms that users have them, to one form."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from PIL.Image import Image
from torch import Tensor

from tempme_vl.integrations.base import SampledVideo

_EXPECTED = "expected a video as uint8 frames (T, H, W, 3) or (T, 3, H, W), an array, tensor or list of images"


def sample(video: Any, num_frames: int, fps: float | None = None) -> SampledVideo:
    """num_frames frames, the middle ones of as many equal parts; all of them if there are as many.

    Raises:
        ValueError: not uint8 frames in colour, or a `SampledVideo`, which stays as it is, of another number.
    """
    if isinstance(video, SampledVideo):
        if len(video.frames) != num_frames:
            raise ValueError(f"expected a SampledVideo of {num_frames} frames; got one of {len(video.frames)}")
        return video
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
    indices = tuple((2 * i + 1) * len(frames) // (2 * num_frames) for i in range(num_frames))
    return SampledVideo(np.ascontiguousarray(frames[list(indices)]), indices, fps)


def pair_up(text: str | Sequence[str], videos: Sequence[Any], placeholder: str) -> tuple[list[str], list[list[Any]]]:
    """A list of prompts, and for each the list of its videos.

    Args:
        videos: a list for every prompt; for a single prompt also its videos themselves, and for prompts with one
            placeholder each, a video each.

    Raises:
        ValueError: not one video for every placeholder.
    """
    prompts = [text] if isinstance(text, str) else list(text)
    counts = [prompt.count(placeholder) for prompt in prompts]
    groups = [list(v) for v in videos if isinstance(v, (list, tuple)) and not _is_video(v)]
    if not groups and len(videos) == sum(counts):
        flat = iter(videos)
        return prompts, [[next(flat) for _ in range(count)] for count in counts]
    if len(groups) != len(videos) or [len(group) for group in groups] != counts:
        raise ValueError(
            f"expected one video for every {placeholder!r}: the prompts have {counts} of them, the videos come in "
            f"{[len(v) if isinstance(v, (list, tuple)) and not _is_video(v) else 'one' for v in videos]}"
        )
    return prompts, groups


def _is_video(value: Sequence[Any]) -> bool:
    """Whether a list holds frames and not videos."""
    return bool(value) and all(isinstance(frame, Image) or getattr(frame, "ndim", 0) == 3 for frame in value)
