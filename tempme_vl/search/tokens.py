"""Merged tokens as an index keeps them: numbers in few bytes, what each stands for, and the attention that it got.

Letters: M tokens of a segment, E their width (D as fusion layers take them), F frames, N0 input tokens of a frame (CLS
first).
"""

from __future__ import annotations

import zlib
from typing import Literal

import numpy as np

TokenForm = Literal["none", "float16", "int8"]
LARGEST = 127  # of int8, the same to both sides of 0


def pack_tokens(tokens: np.ndarray, form: TokenForm) -> bytes:
    """(M, E) float32 -> bytes: float16, or int8 behind M float32 scales; empty for "none"."""
    if form == "none":
        return b""
    if form == "float16":
        return tokens.astype("<f2").tobytes()
    scale = np.maximum(np.abs(tokens).max(axis=1), 1e-12).astype("<f4") / np.float32(LARGEST)
    return scale.tobytes() + np.rint(tokens / scale[:, None]).astype(np.int8).tobytes()


def unpack_tokens(packed: bytes, width: int, form: TokenForm) -> np.ndarray:
    """The way back: (M, E) float32."""
    if form == "float16":
        return np.frombuffer(packed, "<f2").reshape(-1, width).astype(np.float32)
    count = len(packed) // (4 + width) if form == "int8" else 0
    scale = np.frombuffer(packed, "<f4", count)
    values = np.frombuffer(packed, np.int8, count * width, 4 * count).reshape(count, width)
    return values.astype(np.float32) * scale[:, None]


def pack_attention(attention: np.ndarray | None) -> bytes:
    """(M,) of numbers around 1 -> bytes: float16; empty for None."""
    return b"" if attention is None else attention.astype("<f2").tobytes()


def unpack_attention(packed: bytes) -> np.ndarray:
    """The way back: (M,) float32."""
    return np.frombuffer(packed, "<f2").astype(np.float32)


def pack_source(source: np.ndarray) -> bytes:
    """(F, N0) token numbers, -1 for none -> bytes; neighbours often have one token, so that they shrink."""
    return zlib.compress(source.astype("<i2" if source.max(initial=0) < 1 << 15 else "<i4").tobytes(), 6)


def unpack_source(packed: bytes, frames: int, tokens: int) -> np.ndarray:
    """The way back: (F, N0) int64."""
    data = zlib.decompress(packed)
    return np.frombuffer(data, f"<i{len(data) // (frames * tokens)}").reshape(frames, tokens).astype(np.int64)
