"""Points with intervals in panels beside each other, as SVG."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

WIDE, HIGH, LEFT, BELOW, ABOVE, RIGHT = 360, 320, 58, 46, 16, 14  # pixels of a panel's plot, and around it
COLORS = ("#1b6ca8", "#d1495b", "#2e933c", "#8f5aa8", "#c07a00", "#00838f", "#6d4c41", "#5c6b73")
LETTER, RADIUS = 11, 7


@dataclass(frozen=True)
class Point:
    """A named value at a place, with the ends of its interval."""

    name: str
    x: float
    y: float
    low: float | None = None
    high: float | None = None


@dataclass(frozen=True)
class Panel:
    """What lies across, and the points."""

    across: str
    points: Sequence[Point]


def ticks(low: float, high: float, most: int = 6) -> list[float]:
    """Round numbers from below `low` to above `high`, at most some."""
    span = (high - low) or abs(high) or 1.0
    step = 10.0 ** math.floor(math.log10(span / most))
    step = next(step * times for times in (1, 2, 5, 10, 20) if span / (step * times) <= most - 2)
    first, last = math.floor(low / step), math.ceil(high / step)
    last += last == first
    return [round(step * i, 12) for i in range(first, last + 1)]


def draw(upwards: str, panels: Sequence[Panel]) -> str:
    """The picture.

    Args:
        upwards: what all panels have upwards.
    """
    values = [end for panel in panels for p in panel.points for end in (p.y, p.low, p.high) if end is not None]
    y_ticks = ticks(min(values), max(values))
    whole = len(panels) * (LEFT + WIDE + RIGHT)
    names = list(dict.fromkeys(p.name for panel in panels for p in panel.points))
    marks = {name: _mark(number, name) for number, name in enumerate(names, 1)}
    legend = _legend(marks, whole)
    height = ABOVE + HIGH + BELOW + 20 * (1 + max((row for row, _ in legend), default=0)) + 8
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {whole} {height}" font-family="sans-serif"'
        f' font-size="{LETTER}">',
        f'<rect width="{whole}" height="{height}" fill="white"/>',
    ]
    for number, panel in enumerate(panels):
        left = number * (LEFT + WIDE + RIGHT) + LEFT
        lines += _panel(panel, left, y_ticks, marks)
    middle = ABOVE + HIGH / 2
    lines.append(f'<text transform="translate(14 {middle}) rotate(-90)" text-anchor="middle">{escape(upwards)}</text>')
    lines += [f'<g transform="translate(0 {ABOVE + HIGH + BELOW + 20 * row})">{text}</g>' for row, text in legend]
    return "\n".join([*lines, "</svg>", ""])


@dataclass(frozen=True)
class Mark:
    """What a name has in all panels and in the legend: a number, since there are more names than colors."""

    color: str
    drawn: str  # around (0, 0)


def _mark(number: int, name: str) -> Mark:
    color = COLORS[(number - 1) % len(COLORS)]
    circle = f'<circle r="{RADIUS}" fill="{color}"><title>{escape(name)}</title></circle>'
    return Mark(color, f'{circle}<text y="3" font-size="9" fill="white" text-anchor="middle">{number}</text>')


def _panel(panel: Panel, left: int, y_ticks: Sequence[float], marks: dict[str, Mark]) -> list[str]:
    x_ticks = ticks(min(p.x for p in panel.points), max(p.x for p in panel.points))

    def x(value: float) -> float:
        return left + WIDE * (value - x_ticks[0]) / (x_ticks[-1] - x_ticks[0])

    def y(value: float) -> float:
        return ABOVE + HIGH * (y_ticks[-1] - value) / (y_ticks[-1] - y_ticks[0])

    bottom = ABOVE + HIGH
    lines = [f'<rect x="{left}" y="{ABOVE}" width="{WIDE}" height="{HIGH}" fill="none" stroke="#888"/>']
    for value in y_ticks:
        lines.append(f'<path d="M{left} {y(value):.1f}h{WIDE}" stroke="#e5e5e5"/>')
        lines.append(f'<text x="{left - 5}" y="{y(value) + 4:.1f}" text-anchor="end">{value:g}</text>')
    for value in x_ticks:
        lines.append(f'<path d="M{x(value):.1f} {bottom}v4" stroke="#888"/>')
        lines.append(f'<text x="{x(value):.1f}" y="{bottom + 17}" text-anchor="middle">{value:g}</text>')
    lines.append(f'<text x="{left + WIDE / 2}" y="{bottom + 34}" text-anchor="middle">{escape(panel.across)}</text>')
    for p in panel.points:
        mark = marks[p.name]
        if p.low is not None and p.high is not None:
            ends = f"M{x(p.x):.1f} {y(p.low):.1f}V{y(p.high):.1f}"
            lines.append(f'<path d="{ends}" stroke="{mark.color}" opacity="0.6"/>')
        lines.append(f'<g transform="translate({x(p.x):.1f} {y(p.y):.1f})">{mark.drawn}</g>')
    return lines


def _legend(marks: dict[str, Mark], width: int) -> list[tuple[int, str]]:
    """(line, SVG) of each name, from left to right."""
    placed, row, x = [], 0, LEFT
    for name, mark in marks.items():
        wide = 26 + round(0.62 * LETTER * len(name))
        if x + wide > width and x > LEFT:
            row, x = row + 1, LEFT
        at = f'<g transform="translate({x} 8)">{mark.drawn}</g>'
        placed.append((row, f'{at}<text x="{x + RADIUS + 4}" y="12">{escape(name)}</text>'))
        x += wide
    return placed
