"""Errors of writing that name the file and the cause: torch and safetensors say "iostream error" on a full disk."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

PROBE = 1 << 20  # bytes


class WriteError(OSError):
    """A file or folder could not be written; says which, why, and what is left."""


@contextmanager
def naming(path: Path, left: str = "") -> Iterator[None]:
    """Says `path` and the system's reason in the error of whatever writes there.

    Args:
        left: what the user still has.
    """
    try:
        yield
    except Exception as error:
        if isinstance(error, WriteError):
            raise
        reason = error.strerror if isinstance(error, OSError) and error.strerror else _refusal(path)
        if reason is None:
            raise  # it was not the disk
        raise WriteError(f"could not write {path}: {reason}{'; ' if left else ''}{left}") from error


def _refusal(path: Path) -> str | None:
    """Why the system does not let us write where `path` is to be; None if it does."""
    folder = next((parent for parent in (path, *path.parents) if parent.is_dir()), Path())
    probe = folder / f".probe-{os.getpid()}"
    try:
        with probe.open("wb") as stream:
            stream.write(bytes(PROBE))
            stream.flush()
            os.fsync(stream.fileno())
    except OSError as error:
        return error.strerror or str(error)
    finally:
        probe.unlink(missing_ok=True)
    return None
