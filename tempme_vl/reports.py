"""What a command leaves behind: the result on the screen and in the log, its JSON file, and where it came from."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import platform
import shlex
import sys
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime, timezone
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any

from tempme_vl import __version__

# as a report names them -> the distributions that hold them
PACKAGES = {
    "torch": "torch",
    "transformers": "transformers",
    "open_clip": "open_clip_torch",
}

RESULTS = "tempme_vl.results"
"""The logger of results."""
_log = logging.getLogger(RESULTS)


def provenance() -> dict[str, Any]:
    """What a report says of its making: "versions" by package ("not installed" where there is none) and of python,
    "date" (UTC, ISO 8601) and "command" (as a shell would read it)."""
    return {
        "versions": {
            "tempme_vl": __version__,
            **{name: _version(package) for name, package in PACKAGES.items()},
            "python": platform.python_version(),
        },
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "command": shlex.join(sys.argv),
    }


def show(text: str) -> None:
    """Prints a result on stdout, and gives it to the logger RESULTS, which the screen does not repeat."""
    print(text, flush=True)
    _log.info(text)


def format_columns(lines: Sequence[Mapping[str, str]]) -> str:
    """A plain-text table under the keys of the first line."""
    width = {name: max(len(name), *(len(line[name]) for line in lines)) for name in lines[0]}
    shown = [dict(zip(width, width, strict=True)), *lines]
    return "\n".join("  ".join(line[name].rjust(width[name]) for name in width) for line in shown)


def write_json(file: Path, content: Any, indent: int = 2) -> None:
    """`write_whole` of a JSON file."""
    write_whole(file, (json.dumps(content, indent=indent) + "\n").encode())


def write_whole(file: Path, content: bytes) -> None:
    """Writes a file and its folders, beside its place first: it is there whole or as it was before.

    Raises:
        ValueError: it cannot be written; names the file and the cause.
    """
    target = file.resolve()
    special = target.exists() and not target.is_file()  # a pipe or a device is written to, never replaced
    beside = target if special else target.with_name(f"{target.name}.{os.getpid()}.partial")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        beside.write_bytes(content)
        if not special:
            beside.replace(target)
    except OSError as error:
        if not special:
            with contextlib.suppress(OSError):
                beside.unlink()
        raise ValueError(f"{file} could not be written: {error.strerror or error}") from error


def finish(shown: str, report: Mapping[str, Any], file: Path | None, *more: Callable[[], object]) -> None:
    """Shows a result, and only then writes files: a full disk must not take a long evaluation with it.

    Args:
        file: for the report with its `provenance`, if there is one.
        more: write other files.

    Raises:
        ValueError: names the files that could not be written; all others are.
    """
    show(shown)
    writers = list(more)
    if file is not None:
        writers.insert(0, partial(write_json, file, {**report, **provenance()}))
    failures = []
    for write in writers:
        try:
            write()
        except ValueError as error:
            failures.append(str(error))
    if failures:
        raise ValueError("; ".join(failures))


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"
