"""Which parts of a video are searched on their own: segments of one length that overlap."""

from __future__ import annotations

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

    def of(self, duration: float) -> list[Part]:
        """The segments of a file of so many seconds: all of it where it is not longer than one. The last one ends with
        the file and is as long as the others, so that it overlaps more."""
        if duration <= self.seconds:
            return [Part(0.0, duration)]
        step, starts = self.seconds - self.overlap, [0.0]
        while starts[-1] + self.seconds < duration:
            starts.append(min(len(starts) * step, duration - self.seconds))
        return [Part(start, min(start + self.seconds, duration)) for start in starts]
