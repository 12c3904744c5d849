"""What the packets of a video stream say of their pictures, read without decoding them.

Read off the units of H.264 (ITU-T H.264, table 7-1) and HEVC (ITU-T H.265, table 7-1), with lengths in front as in MP4
and Matroska, or with start codes as in transport streams. Of other codecs only the container's key frames are known.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

# Decoders whose key frames, of these codecs all, are places to decode from (tests/data/test_seeking.py).
WITH_CUTS = frozenset({"mpeg2video", "mpeg4", "vp8", "vp9", "av1", "libdav1d", "mjpeg"})


@dataclass(frozen=True)
class Units:
    """Reads the headers of a stream's units.

    Args:
        codec: FFmpeg's name of its decoder.
        length_size: bytes of the length in front of each unit; 0: start codes.
        one_layer: whether the stream says that no picture belongs to a higher temporal layer.
    """

    codec: str
    length_size: int = 0
    one_layer: bool = False

    @classmethod
    def of(cls, codec: str, header: bytes) -> Units:
        """Of a stream with this header, which for lengths is an avcC (ISO/IEC 14496-15, 5.3) or hvcC (8.3) record."""
        if codec == "h264" and len(header) > 4 and header[0] == 1:
            return cls(codec, (header[4] & 3) + 1)
        if codec == "hevc" and len(header) > 21 and header[0] == 1:
            return cls(codec, (header[21] & 3) + 1, header[21] >> 3 & 7 == 1)
        return cls(codec)

    @property
    def known(self) -> bool:
        """Whether the codec is one whose units are read."""
        return self.codec in ("h264", "hevc")

    def is_idr(self, key_frame: memoryview) -> bool:
        """Whether nothing that comes after a key frame of H.264 or HEVC refers to what came before it."""
        first = next(self._slices(key_frame), None)
        if first is None:
            return False
        return first & 31 == 5 if self.codec == "h264" else first >> 1 & 63 in (19, 20)

    def is_cut(self, key_frame: memoryview) -> bool:
        """Whether all frames shown from a key frame on can be decoded without what came before it.

        In HEVC these are all random access points; what refers across one is shown before it. In H.264 a key frame
        that is no IDR picture may promise less.
        """
        if self.codec == "hevc":
            first = next(self._slices(key_frame), None)
            return first is not None and 16 <= first >> 1 & 63 <= 21
        return self.is_idr(key_frame) if self.codec == "h264" else self.codec in WITH_CUTS

    def is_unused(self, packet: memoryview) -> bool:
        """Whether no other picture refers to this one, so that the others are the same where it is left out."""
        unused = False
        for first in self._slices(packet):
            unused = not self._is_referred_to(first)
            if not unused:
                break  # as of most pictures, at the first slice
        return unused

    def _is_referred_to(self, first: int) -> bool:
        """By a slice's first byte: nal_ref_idc in H.264; in HEVC all but a sub-layer non-reference picture, which those
        of higher layers alone could refer to."""
        if self.codec == "h264":
            return bool(first & 0x60)
        return not (self.one_layer and first >> 1 & 63 in range(0, 15, 2))

    def _slices(self, packet: memoryview) -> Iterator[int]:
        """The first byte of each unit that holds a slice; of codecs that are not known none."""
        if not self.known:
            return
        for first in self._with_lengths(packet) if self.length_size else _with_start_codes(packet):
            if 1 <= first & 31 <= 5 if self.codec == "h264" else first >> 1 & 63 < 32:
                yield first

    def _with_lengths(self, packet: memoryview) -> Iterator[int]:
        """The first byte of each unit."""
        position = self.length_size
        while position < len(packet):
            yield packet[position]
            position += int.from_bytes(packet[position - self.length_size : position], "big") + self.length_size


def _with_start_codes(packet: memoryview) -> Iterator[int]:
    data = bytes(packet)
    position = data.find(b"\0\0\1") + 3
    while 3 <= position < len(data):
        yield data[position]
        position = data.find(b"\0\0\1", position) + 3
