"""Decoding a few frames of a long stream exactly: from the cuts before them, without pictures that nothing refers to.

What packets promise is checked against every frame that comes out: exactly those that went in, in order of time.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Collection, Iterator, Sequence
from itertools import groupby, islice
from math import inf, isnan
from typing import Any, NamedTuple, TypeAlias

import av
import numpy as np

from tempme_vl.data.packets import Units


class Unsure(Exception):
    """The stream is not what its packets promise: decode it from its start."""


class Cut(NamedTuple):
    """A key frame that decoding can begin at, by the timestamps of its packet, in the stream's time base."""

    pts: int
    dts: int


class Place(NamedTuple):
    """Where a frame is found.

    Attributes:
        pts: when it is shown.
        cut: the latest one up to it; None: the start of the file.
    """

    pts: int
    cut: Cut | None


class Listed(NamedTuple):
    """The frames of a file in the order they are shown, as rows of one array (4, n) float64.

    Attributes:
        times: (n,) seconds after the first one, increasing.
        pts, dts: (n,) timestamps in the stream's time base.
        cuts: (n,) for each frame the number of the cut it is decoded from; -1: the start; NaN: not known.
    """

    times: np.ndarray
    pts: np.ndarray
    dts: np.ndarray
    cuts: np.ndarray

    def places(self, numbers: Sequence[int]) -> list[Place] | None:
        """Where these frames are found; None where packets do not tell."""
        found = []
        for pts, start in zip(self.pts[numbers].tolist(), self.cuts[numbers].tolist(), strict=True):
            if isnan(start):
                return None
            cut = None if start < 0 else Cut(int(self.pts[int(start)]), int(self.dts[int(start)]))
            found.append(Place(int(pts), cut))
        return found


PacketsFrom: TypeAlias = Callable[[Cut | None], Iterator[Any]]
"""A cut, or None for the start -> the stream's packets from there on. Raises Unsure where there is no such cut."""


def from_file(container: Any, stream: Any) -> PacketsFrom:
    """Of a container just opened."""

    def packets(cut: Cut | None) -> Iterator[Any]:
        if cut is not None:
            container.seek(cut.dts, stream=stream)  # which also empties the decoder
        return _from(cut, container.demux(stream))

    return packets


def from_memory(stream: Any, kept: Sequence[Any]) -> PacketsFrom:
    """Of all of a stream's packets."""
    keys = {packet.pts: place for place, packet in enumerate(kept) if packet.is_keyframe}

    def packets(cut: Cut | None) -> Iterator[Any]:
        if cut is None:
            return iter(kept)
        if cut.pts not in keys:
            raise Unsure
        stream.codec_context.flush_buffers()
        return islice(kept, keys[cut.pts], None)

    return packets


def all_frames(decoder: av.VideoCodecContext, packets: PacketsFrom) -> Iterator[av.VideoFrame]:
    """As they come, by a decoder that has not begun. Raises av.FFmpegError."""
    for packet in packets(None):
        yield from decoder.decode(packet)
    yield from decoder.decode(None)


def frames_at(decoder: av.VideoCodecContext, packets: PacketsFrom, places: Sequence[Place]) -> Iterator[av.VideoFrame]:
    """The frames at these places, which are in order of time, by a decoder that has not begun.

    Raises:
        Unsure: other frames came out than went in, or a cut is not found.
        av.FFmpegError: FFmpeg cannot seek, read or decode.
    """
    units = Units.of(decoder.name, decoder.extradata or b"")
    for cut, group in groupby(places, lambda place: place.cut):
        wanted = {place.pts for place in group}
        yield from _decoded(decoder, _needed(packets(cut), wanted, units), cut, wanted)


def _needed(packets: Iterator[Any], wanted: Collection[int], units: Units) -> Iterator[Any]:
    """Packets until all wanted ones have come, without others that nothing refers to; then None: what is left inside
    the decoder."""
    left, known = set(wanted), units.known
    for packet in packets:
        pts = packet.pts
        if pts is None:
            raise Unsure
        if pts in left:
            left.remove(pts)
        elif known and units.is_unused(memoryview(packet)):
            continue
        yield packet
        if not left:
            break
    yield None
    if left:
        raise Unsure


def _decoded(
    decoder: av.VideoCodecContext, packets: Iterator[Any], cut: Cut | None, wanted: Collection[int]
) -> Iterator[av.VideoFrame]:
    """The wanted frames; all that are shown from the cut on are looked at. What refers across it comes out damaged or
    not at all; other damage is hidden by pictures that were decoded before, which differ by where decoding began."""
    begin = -inf if cut is None else cut.pts
    waiting: list[int] = []  # a heap of when frames that went in are shown
    for packet in packets:
        if packet is not None and not packet.is_discard and packet.pts >= begin:
            heapq.heappush(waiting, packet.pts)
        for frame in decoder.decode(packet):
            pts = frame.pts
            if pts is None:
                raise Unsure
            if pts >= begin:
                if frame.is_corrupt or not waiting or pts != heapq.heappop(waiting):
                    raise Unsure
                if pts in wanted:
                    yield frame
            del frame  # see decoder.py
    if waiting:
        raise Unsure


def _from(cut: Cut | None, packets: Iterator[Any]) -> Iterator[Any]:
    """Packets from a cut on, whose place a container may miss by some."""
    begun = cut is None
    for packet in packets:
        if not packet.size:  # behind the last one
            continue
        if cut is not None and not begun:
            begun = packet.is_keyframe and packet.pts == cut.pts
            if not begun and packet.dts is not None and packet.dts > cut.dts:
                raise Unsure
        if begun:
            yield packet
