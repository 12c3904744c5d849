"""What a search gives."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Hit:
    """A segment that was found.

    Attributes:
        path: of the file, relative to the folder that was indexed.
        start, end: seconds after the file's first frame.
        score: by which hits are ranked, -1 to 1: the cosine of both vectors, or with fine="maxsim" the mean over the
            query's parts of each one's cosine with its nearest merged token, and where no head was trained to compare
            these, the mean of both. With fine="matching" a logit, in TESTA's models plus the cosine, without bounds.
        coarse: the cosine of both vectors.
        segment: its number in the file.
        duration: of the file, in seconds.
        size: of the file, in bytes.
    """

    path: str
    start: float
    end: float
    score: float
    coarse: float
    segment: int
    duration: float
    size: int


class Hits(list[Hit]):
    """The best hit first.

    Attributes:
        seconds: that the stages took: "embed" the query, "coarse", and "fine" where there was one.
    """

    def __init__(self, hits: Iterable[Hit], seconds: Mapping[str, float]):
        super().__init__(hits)
        self.seconds = dict(seconds)
