"""How commands start and how they fail: a user's mistake is one line on stderr, exit code 2.

if __name__ == "__main__":
    run(RETRIEVAL)
"""

from __future__ import annotations

import contextlib
import io
import logging
import os
import re
import socket
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from typing import Any

from tempme_vl import together
from tempme_vl.command_line import Command
from tempme_vl.processes import end_workers
from tempme_vl.reports import RESULTS

MISTAKE, INTERRUPTED = 2, 130  # exit codes; an error of the program itself ends with Python's 1
TRACEBACK = "TEMPME_VL_TRACEBACK"  # environment variable: 1 shows where a user's mistake was noticed
FIRST_RANK_SECONDS = 5.0  # to end in, after a mistake that all ranks make


def run(command: Command[Any], arguments: Sequence[str] | None = None, module: str | None = None) -> None:
    """Reads a command's options and runs it, see `Command.parse`; errors end the process as `ending` has it."""

    def start() -> None:
        # only the first rank shows --help
        with contextlib.nullcontext() if _rank() == 0 else contextlib.redirect_stdout(io.StringIO()):
            options = command.parse(arguments, module)
        command.load()(options)

    ending(start)


def ending(start: Callable[[], object]) -> None:
    """Calls `start`, and ends the process with what a user is told of an error.

    What a user can put right (see `is_mistake`) ends in one line on stderr and exit code 2, Ctrl-C in one line and 130;
    the environment variable TEMPME_VL_TRACEBACK=1 shows the traceback too. Any other error keeps its traceback and
    exit code 1. Of several ranks that make the same mistake the first prints. Messages of the package's loggers are
    shown on the first rank's stderr.
    """
    log_to_screen()
    try:
        start()
        return
    except (Exception, KeyboardInterrupt) as error:
        end_workers()
        if not isinstance(error, KeyboardInterrupt) and not is_mistake(error):
            raise
        code = INTERRUPTED if isinstance(error, KeyboardInterrupt) else MISTAKE
        text = "interrupted" if code == INTERRUPTED else f"error: {in_one_line(error)}"
        shown = traceback.format_exc() if os.environ.get(TRACEBACK, "0") not in ("", "0") else ""
    if together.joined() or _rank() == 0:
        together.end(text, code, shown)
    elif _first_rank_stays(FIRST_RANK_SECONDS):
        print(f"{shown}rank {_rank()}: {text}", file=sys.stderr, flush=True)
    sys.exit(code)


def is_mistake(error: BaseException) -> bool:
    """Whether a user can put it right: a ValueError, what the system says of a file, an error of the package's own."""
    return isinstance(error, ValueError | OSError) or type(error).__module__.partition(".")[0] == "tempme_vl"


def in_one_line(error: BaseException) -> str:
    """The message; of an error that a loader's worker met, its own message without the worker's traceback."""
    if isinstance(error, OSError) and error.filename is not None:
        return f"{error.filename}: {error.strerror}"
    text = str(error)
    if worker := re.match(r"Caught (\w+) in \w+ worker process \d+\.\nOriginal Traceback", text):
        text = re.split(rf"\n[\w.]*\b{worker[1]}: ", text)[-1]
    return re.sub(r"\s*\n\s*", " ", text.strip()) or type(error).__name__


def at_least(least: float, **options: float | None) -> None:
    """Refuses numbers of options below `least`, None aside; ValueError names the option as one writes it."""
    for name, value in options.items():
        if value is not None and not value >= least:
            raise ValueError(f"--{name.replace('_', '-')} must be {least} or more; got {value}")


def above_zero(**options: float | None) -> None:
    """Refuses numbers of options that are not above 0, as `at_least`."""
    for name, value in options.items():
        if value is not None and not value > 0:
            raise ValueError(f"--{name.replace('_', '-')} must be above 0; got {value}")


def log_to_screen() -> None:
    """Shows what the package logs on the first rank's stderr; other handlers of these loggers stay."""
    logger = logging.getLogger("tempme_vl")
    if _rank() == 0 and not any(isinstance(handler, _Screen) for handler in logger.handlers):
        logger.addHandler(_Screen())
        logger.setLevel(logging.INFO)


class _Screen(logging.Handler):
    """A handler of its own class, to be found again; results are on stdout already."""

    def emit(self, record: logging.LogRecord) -> None:
        if record.name != RESULTS:
            print(self.format(record), file=sys.stderr, flush=True)


def _rank() -> int:
    return int(os.environ.get("RANK", "0"))


def _first_rank_stays(seconds: float) -> bool:
    """False once rank 0 has ended: it made the same mistake and has said so. Its store is how that is known."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        try:
            address = os.environ.get("MASTER_ADDR", "127.0.0.1"), int(os.environ.get("MASTER_PORT", "0"))
            socket.create_connection(address, timeout=1).close()
        except OSError:
            return False
        time.sleep(0.25)
    return True
