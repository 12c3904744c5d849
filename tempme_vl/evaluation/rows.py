"""How the rows of a comparison are written: a method, perhaps something behind it, and options of the method."""

from __future__ import annotations

from typing import NamedTuple


class RowText(NamedTuple):
    """ "tome+lora:r=4,budget=0.5" taken apart: the method, what follows the mark "+", and the options."""

    method: str
    second: str | None
    options: tuple[str, ...]


def read_row(text: str, mark: str) -> RowText | None:
    """A row's text taken apart; None where an option is not NAME=VALUE.

    Args:
        mark: what stands between the method and what follows it.
    """
    names, _, options = text.partition(":")
    method, _, second = names.partition(mark)
    found = tuple(option for option in options.split(",") if option)
    return RowText(method, second or None, found) if all("=" in option for option in found) else None


def row_name(row: RowText, mark: str) -> str:
    """As `read_row` reads it."""
    second = "" if row.second is None else f"{mark}{row.second}"
    return f"{row.method}{second}{':' if row.options else ''}{','.join(row.options)}"


def file_name(name: str) -> str:
    """A row's name, for a file or a folder."""
    return name.translate(str.maketrans(":=,/ ", "_-_-_"))
