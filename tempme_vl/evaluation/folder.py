"""What comparisons leave behind: a folder whose runs are alike, and a section of a page."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tempme_vl.reports import write_json

ALIKE_FILE = "alike.json"


def check_alike(folder: Path, given: Mapping[str, Any]) -> None:
    """Writes down what all runs of a folder have alike, or compares it with what is written there.

    Args:
        given: options by their names.

    Raises:
        ValueError: the folder holds runs that were made with other options; names them.
    """
    ours = json.loads(json.dumps(given, default=str))
    file = folder / ALIKE_FILE
    if not file.is_file():
        return write_json(file, ours)
    theirs = json.loads(file.read_text())
    if differing := [name for name in ours if theirs.get(name) != ours[name]]:
        shown = ", ".join(f"--{name.replace('_', '-')} {theirs.get(name)}" for name in differing)
        raise ValueError(f"the runs in {folder} have {shown}: give the same, or another --output")


def with_section(page: str, name: str, text: str, command: str = "compare") -> str:
    """A page whose section of a name is another, or new, and whose other text stays.

    Args:
        command: of `tempme-vl`, which writes the section.

    Raises:
        ValueError: the section begins without an end.
    """
    first, last = f"<!-- {name}: tempme-vl {command} writes this -->", f"<!-- end of {name} -->"
    section = f"{first}\n\n{text}\n\n{last}"
    before, begins, rest = page.partition(first)
    if not begins:
        return f"{page.rstrip()}\n\n{section}\n"
    _, ends, after = rest.partition(last)
    if not ends:
        raise ValueError(f"expected the line {last!r} behind {first!r} in the page; write it, or remove both")
    return before + section + after


def markdown_table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table."""
    lines = [heads, ["---"] * len(heads), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
