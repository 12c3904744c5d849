"""What a saved model says of its inputs: the "input" of a configuration."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Literal

from tempme_vl.schema import LEFT_OUT, Range, Size

VIDEOLLM_FILE = "videollm.json"  # of a trained video-language model, its `HostInput` among other things
Sampling = Literal[
    "uniform", "fps1", "segment", "strided", "headtail"
]  # the names of `tempme_vl.data.sampling.SAMPLING`


@dataclass(frozen=True)
class VideoInput:
    """How frames were sampled in training."""

    sampling: Sampling

    def facts(self) -> dict[str, str]:
        """Rows of a card."""
        return {"sampling of frames": self.sampling}


@dataclass(frozen=True)
class Inputs(VideoInput):
    """How frames were sampled in training, and captions cut.

    Attributes:
        max_words: kept of a caption, the start and end token among them.
    """

    max_words: Annotated[int, Range(2, 100_000)] = 32

    def facts(self) -> dict[str, str]:
        return {**super().facts(), "words of a caption": f"at most {self.max_words}, start and end among them"}


@dataclass(frozen=True)
class HostInput:
    """How frames were sampled for a host model in training, as far as that is known.

    Attributes:
        image_size: side of the square frames in pixels, before the host's own preprocessing.
    """

    sampling: Sampling | None = field(default=None, metadata=LEFT_OUT)
    image_size: Size | None = field(default=None, metadata=LEFT_OUT)

    def facts(self) -> dict[str, str]:
        """Rows of a card."""
        side = (
            {} if self.image_size is None else {"frames in training": f"{self.image_size} x {self.image_size} pixels"}
        )
        return side if self.sampling is None else {**side, "sampling of frames": self.sampling}
