"""Text, JSON, JSON-lines and csv files that others wrote: read strictly, every error names the file and the place.

Nothing is guessed, dropped or cut: what cannot be read as the one thing it must be is an `AnnotationError`.
"""

from __future__ import annotations

import csv
import io
import json
import re
import stat
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Sequence
from pathlib import Path
from typing import Any, NoReturn, TypeVar

from tempme_vl.messages import few, shown

T = TypeVar("T")

MAX_SECONDS = 1e7  # some 115 days: a longer video is a mistake of the file
_MAX_ID = 2**63

# Letters that no text has: control characters but tab and line ends, byte order marks, halves of surrogate pairs.
_NO_TEXT = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f\ufeff\ufffe\uffff\ud800-\udfff]")
_CONTROL_BYTES = bytes({*range(32), 127} - set(b"\t\n\r"))

_KINDS = {
    stat.S_IFDIR: "a folder",
    stat.S_IFIFO: "a named pipe",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
}


class AnnotationError(ValueError):
    """A file of annotations, questions, answers or predictions that is not as described.

    The message names the file, and the line, entry or key where there is one.
    """


class errors_at:
    """A context that makes a ValueError an AnnotationError with the place in front; one of these has its place."""

    def __init__(self, place: str) -> None:
        self.place = place

    def __enter__(self) -> None: ...

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        if isinstance(error, ValueError) and not isinstance(error, AnnotationError):
            raise AnnotationError(f"{self.place}: {error}") from error


def read_text(path: Path) -> str:
    r"""A UTF-8 file, with or without a byte order mark, its line ends as "\n".

    Raises:
        AnnotationError: no regular file (nothing is opened then: a named pipe would wait for ever), one that may not be
            read, another encoding, or characters that no text has, such as NUL.
    """
    check_regular(path)
    try:
        data = path.read_bytes()
    except OSError as error:
        raise AnnotationError(f"{path}: {error.strerror}") from error
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise AnnotationError(f"{path}: expected UTF-8 text; line {line}: {error}") from error
    # files are long and seldom wrong: a quick look first
    if b"\r" in data:
        text = text.replace("\r\n", "\n").replace("\r", "\n")
    suspect = len(data.translate(None, _CONTROL_BYTES)) < len(data) or any(c in text for c in "\ufeff\ufffe\uffff")
    if suspect and (found := _NO_TEXT.search(text)):
        line = text.count("\n", 0, found.start()) + 1
        raise AnnotationError(f"{path}: expected UTF-8 text; line {line} holds the character {found[0]!r}")
    return text


def check_regular(path: Path) -> None:
    """AnnotationError for a path that is no regular file: says what it is instead."""
    try:
        mode = path.stat().st_mode
    except FileNotFoundError as error:
        why = "a link to a file that does not exist" if path.is_symlink() else "no such file"
        raise AnnotationError(f"{path}: {why}") from error
    except (OSError, ValueError) as error:
        raise AnnotationError(f"{path}: {getattr(error, 'strerror', None) or error}") from error
    if not stat.S_ISREG(mode):
        kind = _KINDS.get(stat.S_IFMT(mode), "something else")
        raise AnnotationError(f"{path}: expected a regular file; this is {kind}")


def read_lines(path: Path) -> Iterator[tuple[str, str]]:
    """The lines of a text file that are not blank, each with its place to name in errors."""
    # not splitlines: texts may hold line separators of Unicode as they are
    for number, line in enumerate(read_text(path).split("\n"), start=1):
        if line.strip():
            yield f"{path}, line {number}", line


def load_json(path: Path) -> Any:
    """The content of a JSON file.

    Raises:
        AnnotationError: as `read_text`; no JSON, which NaN and infinity are not either; a key that occurs twice in one
            object; lists or objects that are nested too deeply.
    """
    return _parse_json(read_text(path), str(path))


