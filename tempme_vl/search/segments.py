"""Which parts of a video are searched on their own: overlapping segments of a file or of its scenes."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

from tempme_vl.data.parts import Part


@dataclass(frozen=True)
class Segments:
    """How long segments are, and how much of each the next one holds too, in seconds.

    Raises:
        ValueError: no length, or an overlap as long as a segment.
    """

    seconds: float = 30.0
    overlap: float = 5.0

    def __post_init__(self) -> None:
        if not self.seconds > 0 or not 0 <= self.overlap < self.seconds:
            raise ValueError(
                "expected segments longer than 0 s, and an overlap from 0 to below that; got "
                f"--segment-seconds {self.seconds:g} --overlap {self.overlap:g}"
            )

    def of(self, duration: float, cuts: Sequence[float] = ()) -> list[Part]:
        """The segments of a file of so many seconds, by their start.

        All of a scene where it is not longer than one. The last one of a scene ends with it and is as long as the
        others, so that it overlaps more.

        Args:
            cuts: where further scenes begin, in order; those not inside the file are left out.
        """
        inside = (cut for cut in cuts if 0 < cut < duration)
        return [part for scene in itertools.pairwise([0.0, *inside, duration]) for part in self._of_scene(*scene)]

    def _of_scene(self, begin: float, end: float) -> list[Part]:
        if end - begin <= self.seconds:
            return [Part(begin, end)]
        step, starts = self.seconds - self.overlap, [begin]
        while starts[-1] + self.seconds < end:
            starts.append(min(begin + len(starts) * step, end - self.seconds))
        return [Part(start, min(start + self.seconds, end)) for start in starts]
