"""The run folder belongs to one run, and all of the run's ranks see the same one."""

from __future__ import annotations

import contextlib
import fcntl
import functools
import os
import secrets
import socket
import time
from pathlib import Path
from typing import TextIO

from tempme_vl.training import distributed

LOCK = ".lock"
SEEING = 10.0  # seconds after which a shared file system shows what another machine wrote


@functools.cache
def claim(output: Path) -> TextIO | None:
    """Makes the run folder, checks it and locks it until this process ends; all ranks call it. A second call of a
    process for the same folder does nothing.

    Returns:
        the lock on rank 0; None elsewhere, and on file systems that know no locks.

    Raises:
        ValueError: on every rank: a folder that a rank cannot write to, that is not the same one on all ranks, or that
            another run is using.
    """
    _require_shared(output)
    lock, trouble = None, ""
    if distributed.is_main():
        try:
            lock = _lock(output / LOCK)
        except BlockingIOError:
            holder = (output / LOCK).read_text().strip() or "another process"
            trouble = f"{output} is in use by {holder}; end that run, or give another --output"
    _agree(trouble)
    return lock


def _require_shared(output: Path) -> None:
    here = f"rank {distributed.rank()} on {socket.gethostname()}"
    (token, *_) = distributed.gather_objects(secrets.token_hex(8))
    names = [f".rank-{token}-{rank}" for rank in range(distributed.world_size())]
    own, trouble = output / names[distributed.rank()], ""
    try:
        output.mkdir(parents=True, exist_ok=True)
        own.write_text(here)
    except OSError as error:
        trouble = f"{here} cannot write to {output}: {error.strerror}"
    try:
        _agree(trouble)
        unseen = _unseen(output, names) if distributed.is_main() else []
        homes = distributed.gather_objects(here)
        if unseen:
            trouble = (
                f"{output} is not the same folder on all ranks: rank 0 on {socket.gethostname()} does not see what "
                f"{', '.join(homes[rank] for rank in unseen)} wrote there. Give an --output on a file system that all "
                "machines share"
            )
        _agree(trouble)
    finally:
        with contextlib.suppress(OSError):
            own.unlink()


def _unseen(output: Path, names: list[str]) -> list[int]:
    """Ranks whose files do not appear in the folder."""
    limit = time.monotonic() + SEEING
    while True:
        unseen = [rank for rank, name in enumerate(names) if not (output / name).is_file()]
        if not unseen or time.monotonic() > limit:
            return unseen
        time.sleep(0.2)


def _lock(path: Path) -> TextIO | None:
    """POSIX's lock, and not BSD's: it works over NFS, and loader workers that are left do not hold it."""
    stream = path.open("a+")
    try:
        fcntl.lockf(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):  # which of the two is the system's choice
        stream.close()
        raise BlockingIOError from None
    except OSError as error:
        print(f"{path} cannot be locked ({error.strerror}): take care that no second run uses this folder", flush=True)
        return None
    stream.truncate(0)
    stream.write(f"process {os.getpid()} on {socket.gethostname()}\n")
    stream.flush()
    return stream


def _agree(trouble: str) -> None:
    """ValueError on every rank if there is trouble on one."""
    told = [text for text in distributed.gather_objects(trouble) if text]
    if told:
        raise ValueError("; ".join(dict.fromkeys(told)))
