"""Commands that run one after the other within a time, each in a process of its own: what one loses, others keep."""

from __future__ import annotations

import json
import os
import shlex
import signal
import subprocess
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tempme_vl.reports import show

_TAIL = 3000  # characters of what a failed part wrote


@dataclass(frozen=True)
class Part:
    """A command that writes its report with --json FILE.

    Attributes:
        seconds: after which it is ended.
        environment: variables on top of this process's.
    """

    name: str
    command: Sequence[str]
    seconds: float
    environment: Mapping[str, str] = field(default_factory=dict)


def run_part(part: Part, folder: Path, seconds: float) -> dict[str, Any]:
    """Runs it; what it prints is in FOLDER/NAME.log.

    Args:
        folder: for its log and its report.
        seconds: what is left for it; it has at most its own.

    Returns:
        JSON data: "status" ("done", "failed", "out of time", "not begun"), "command", "seconds" that it took, "report"
        (what it wrote; None without), and of what did not end well "error", the end of its log.
    """
    log, file, limit = folder / f"{part.name}.log", folder / f"{part.name}.json", min(part.seconds, seconds)
    file.unlink(missing_ok=True)
    command = [*part.command, "--json", str(file)]
    done: dict[str, Any] = {"status": "not begun", "command": shlex.join(command), "seconds": 0.0, "report": None}
    if limit <= 0:
        return {**done, "error": "no time was left"}
    start = time.perf_counter()
    done["status"] = _status(command, {**os.environ, **part.environment}, log, limit)
    done["seconds"] = round(time.perf_counter() - start, 1)
    if file.is_file():  # a part may have written it, and failed then
        done["report"] = json.loads(file.read_text())
    elif done["status"] == "done":
        done["status"] = "failed"
    return done if done["status"] == "done" else {**done, "error": log.read_text(errors="replace")[-_TAIL:]}


def _status(command: Sequence[str], environment: Mapping[str, str], log: Path, limit: float) -> str:
    with log.open("wb") as output:
        process = subprocess.Popen(
            command, stdout=output, stderr=subprocess.STDOUT, env=environment, start_new_session=True
        )
        try:
            return "failed" if process.wait(limit) else "done"
        except subprocess.TimeoutExpired:
            return "out of time"
        finally:
            if process.poll() is None:  # also on Ctrl-C; with its own processes, which hold a GPU's memory
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()


def told(name: str, done: Mapping[str, Any]) -> None:
    """Prints how a part ended."""
    last = done.get("error", "").strip().splitlines()[-1:]
    show(f"{name}: {done['status']} after {done['seconds']:.0f} s{''.join(f': {line}' for line in last)}")
