"""Transforms of whole videos: CLIP's preprocessing as open_clip does it, and which augmentation goes with it.

Letters: F frames, H W raw size, S image size.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import torch

from tempme_vl.data.pictures import Fit, fit_picture
from tempme_vl.normalize import normalize

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)

AUGMENTATIONS = ("none", "randaugment", "crop_flip", "crop_augment", "crop_flip_augment")
_WIDER = 8 / 7  # of the frames' side, what "crop_augment" cuts squares from: 256 for 224 pixels


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


@dataclass(frozen=True)
class VideoTransform:
    """(F, H, W, 3) uint8 frames -> (F, 3, S, S) float32, normalised.

    `normalize`: False leaves uint8, a quarter of the bytes, for whom normalises where the model is
    (`VisualFrontend.forward`).
    `augment`:
      "none"         evaluation; equal to `open_clip.image_transform(S, is_train=False)` on each frame.
      "randaugment"  resized as above, then RandAugment with TempMe's magnitude 7, 4 operations, noise 0.5.
      "crop_flip"    random crop of 50 to 100% of the area scaled to S x S, then a horizontal flip in half of the
                     videos (UMT). Must not be used where captions tell left from right: a flip makes them wrong.
      "crop_augment" what TESTA pre-trains videos with: a random square of frames squashed to 8/7 of the side, then 2
                     operations of RandAugment at magnitude 5, flips among them.
      "crop_flip_augment"  what BLIP and TESTA pre-train pictures with: as "crop_flip", then 2 at magnitude 7.
    """

    preprocess: Preprocess = Preprocess()
    augment: str = "none"
    normalize: bool = True

    def __post_init__(self) -> None:
        if self.augment not in AUGMENTATIONS:
            raise ValueError(f"unknown augmentation {self.augment!r}; known: {', '.join(AUGMENTATIONS)}")

    def __call__(self, pixels: np.ndarray, rng: np.random.Generator | None = None) -> torch.Tensor:
        """`rng` is needed, and used, by the augmentations only."""
        colors_first = self._fitted(pixels, rng).transpose(0, 3, 1, 2)
        frames = torch.empty(colors_first.shape, dtype=torch.uint8)
        np.copyto(frames.numpy(), colors_first)  # in half of the time that torch takes
        return normalize(frames, self.preprocess.mean, self.preprocess.std) if self.normalize else frames

    def blank(self, num_frames: int) -> torch.Tensor:
        """Zeros, as frames of a video that cannot be read."""
        size = self.preprocess.image_size
        return torch.zeros(num_frames, 3, size, size, dtype=torch.float32 if self.normalize else torch.uint8)

    def _fitted(self, pixels: np.ndarray, rng: np.random.Generator | None) -> np.ndarray:
        """(F, S, S, 3) uint8."""
        if self.augment == "none":
            return resize(pixels, self.preprocess)
        if rng is None:
            raise ValueError(f"augmentation {self.augment!r} needs a numpy Generator; see sampling.sample_generator")
        from tempme_vl.data import augment  # which imports torchvision

        if self.augment == "randaugment":
            return augment.rand_augment(resize(pixels, self.preprocess), rng)
        _check_pixels(pixels)
        if self.augment == "crop_augment":
            pixels = augment.random_square(resize(pixels, self._wider), self.preprocess.image_size, rng)
            return augment.few_operations(pixels, rng, augment.OF_VIDEOS, 5)
        pixels = augment.random_crop_flip(pixels, self.preprocess, rng)
        if self.augment == "crop_flip_augment":
            pixels = augment.few_operations(pixels, rng, augment.OF_PICTURES, 7)
        return pixels

    @property
    def fit(self) -> Fit | None:
        """What a decoder can do of it; None for frames as they are, which are cropped in other ways each time."""
        if self.augment == "crop_augment":
            return self._wider.fit
        return self.preprocess.fit if self.keeps_frames else None

    @property
    def keeps_frames(self) -> bool:
        """Whether it begins with the same frames each time, which can be kept."""
        return self.augment in ("none", "randaugment")

    @property
    def _wider(self) -> Preprocess:
        return replace(self.preprocess, image_size=round(_WIDER * self.preprocess.image_size), resize="squash")


def resize(pixels: np.ndarray, preprocess: Preprocess) -> np.ndarray:
    """The deterministic, geometric part: (F, H, W, 3) uint8 -> (F, S, S, 3) uint8.

    Its result can be cached: resizing it again changes nothing.
    """
    _check_pixels(pixels)
    if pixels.shape[1:3] == (preprocess.image_size, preprocess.image_size):
        return pixels
    return np.stack([fit_picture(frame, preprocess.fit) for frame in pixels])


def _check_pixels(pixels: np.ndarray) -> None:
    if pixels.dtype != np.uint8 or pixels.ndim != 4 or pixels.shape[-1] != 3 or 0 in pixels.shape:
        raise ValueError(f"expected frames (F, H, W, 3) uint8; got {pixels.shape} {pixels.dtype}")
