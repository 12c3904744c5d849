"""Draws docs/floors.svg, the parts of the package and what each imports, of the table in tests/test_imports.py.

make floors
"""

from __future__ import annotations

import itertools

from test_imports import MAY_IMPORT, ROOT

PICTURE = ROOT / "docs" / "floors.svg"
HEIGHT, FLOOR, GAP, MARGIN, BEND, LETTER = 30, 66, 14, 20, 10, 8.2  # pixels; the last: a letter of the font

# what a part is, by the color of its box
KINDS = {
    "values and steps of merging": (
        "#cfe3f7",
        {"state", "matching", "precision", "kernels", "costs", "merging", "scheduling", "compressors"},
    ),
    "towers and front end": ("#d8efd3", {"backbones", "text", "families", "frontend", "pooling", "tuning"}),
    "models, hosts and what runs them": (
        "#fbe3c0",
        {"tasks", "integrations", "pipeline", "evaluation", "recipes", "export", "cli", "lmms_eval", "__init__"},
    ),
    "data and training, which know no model": ("#e9d9f2", {"data", "training", "processes", "together"}),
    "names, files, errors, commands": ("#ececec", set(MAY_IMPORT)),
}


def floors(table: dict[str, set[str]]) -> list[list[str]]:
    """Parts by the longest chain of imports below them, the ones without any first."""
    height: dict[str, int] = {}
    while len(height) < len(table):
        ready = {name: below for name, below in table.items() if name not in height and below <= set(height)}
        height |= {name: 1 + max((height[other] for other in below), default=-1) for name, below in ready.items()}
    return [[name for name in table if height[name] == floor] for floor in range(max(height.values()) + 1)]


def needed(table: dict[str, set[str]]) -> dict[str, set[str]]:
    """The imports that no chain of others implies."""

    def all_below(name: str) -> set[str]:
        return set().union(*({other} | all_below(other) for other in table[name]))

    return {name: below - set().union(*map(all_below, below)) for name, below in table.items()}


def layout(table: dict[str, set[str]]) -> tuple[list[list[str]], list[list[str]]]:
    """Boxes and lines.

    Returns:
        (rows, lines): each floor from left to right, the lowest first, with a bend "a>b 3" for each line that passes a
        floor; and each line, from its part down to what that imports, by the names of what it joins.
    """
    rows = floors(table)
    floor = {name: i for i, row in enumerate(rows) for name in row}
    lines = []
    for name, below in needed(table).items():
        for other in sorted(below):
            bends = [f"{name}>{other} {i}" for i in range(floor[name] - 1, floor[other], -1)]
            for i, bend in enumerate(bends):
                rows[floor[name] - 1 - i].append(bend)
            lines.append([name, *bends, other])
    beside: dict[str, list[str]] = {name: [] for row in rows for name in row}
    for line in lines:
        for upper, lower in itertools.pairwise(line):
            beside[upper].append(lower)
            beside[lower].append(upper)
    place = {name: (i + 0.5) / len(row) for row in rows for i, name in enumerate(row)}
    for _ in range(50):  # in the order of their neighbours, so that few lines cross
        for row in rows:
            row.sort(key=lambda name: sum(place[other] for other in beside[name]) / max(1, len(beside[name])))
            place |= {name: (i + 0.5) / len(row) for i, name in enumerate(row)}
    return rows, lines


def picture(table: dict[str, set[str]]) -> str:
    """The SVG of a table of imports."""
    rows, lines = layout(table)
    widths = {name: round(LETTER * len(name)) + 20 if name in table else BEND for row in rows for name in row}
    width = max(sum(widths[name] + GAP for name in row) - GAP for row in rows) + 2 * MARGIN
    bottom = MARGIN + FLOOR * (len(rows) - 1)
    at: dict[str, tuple[float, int]] = {}  # the middle of a box's upper side
    for floor, row in enumerate(rows):
        space = (width - 2 * MARGIN - sum(widths[name] for name in row)) / len(row)
        x = MARGIN + space / 2
        for name in row:
            at[name] = x + widths[name] / 2, bottom - FLOOR * floor
            x += widths[name] + space
    height = bottom + HEIGHT + MARGIN + 24 * len(KINDS) + MARGIN
    svg = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" font-family="monospace"'
        ' font-size="13">',
        f'<rect width="{width}" height="{height}" fill="white"/>',
    ]
    for line in lines:
        path = ""
        for upper, lower in itertools.pairwise(line):
            (x1, y1), (x2, y2) = at[upper], at[lower]
            middle = (y1 + HEIGHT + y2) / 2
            path += f"{'L' if path else 'M'}{x1:.0f} {y1} V{y1 + HEIGHT} "
            path += f"C{x1:.0f} {middle:.0f} {x2:.0f} {middle:.0f} {x2:.0f} {y2}"
        svg.append(f'<path d="{path}" fill="none" stroke="#999"/>')
    for name in table:
        x, y = at[name]
        color = next(color for color, parts in KINDS.values() if name in parts)
        box = f'x="{x - widths[name] / 2:.0f}" y="{y}" width="{widths[name]}" height="{HEIGHT}" rx="5"'
        svg.append(f'<rect {box} fill="{color}" stroke="#555"/>')
        shown = "tempme_vl" if name == "__init__" else name
        svg.append(f'<text x="{x:.0f}" y="{y + 20}" text-anchor="middle">{shown}</text>')
    for i, (what, (color, _)) in enumerate(KINDS.items()):
        y = bottom + HEIGHT + MARGIN + 24 * i
        svg.append(f'<rect x="{MARGIN}" y="{y}" width="16" height="16" fill="{color}" stroke="#555"/>')
        svg.append(f'<text x="{MARGIN + 24}" y="{y + 13}">{what}</text>')
    return "\n".join([*svg, "</svg>", ""])


if __name__ == "__main__":
    PICTURE.write_text(picture(MAY_IMPORT))