def json_lines(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """The objects of a JSON-lines file, each with its place to name in errors.

    Raises:
        AnnotationError: as `load_json` for each line; a line that is no object.
    """
    for place, line in read_lines(path):
        entry = _parse_json(line, place)
        if not isinstance(entry, dict):
            raise AnnotationError(f"{place}: expected a JSON object; got {shown(line)}")
        yield place, entry


def csv_rows(
    path: Path, columns: Collection[str] = (), *, line_breaks: bool = False
) -> Iterator[tuple[str, dict[str, str]]]:
    """The rows of a csv file with a header, each with its place to name in errors. Empty lines are left out.

    Quotes must be right, since one that is never closed takes all further rows into its field. Two stray quotes take
    the rows between them: so what follows a line break in a field may not look like a row, one that has as many
    commas as there are columns before this field.

    Args:
        columns: those that must be there; others may.
        line_breaks: fields hold long texts, whose lines may have any number of commas.

    Raises:
        AnnotationError: as `read_text`; a header without `columns` or with a name twice, rows with more or fewer fields
            than the header (an unquoted comma), the header again, wrong quotes.
    """
    name, reader = str(path), csv.reader(io.StringIO(read_text(path)), strict=True)
    header: list[str] | None = None
    first = 1
    while True:
        place = f"{name}, line {first}"
        try:
            fields = next(reader, None)
        except csv.Error as error:
            raise AnnotationError(f"{path}, after line {first - 1}: {error}; is there a stray quote?") from error
        if fields is None and header is not None:
            return
        if header is None:
            header = fields or []
            if not header or len(set(header)) != len(header):
                raise AnnotationError(f"{path}: expected distinct names of columns in the first line; got {header}")
            if not set(columns) <= set(header):
                raise AnnotationError(f"{path}: expected the columns {', '.join(columns)}; found {header}")
        elif fields:
            if len(fields) != len(header):
                why = " (a text with a comma needs quotes)" if len(fields) > len(header) else ""
                raise AnnotationError(
                    f"{place}: expected {len(header)} columns, as the first line has; got {len(fields)}{why}"
                )
            if fields == header:
                raise AnnotationError(f"{place}: the names of the columns again")
            if not line_breaks and (column := _swallowed_rows(fields)) is not None:
                raise AnnotationError(
                    f"{place}: the text of {header[column]!r} goes on over line ends with what looks like further "
                    "rows; is there a stray quote?"
                )
            yield place, dict(zip(header, fields, strict=True))
        first = reader.line_num + 1


def each_object(place: str, entries: object, read: Callable[[dict[str, Any]], T]) -> Iterator[T]:
    """`read` of each object of a JSON list. AnnotationError for no list of objects, and for a ValueError of `read`."""
    if not isinstance(entries, list):
        raise AnnotationError(f"{place}: expected a list of JSON objects; got {shown(entries)}")
    for number, entry in enumerate(entries):
        if not isinstance(entry, dict):
            raise AnnotationError(f"{place}, entry {number}: expected a list of JSON objects; got {shown(entry)}")
        try:
            result = read(entry)
        except ValueError as error:
            raise AnnotationError(f"{place}, entry {number}: {error}") from error
        yield result


def check_distinct(place: str, key: str, entries: Sequence[dict[str, Any]]) -> None:
    """AnnotationError where the ids under `key` are no ids, or two entries have the same: one is a copy."""
    with errors_at(place):
        values = [entry[key] for entry in entries if key in entry]
        ids = [value if type(value) is int and abs(value) < _MAX_ID else as_id(value) for value in values]
        if len(set(ids)) < len(ids):
            twice = repeated(ids)
            raise ValueError(f"{len(twice)} values of {key!r} occur more than once: {few(twice)}")


def is_text(value: object) -> bool:
    """A text that is not blank, of letters that can be written as UTF-8."""
    return isinstance(value, str) and bool(value.strip()) and (value.isprintable() or not _NO_TEXT.search(value))


def as_text(key: str, value: object) -> str:
    """A text as it is; ValueError names the key."""
    if type(value) is str and value.isprintable() and value and not value.isspace():
        return value  # nearly all are
    if isinstance(value, str) and is_text(value):
        return value
    raise ValueError(f"{key!r} must be a text that is not empty; got {shown(value)}")


def as_texts(key: str, values: object) -> tuple[str, ...]:
    """A list of texts; ValueError names the key."""
    if not isinstance(values, list) or not values or not all(map(is_text, values)):
        wrong = values
        if isinstance(values, list):
            wrong = next((value for value in values if not is_text(value)), values)
        raise ValueError(f"{key!r} must be a list of texts that are not empty; got {shown(wrong)}")
    return tuple(values)


def as_seconds(key: str, value: object) -> float:
    """A time from 0 to MAX_SECONDS; ValueError names the key."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < MAX_SECONDS:
        raise ValueError(
            f"{key!r} must be a number of seconds, 0 or more and below {MAX_SECONDS:g}; got {shown(value)}"
        )
    return float(value)


def as_id(value: object) -> str:
    """A question's or video's id, in files a text or a whole number of 64 bits, as a text; else ValueError.

    A text has no blanks around it, no tabs and no line ends.
    """
    if type(value) is str and value.isprintable() and value and value == value.strip():
        return value  # nearly all are
    if isinstance(value, bool) or not isinstance(value, str | int) or not str(value).strip():
        raise ValueError(f"expected an id, a text or a whole number; got {shown(value)}")
    if isinstance(value, int) and abs(value) >= _MAX_ID:
        raise ValueError(f"expected an id, a whole number of 64 bits; got {shown(value)}")
    text = str(value)
    if not is_text(text) or text != text.strip() or set(text) & set("\t\n\r"):
        raise ValueError(f"expected an id without blanks around it, tabs and line ends; got {shown(value)}")
    return text


def as_file_id(value: object) -> str:
    """An id that is the name of a video file without its extension: `as_id`, no path, and no invisible letters."""
    text = as_id(value)
    if "/" in text or "\\" in text or text in (".", "..") or not text.isprintable():
        raise ValueError(
            f"expected the name of a video file, without folders and invisible letters; got {shown(value)}"
        )
    return text


def repeated(items: Sequence[T]) -> list[T]:
    """Those that occur more than once, each once."""
    return [item for item, count in Counter(items).items() if count > 1]


def _parse_json(text: str, place: str) -> Any:
    try:
        return json.loads(text, object_pairs_hook=_distinct, parse_constant=_no_constant)
    except ValueError as error:
        raise AnnotationError(f"{place}: {error}") from error
    except RecursionError as error:
        raise AnnotationError(f"{place}: lists or objects are nested too deeply") from error


def _distinct(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        twice = repeated([key for key, _ in pairs])
        raise ValueError(f"{len(twice)} keys occur more than once in one object: {few(twice)}")
    return result


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no number of JSON")


def _swallowed_rows(fields: list[str]) -> int | None:
    """The column of a field that goes on over line ends with what may be further rows, cut off at this column."""
    if "\n" not in "".join(fields):
        return None
    for column, field in enumerate(fields):
        if "\n" in field and any(line.count(",") >= column for line in field.split("\n")[1:]):
            return column
    return None
