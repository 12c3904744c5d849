"""Training augmentations of whole videos, by torchvision: a random crop and flip, and RandAugment.

Letters: F frames, H W raw size, S image size. Every random choice is drawn from the caller's generator, once
per video, so that all frames are changed alike.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
import torchvision.transforms.functional as F
from PIL import Image
from torchvision.transforms import InterpolationMode

if TYPE_CHECKING:
    from tempme_vl.data.transforms import Preprocess


def random_crop_flip(
    pixels: np.ndarray,
    preprocess: Preprocess,
    rng: np.random.Generator,
    scale: tuple[float, float] = (0.5, 1.0),
) -> np.ndarray:
    """One random crop (share of the area in `scale`, aspect 3:4 to 4:3) and one flip for the whole video.

    (F, H, W, 3) uint8 -> (F, S, S, 3) uint8.
    """
    size, mode = [preprocess.image_size] * 2, InterpolationMode(preprocess.interpolation)
    top, left, height, width = _random_box(pixels.shape[1], pixels.shape[2], scale, rng)
    flip = rng.random() < 0.5

    def one(image: Image.Image) -> Image.Image:
        image = F.resized_crop(image, top, left, height, width, size, mode)
        return F.hflip(image) if flip else image

    return _map_images(pixels, one)


def _random_box(
    height: int, width: int, scale: tuple[float, float], rng: np.random.Generator
) -> tuple[int, int, int, int]:
    for _ in range(10):
        area = height * width * rng.uniform(*scale)
        aspect = np.exp(rng.uniform(np.log(3 / 4), np.log(4 / 3)))
        w, h = round((area * aspect) ** 0.5), round((area / aspect) ** 0.5)
        if 0 < w <= width and 0 < h <= height:
            return int(rng.integers(height - h + 1)), int(rng.integers(width - w + 1)), h, w
    # No such box in a very long picture: the largest centred one of an allowed aspect.
    w, h = min(width, round(height * 4 / 3)), min(height, round(width * 4 / 3))
    return (height - h) // 2, (width - w) // 2, h, w


# RandAugment (Cubuk et al., 2019) in timm's "increasing" form: strength x in [0, 1] of magnitude / 10, applied to
# a (F, 3, H, W) uint8 batch, so that the frames share the parameters. `sign` is -1 or 1, drawn once per operation.
_Operation = Callable[[torch.Tensor, float, int], torch.Tensor]


def _affine(
    degrees: float = 0.0, move: tuple[float, float] = (0, 0), shear: tuple[float, float] = (0, 0)
) -> _Operation:
    def apply(frames: torch.Tensor, x: float, sign: int) -> torch.Tensor:
        height, width = frames.shape[-2:]
        amount = sign * x
        return F.affine(
            frames,
            angle=amount * degrees,
            translate=[round(amount * move[0] * width), round(amount * move[1] * height)],
            scale=1.0,
            shear=[float(np.degrees(np.arctan(amount * tangent))) for tangent in shear],
            interpolation=InterpolationMode.BILINEAR,
            fill=[128.0, 128.0, 128.0],
        )

    return apply


def _enhance(adjust: Callable[[torch.Tensor, float], torch.Tensor]) -> _Operation:
    return lambda frames, x, sign: adjust(frames, max(0.1, 1 + sign * 0.9 * x))


def _solarize_add(frames: torch.Tensor, x: float, sign: int) -> torch.Tensor:
    brighter = (frames.to(torch.int16) + int(110 * x)).clamp(max=255).to(torch.uint8)
    return torch.where(frames < 128, brighter, frames)


RAND_AUGMENT: dict[str, _Operation] = {
    "autocontrast": lambda frames, x, sign: F.autocontrast(frames),
    "equalize": lambda frames, x, sign: F.equalize(frames),
    "invert": lambda frames, x, sign: F.invert(frames),
    "posterize": lambda frames, x, sign: F.posterize(frames, 4 - int(4 * x)),
    "solarize": lambda frames, x, sign: F.solarize(frames, min(255, 256 - int(256 * x))),
    "solarize_add": _solarize_add,
    "color": _enhance(F.adjust_saturation),
    "contrast": _enhance(F.adjust_contrast),
    "brightness": _enhance(F.adjust_brightness),
    "sharpness": _enhance(F.adjust_sharpness),
    "rotate": _affine(degrees=30),
    "shear_x": _affine(shear=(0.3, 0)),
    "shear_y": _affine(shear=(0, 0.3)),
    "translate_x": _affine(move=(0.45, 0)),
    "translate_y": _affine(move=(0, 0.45)),
}


# what else is drawn in pre-training
_OTHERS: dict[str, _Operation] = {
    "identity": lambda frames, x, sign: frames,
    "flip": lambda frames, x, sign: frames.flip(-1),
}
_MOVES = ("brightness", "sharpness", "shear_x", "shear_y", "translate_x", "translate_y", "rotate")
OF_VIDEOS = ("identity", "contrast", *_MOVES, "flip")  # TESTA's
OF_PICTURES = ("identity", "autocontrast", "equalize", *_MOVES)  # BLIP's


def few_operations(
    pixels: np.ndarray, rng: np.random.Generator, operations: Sequence[str], magnitude: float
) -> np.ndarray:
    """RandAugment as in pre-training: two of these operations, at this magnitude. (F, H, W, 3) uint8 -> the same."""
    return rand_augment(pixels, rng, magnitude=magnitude, num_operations=2, magnitude_std=0.0, operations=operations)


def random_square(pixels: np.ndarray, size: int, rng: np.random.Generator) -> np.ndarray:
    """One random square of the frames. (F, H, W, 3) -> (F, size, size, 3)."""
    top, left = (int(rng.integers(length - size + 1)) for length in pixels.shape[1:3])
    return pixels[:, top : top + size, left : left + size]


def rand_augment(
    pixels: np.ndarray,
    rng: np.random.Generator,
    *,
    magnitude: float = 7,
    num_operations: int = 4,
    magnitude_std: float = 0.5,
    probability: float = 0.5,
    operations: Sequence[str] = tuple(RAND_AUGMENT),
) -> np.ndarray:
    """RandAugment with the same operations and strengths for all frames. (F, H, W, 3) uint8 -> the same shape.

    `num_operations` of the `operations` are drawn with replacement, each applied with `probability` at a magnitude (0
    to 10) drawn from N(magnitude, magnitude_std).
    """
    x_FCHW = torch.from_numpy(np.ascontiguousarray(pixels)).permute(0, 3, 1, 2).contiguous()
    known = RAND_AUGMENT | _OTHERS
    for choice in rng.integers(len(operations), size=num_operations):
        # Drawn even where unused, so that each operation consumes the same random numbers.
        apply = rng.random() < probability
        strength = float(np.clip(rng.normal(magnitude, magnitude_std), 0, 10)) / 10
        sign = 1 if rng.random() < 0.5 else -1
        if apply:
            x_FCHW = known[operations[choice]](x_FCHW, strength, sign)
    return x_FCHW.permute(0, 2, 3, 1).contiguous().numpy()


def _map_images(pixels: np.ndarray, change: Callable[[Image.Image], Image.Image]) -> np.ndarray:
    return np.stack([np.asarray(change(Image.fromarray(frame))) for frame in pixels])
