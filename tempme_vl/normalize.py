"""Colors of frames as the numbers that an image tower reads."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def normalize(frames: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """(..., 3, H, W) uint8 -> float32: scaled to [0, 1], less the mean, over the deviation.

    Where the frames are: a quarter of the bytes travels to a device if they are normalised there.

    Args:
        mean, std: of red, green and blue, in [0, 1].

    Raises:
        ValueError: frames of another dtype, or without three colors.
    """
    if frames.dtype != torch.uint8 or frames.ndim < 3 or frames.shape[-3] != 3:
        raise ValueError(f"expected frames (..., 3, H, W) uint8; got {tuple(frames.shape)} {frames.dtype}")
    x = frames.to(torch.float32, memory_format=torch.contiguous_format).div_(255)
    for color, (middle, deviation) in enumerate(zip(mean, std, strict=True)):
        x.select(-3, color).sub_(middle).div_(deviation)
    return x
