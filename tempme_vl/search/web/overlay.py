"""Patches of the tower's square input as boxes on the video's own frames, and as a shade around them.

Letters: G patches a side.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

Box = tuple[float, float, float, float]  # left, top, width, height


def boxes(mask_GG: np.ndarray, width: int, height: int, resize: str) -> list[Box]:
    """Rectangles that cover the marked patches, in pixels of a frame.

    Args:
        mask_GG: bool.
        width, height: of the frame.
        resize: "shortest", patches cover the square in its middle; "squash", they cover all of it.
    """
    side = min(width, height)
    across, down = (side, side) if resize == "shortest" else (width, height)
    left, top = (width - across) / 2, (height - down) / 2
    step_x, step_y = across / mask_GG.shape[1], down / mask_GG.shape[0]
    return [
        (left + first * step_x, top + row * step_y, (last - first) * step_x, rows * step_y)
        for row, rows, first, last in _rectangles(mask_GG)
    ]


def svg_shade(some: Sequence[Box], width: int, height: int) -> str:
    """All of a frame but the boxes, as the "d" of a path with the fill rule "evenodd"."""
    holes = (f"M{x:.1f} {y:.1f}h{w:.1f}v{h:.1f}h{-w:.1f}z" for x, y, w, h in some)
    return f"M0 0h{width}v{height}h{-width}z" + "".join(holes)


def _rectangles(mask_GG: np.ndarray) -> list[tuple[int, int, int, int]]:
    """Runs of marked patches as (row, rows, first, last + 1); equal runs below one another are one."""
    done: list[tuple[int, int, int, int]] = []
    open_runs: dict[tuple[int, int], tuple[int, int]] = {}  # run -> its first row, its rows
    for row, marks in enumerate(mask_GG):
        edges = np.flatnonzero(np.diff(np.pad(marks.astype(np.int8), 1)))
        runs = {(int(first), int(last)) for first, last in edges.reshape(-1, 2)}
        for run in set(open_runs) - runs:
            done.append((*open_runs.pop(run), *run))
        for run in runs:
            first, rows = open_runs.get(run, (row, 0))
            open_runs[run] = first, rows + 1
    return sorted(done + [(*place, *run) for run, place in open_runs.items()])
