"""What a saved model says of its inputs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from tempme_vl.schema import Range

Sampling = Literal["uniform", "fps1", "segment"]  # the names of `tempme_vl.data.sampling.SAMPLING`


@dataclass(frozen=True)
class Inputs:
    """The "input" of a configuration: how videos and captions were sampled and cut in training.

    Attributes:
        sampling: of frames.
        max_words: kept of a caption, the start and end token among them.
    """

    sampling: Sampling
    max_words: Annotated[int, Range(2, 100_000)] = 32
