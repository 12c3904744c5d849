"""Images in prompts, in the forms that users have them, and as the host's own processor reads them."""

from __future__ import annotations

from collections.abc import Sequence
from copy import copy
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
from PIL.Image import Image, fromarray
from torch import Tensor
from transformers import BatchEncoding, BatchFeature, PreTrainedTokenizerBase

_EXPECTED = "expected an image of PIL, or uint8 pixels (H, W, 3) or (3, H, W) as an array or tensor"
ImageInput: TypeAlias = Image | np.ndarray | Tensor  # what users have as one image
_BETWEEN = "\0"  # images of a prompt; no processor writes it


def as_image(value: ImageInput | str | Path) -> Image:
    """An image of PIL, whose channels no processor can mistake; one that is it already stays, whatever its mode.

    Raises:
        ValueError: something else than uint8 pixels in colour.
    """
    if isinstance(value, Image):
        return value
    if isinstance(value, (str, Path)):
        raise ValueError(
            f"{_EXPECTED}; got the path or address {str(value)!r}: read it first, such as by PIL.Image.open(path)"
        )
    pixels = value.detach().cpu().numpy() if isinstance(value, Tensor) else np.asarray(value)
    if pixels.ndim != 3 or pixels.dtype != np.uint8 or 3 not in (pixels.shape[0], pixels.shape[2]) or not pixels.size:
        raise ValueError(f"{_EXPECTED}; got {pixels.dtype} of shape {pixels.shape}")
    return fromarray(np.ascontiguousarray(pixels if pixels.shape[2] == 3 else pixels.transpose(1, 2, 0)))


class _Listening:
    """A tokenizer that keeps the texts that it is given."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase):
        self.tokenizer = tokenizer
        self.texts: list[str] = []

    def __call__(self, text: str | list[str], **options: Any) -> BatchEncoding:
        self.texts += [text] if isinstance(text, str) else text
        return self.tokenizer(text, **options)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.tokenizer, name)


def read_images(processor: Any, images: Sequence[Image], placeholder: str) -> tuple[list[str], BatchFeature]:
    """What the host's own processor makes of the images of one prompt.

    How many tokens stand for an image, and what stands around them, differs between hosts, and may depend on the other
    images. The processor says both only in the text that it gives its tokenizer, and is asked there, in a copy.

    Args:
        images: one or more.
        placeholder: what stands for an image in a prompt.

    Returns:
        for each image what is written in its place; and the processor's values, such as pixel_values.

    Raises:
        ValueError: images that the processor refuses, such as some of shapes that it cannot stack.
    """
    asked = copy(processor)
    asked.tokenizer = heard = _Listening(processor.tokenizer)
    try:
        values = asked(text=[_BETWEEN.join([placeholder] * len(images))], images=[list(images)], return_tensors="pt")
    except (ValueError, RuntimeError) as error:  # the second one in transformers 4
        sizes = ", ".join(" x ".join(map(str, image.size)) for image in images)
        raise ValueError(
            f"{type(processor).__name__} does not take these images in one prompt ({sizes} pixels): {error}"
        ) from error
    return heard.texts[0].split(_BETWEEN), values
