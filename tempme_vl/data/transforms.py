"""Transforms of whole videos: CLIP's preprocessing as open_clip does it, and two training augmentations.

Letters: F frames, H W raw size, S image size. Every random choice is drawn from the caller's generator, once
per video, so that all frames are changed alike.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
import torchvision.transforms.functional as F
from PIL import Image
from torchvision.transforms import InterpolationMode

from tempme_vl.data.decoder import Fit, fit_picture

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)

AUGMENTATIONS = ("none", "randaugment", "crop_flip")


@dataclass(frozen=True)
class Preprocess:
    """How raw frames become the image tower's input.

    `resize`: "shortest" scales the shorter side to `image_size` and crops the centre; "squash" scales both sides.
    `interpolation`: "bicubic" or "bilinear", by PIL as in open_clip.
    """

    image_size: int = 224
    mean: tuple[float, float, float] = CLIP_MEAN
    std: tuple[float, float, float] = CLIP_STD
    resize: str = "shortest"
    interpolation: str = "bicubic"

    def __post_init__(self) -> None:
        if self.resize not in ("shortest", "squash"):
            raise ValueError(f"resize must be 'shortest' or 'squash'; got {self.resize!r}")
        if self.interpolation not in ("bicubic", "bilinear"):
            raise ValueError(f"interpolation must be 'bicubic' or 'bilinear'; got {self.interpolation!r}")
        if self.image_size < 1 or len(self.mean) != 3 or len(self.std) != 3 or min(self.std) <= 0:
            raise ValueError(f"expected a positive image size, 3 means and 3 positive deviations; got {self}")

    @property
    def fit(self) -> Fit:
        """The part of it that a decoder can do."""
        return Fit(self.image_size, self.resize, self.interpolation)

    @property
    def mode(self) -> InterpolationMode:
        return InterpolationMode(self.interpolation)


@dataclass(frozen=True)
class VideoTransform:
    """(F, H, W, 3) uint8 frames -> (F, 3, S, S) float32, normalised.

    `augment`:
      "none"         evaluation; equal to `open_clip.image_transform(S, is_train=False)` on each frame.
      "randaugment"  resized as above, then RandAugment with TempMe's magnitude 7, 4 operations, noise 0.5.
      "crop_flip"    random crop of 50 to 100% of the area scaled to S x S, then a horizontal flip in half of the
                     videos (UMT). Must not be used where captions tell left from right: a flip makes them wrong.
    """

    preprocess: Preprocess = Preprocess()
    augment: str = "none"

    def __post_init__(self) -> None:
        if self.augment not in AUGMENTATIONS:
            raise ValueError(f"unknown augmentation {self.augment!r}; known: {', '.join(AUGMENTATIONS)}")

    def __call__(self, pixels: np.ndarray, rng: np.random.Generator | None = None) -> torch.Tensor:
        """`rng` is needed, and used, by the augmentations only."""
        if self.augment == "none":
            return normalize(resize(pixels, self.preprocess), self.preprocess)
        if rng is None:
            raise ValueError(f"augmentation {self.augment!r} needs a numpy Generator; see sampling.sample_generator")
        if self.augment == "randaugment":
            return normalize(rand_augment(resize(pixels, self.preprocess), rng), self.preprocess)
        return normalize(random_crop_flip(pixels, self.preprocess, rng), self.preprocess)


def resize(pixels: np.ndarray, preprocess: Preprocess) -> np.ndarray:
    """The deterministic, geometric part: (F, H, W, 3) uint8 -> (F, S, S, 3) uint8.

    Its result can be cached: resizing it again changes nothing.
    """
    _check_pixels(pixels)
    if pixels.shape[1:3] == (preprocess.image_size, preprocess.image_size):
        return pixels
    return np.stack([fit_picture(frame, preprocess.fit) for frame in pixels])


def normalize(pixels: np.ndarray, preprocess: Preprocess) -> torch.Tensor:
    """(F, S, S, 3) uint8 -> (F, 3, S, S) float32: scaled to [0, 1], less the mean, over the deviation."""
    x_FCHW = torch.from_numpy(np.ascontiguousarray(pixels)).permute(0, 3, 1, 2).contiguous().float().div_(255)
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (preprocess.mean, preprocess.std))
    return x_FCHW.sub_(mean).div_(std)


def random_crop_flip(
    pixels: np.ndarray,
    preprocess: Preprocess,
    rng: np.random.Generator,
    scale: tuple[float, float] = (0.5, 1.0),
) -> np.ndarray:
    """One random crop (share of the area in `scale`, aspect 3:4 to 4:3) and one flip for the whole video.

    (F, H, W, 3) uint8 -> (F, S, S, 3) uint8.
    """
    _check_pixels(pixels)
    size = [preprocess.image_size] * 2
    top, left, height, width = _random_box(pixels.shape[1], pixels.shape[2], scale, rng)
    flip = rng.random() < 0.5

    def one(image: Image.Image) -> Image.Image:
        image = F.resized_crop(image, top, left, height, width, size, preprocess.mode)
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


def rand_augment(
    pixels: np.ndarray,
    rng: np.random.Generator,
    *,
    magnitude: float = 7,
    num_operations: int = 4,
    magnitude_std: float = 0.5,
    probability: float = 0.5,
) -> np.ndarray:
    """RandAugment with the same operations and strengths for all frames. (F, H, W, 3) uint8 -> the same shape.

    `num_operations` operations of `RAND_AUGMENT` are drawn with replacement, each applied with `probability` at a
    magnitude (0 to 10) drawn from N(magnitude, magnitude_std).
    """
    _check_pixels(pixels)
    x_FCHW = torch.from_numpy(np.ascontiguousarray(pixels)).permute(0, 3, 1, 2).contiguous()
    names = list(RAND_AUGMENT)
    for choice in rng.integers(len(names), size=num_operations):
        # Drawn even where unused, so that each operation consumes the same random numbers.
        apply = rng.random() < probability
        strength = float(np.clip(rng.normal(magnitude, magnitude_std), 0, 10)) / 10
        sign = 1 if rng.random() < 0.5 else -1
        if apply:
            x_FCHW = RAND_AUGMENT[names[choice]](x_FCHW, strength, sign)
    return x_FCHW.permute(0, 2, 3, 1).contiguous().numpy()


def _map_images(pixels: np.ndarray, change: Callable[[Image.Image], Image.Image]) -> np.ndarray:
    return np.stack([np.asarray(change(Image.fromarray(frame))) for frame in pixels])


def _check_pixels(pixels: np.ndarray) -> None:
    if pixels.dtype != np.uint8 or pixels.ndim != 4 or pixels.shape[-1] != 3 or 0 in pixels.shape:
        raise ValueError(f"expected frames (F, H, W, 3) uint8; got {pixels.shape} {pixels.dtype}")
