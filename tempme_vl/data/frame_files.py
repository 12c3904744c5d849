"""The two forms of a file of frames, raw and JPEG, each with times and a checksum.

Raw, a file is a plain .npy file of the pixels. Behind it, and behind JPEG's pictures, are the times, as float64, and a
checksum: the sum of the file's 64-bit words. It is fast enough to be checked at every read, and shows any bit that
changed and any lost block.

JPEG takes a seventh of the bytes and changes the pixels: docs/files.md says by how much.
"""

from __future__ import annotations

import io

import numpy as np
from PIL import Image

RAW, JPEG = ".npy", ".jpegs"
SUFFIXES = (RAW, JPEG)
_MAGIC = b"frames of JPEG 1"

# Pixels (F, H, W, 3) uint8 and times (F,) float64.
Entry = tuple[np.ndarray, np.ndarray]


def pack(pixels: np.ndarray, times: np.ndarray, quality: int | None = None) -> bytes:
    """The file of some frames.

    Args:
        quality: of JPEG, 1 to 100 as Pillow counts, with all of its colour (4:4:4); None: raw.
    """
    front = _header(pixels.shape) + pixels.tobytes() if quality is None else _pictures(pixels, quality)
    data = front + times.astype("<f8").tobytes()
    data += bytes(-len(data) % 8)
    return data + _checksum(np.frombuffer(data, np.uint8))


def unpack(data: np.ndarray, shape: tuple[int, ...], suffix: str = RAW) -> Entry | None:
    """Pixels of that shape and times from the bytes of a file; None where it is damaged or holds other frames."""
    body, checksum = data[:-8], data[-8:]
    if len(data) < 8 or len(data) % 8 or checksum.tobytes() != _checksum(body):
        return None
    front = _raw(body, shape) if suffix == RAW else _decoded(body, shape)
    if front is None:
        return None
    pixels, used = front
    end = used + 8 * shape[0]
    if end + -end % 8 != len(body):
        return None
    return pixels, np.frombuffer(body[used:end].tobytes(), "<f8").astype(np.float64)


def _header(shape: tuple[int, ...]) -> bytes:
    stream = io.BytesIO()
    description = {"descr": "|u1", "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(stream, description)
    return stream.getvalue()


def _raw(body: np.ndarray, shape: tuple[int, ...]) -> tuple[np.ndarray, int] | None:
    """The pixels, which stay in the file's bytes, and where they end."""
    header = np.frombuffer(_header(shape), np.uint8)
    first, end = len(header), len(header) + int(np.prod(shape))
    if len(body) < end or not np.array_equal(body[:first], header):
        return None
    return body[first:end].reshape(shape), end


def _pictures(pixels: np.ndarray, quality: int) -> bytes:
    """A mark, the shape, each picture's length, and the pictures."""
    pictures = []
    for frame in pixels:
        stream = io.BytesIO()
        Image.fromarray(frame).save(stream, "JPEG", quality=quality, subsampling=0)
        pictures.append(stream.getvalue())
    numbers = np.array([*pixels.shape, *map(len, pictures)], "<i8")
    return b"".join([_MAGIC, numbers.tobytes(), *pictures])


def _decoded(body: np.ndarray, shape: tuple[int, ...]) -> tuple[np.ndarray, int] | None:
    """The pictures' pixels, and where they end."""
    position = len(_MAGIC) + 8 * (len(shape) + shape[0])
    if len(body) < position or body[: len(_MAGIC)].tobytes() != _MAGIC:
        return None
    numbers = np.frombuffer(body[len(_MAGIC) : position].tobytes(), "<i8").tolist()
    if tuple(numbers[: len(shape)]) != tuple(shape):
        return None
    pixels = np.empty(shape, np.uint8)
    for frame, length in zip(pixels, numbers[len(shape) :], strict=True):
        with Image.open(io.BytesIO(body[position : position + length].tobytes())) as picture:
            frame[:] = np.asarray(picture)
        position += length
    return pixels, position


def _checksum(data: np.ndarray) -> bytes:
    return np.sum(data.view("<u8"), dtype="<u8").tobytes()
