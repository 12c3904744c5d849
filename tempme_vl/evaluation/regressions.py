"""Measured ratios beside stored ones: which rows became slower.

Seconds of two runs say little where other work runs beside them; a row's time over that of the first row, in the same
turn, can be compared.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

_SAME = ("model", "frames", "batch", "what", "schedule", "dtype", "device", "threads")
Measured = Mapping[str, Any]  # what `tempme_vl.evaluation.efficiency_command.measure` gives


class SlowerError(RuntimeError):
    """Rows became slower than a stored measurement allows, or nothing could be compared."""


@dataclass(frozen=True)
class Change:
    """A row's ratio to the first row, then and now."""

    setting: str
    row: str
    before: float
    now: float

    @property
    def factor(self) -> float:
        return self.now / self.before


def stored(file: Path) -> list[Measured]:
    """The measurements in a file that --json wrote, or in one of `eval/gpu.py`.

    Raises:
        ValueError: a file without any.
    """
    try:
        content = json.loads(file.read_text())
    except ValueError as error:
        raise ValueError(f"{file}: expected JSON that --json wrote; {error}") from error
    found = list(measured_of(content))
    if not found:
        raise ValueError(f"{file}: expected a report of `efficiency --measure --json`; it holds no measured rows")
    return found


def measured_of(content: Any) -> Iterator[Measured]:
    """The measurements in a report, those of its parts included."""
    if not isinstance(content, dict):
        return
    yield from content.get("measured", ())
    for part in content.get("parts", {}).values():
        yield from measured_of(part.get("report"))


def changes(before: Sequence[Measured], now: Sequence[Measured]) -> list[Change]:
    """Rows that both measured in the same setting with the same first row, that row itself left out."""
    earlier = {_key(measured): {row["name"]: row["ratio"] for row in measured["rows"]} for measured in before}
    found = []
    for measured in now:
        known = earlier.get(_key(measured), {})
        setting = ", ".join(f"{name} {measured['setting'][name]}" for name in _SAME)
        rows = [row for row in measured["rows"][1:] if row["name"] in known]
        found += [Change(setting, row["name"], known[row["name"]], row["ratio"]) for row in rows]
    return found


def _key(measured: Measured) -> tuple[object, ...]:
    return (*(measured["setting"][name] for name in _SAME), measured["rows"][0]["name"])


def compare(before: Sequence[Measured], now: Sequence[Measured], spread: float) -> str:
    """What became of the ratios, in words.

    Args:
        spread: by which share of itself a ratio may grow.

    Raises:
        SlowerError: names the rows that grew by more; or there is no row to compare.
    """
    found = changes(before, now)
    if not found:
        raise SlowerError(
            f"nothing to compare: no row has the same {', '.join(_SAME)} and first row as a stored one; measure what "
            "was measured then, on the same device"
        )
    slower = [change for change in found if change.factor > 1 + spread]
    if slower:
        named = "; ".join(
            f"{change.row} {change.before:.3f} -> {change.now:.3f} ({change.factor - 1:+.0%}; {change.setting})"
            for change in slower
        )
        raise SlowerError(f"{len(slower)} of {len(found)} rows became slower by more than {spread:.0%}: {named}")
    factors = ", ".join(f"{change.row} {change.factor:.2f}" for change in found)
    return f"{len(found)} rows as fast as stored, within {spread:.0%}; now by then: {factors}"
