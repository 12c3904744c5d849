"""Text, JSON and csv files whose errors name the file."""

from __future__ import annotations

import csv
import io
import json
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any


def read_text(path: Path) -> str:
    """A UTF-8 file, with or without a byte order mark; ValueError where there is none."""
    if not path.is_file():
        raise ValueError(f"{path}: no such file")
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: expected UTF-8 text; {error}") from error


def load_json(path: Path) -> Any:
    """The content of a JSON file; ValueError names the file, also where a key occurs twice in one object."""
    text = read_text(path)
    try:
        return json.loads(text, object_pairs_hook=_distinct)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def json_lines(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """The objects of a JSON-lines file, each with its place to name in errors."""
    for number, line in enumerate(read_text(path).split("\n"), start=1):
        if line.strip():
            with errors_at(f"{path}, line {number}"):
                entry = json.loads(line, object_pairs_hook=_distinct)
                if not isinstance(entry, dict):
                    raise ValueError(f"expected a JSON object; got {line[:80]!r}")
            yield f"{path}, line {number}", entry


def csv_rows(path: Path) -> Iterator[tuple[str, dict[str, str]]]:
    """The rows of a csv file with a header, each with its place to name in errors; ValueError for ragged rows."""
    reader = csv.DictReader(io.StringIO(read_text(path)))
    header = reader.fieldnames
    if not header or len(set(header)) != len(header):
        raise ValueError(f"{path}: expected distinct names of columns in the first line; got {header}")
    try:
        for row in reader:
            place = f"{path}, line {reader.line_num}"
            if None in row or None in row.values():
                raise ValueError(f"{place}: expected {len(header)} columns, as the first line has")
            yield place, row
    except csv.Error as error:
        raise ValueError(f"{path}, after line {reader.line_num}: {error}") from error


@contextmanager
def errors_at(place: str) -> Iterator[None]:
    """Puts the place in front of a ValueError's message."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{place}: {error}") from error


def is_text(value: object) -> bool:
    """A text that is not blank."""
    return isinstance(value, str) and bool(value.strip())


def as_text(key: str, value: object) -> str:
    """ValueError names the key."""
    if not isinstance(value, str) or not value.strip():
        raise ValueError(f"{key!r} must be a text that is not empty; got {value!r}")
    return value


def as_texts(key: str, values: object) -> tuple[str, ...]:
    """A list of texts; ValueError names the key."""
    if not isinstance(values, list) or not values or not all(map(is_text, values)):
        raise ValueError(f"{key!r} must be a list of texts that are not empty; got {values!r}")
    return tuple(values)


def few(items: Sequence[object], limit: int = 5) -> str:
    """The first items, for error messages."""
    return ", ".join(map(str, items[:limit])) + (", ..." if len(items) > limit else "")


def _distinct(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        twice = [key for key, count in Counter(key for key, _ in pairs).items() if count > 1]
        raise ValueError(f"{len(twice)} keys occur more than once in one object: {few(twice)}")
    return result
