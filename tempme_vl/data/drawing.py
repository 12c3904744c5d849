"""Small colored shapes on a plain background, as the videos that this package renders show them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

COLORS = {
    "red": (225, 30, 30),
    "green": (20, 165, 40),
    "blue": (35, 65, 230),
    "yellow": (245, 215, 20),
    "magenta": (215, 40, 205),
    "cyan": (30, 205, 215),
}
SHAPES = ("square", "ring", "triangle", "cross")  # a filled circle is hard to tell from a square at 32 pixels


@dataclass(frozen=True)
class Thing:
    """An object: its place (x to the right, y down, from the centre of the frame) and radius in pixels."""

    color: str
    shape: str
    x: float
    y: float
    radius: float


def draw(things: Sequence[Thing], background: tuple[int, int, int], size: int) -> np.ndarray:
    """A picture of each thing: uint8 (N, size, size, 3), RGB."""
    pixel = np.arange(size, dtype=np.float32) - (size - 1) / 2
    x = pixel[None, None, :] - _column(thing.x for thing in things)
    y = pixel[None, :, None] - _column(thing.y for thing in things)
    radius = _column(thing.radius for thing in things)
    distance = np.empty((len(things), size, size), dtype=np.float32)
    for shape in {thing.shape for thing in things}:
        rows = [i for i, thing in enumerate(things) if thing.shape == shape]
        distance[rows] = _distance(shape, x[rows], y[rows], radius[rows])
    # One pixel of linear fall-off around the outline is the anti-aliasing.
    coverage = np.clip(0.5 - distance, 0.0, 1.0)[..., None]
    color = np.array([COLORS[thing.color] for thing in things], dtype=np.float32)[:, None, None, :]
    behind = np.array(background, dtype=np.float32)
    return np.rint(behind + coverage * (color - behind)).astype(np.uint8)


def _column(values: Iterable[float]) -> np.ndarray:
    return np.array(list(values), dtype=np.float32)[:, None, None]


def _distance(shape: str, x: np.ndarray, y: np.ndarray, radius: np.ndarray) -> np.ndarray:
    """Signed distance to the outline in pixels (near it), negative inside."""
    if shape == "ring":
        return np.abs(np.hypot(x, y) - 0.76 * radius) - 0.24 * radius
    if shape == "square":
        return np.maximum(np.abs(x), np.abs(y)) - 0.85 * radius
    if shape == "triangle":
        sides = np.sqrt(0.75) * np.abs(x) - 0.5 * y
        return np.maximum(sides, y) - 0.55 * radius
    if shape == "cross":
        ax, ay, arm = np.abs(x), np.abs(y), 0.3 * radius
        return np.minimum(np.maximum(ax - arm, ay - radius), np.maximum(ay - arm, ax - radius))
    raise AssertionError(shape)
