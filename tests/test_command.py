"""How commands end: one line and exit code 2 for a user's mistake, a traceback for an error of the program."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
from command_runs import own_defaults, start
from training.processes import exit_codes
from training.processes import start as start_process


def ended(log: Path, *arguments: str, world: int = 1, **options: Any) -> tuple[list[int | None], list[str]]:
    codes = exit_codes(start_process(partial(start, **options), list(arguments), log=log, world=world))
    return codes, log.read_text().splitlines()


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (("--kind", "value"), "error: expected one thing, got another"),
        (("--kind", "file"), "error: /no/such/folder/file: No such file or directory"),
        (("--kind", "package"), "error: its own error"),
        (("--kind", "worker"), "error: /clips/b.mp4: cut off"),
    ],
    ids=lambda value: value[1] if isinstance(value, tuple) else "",
)
def test_a_mistake_is_one_line(arguments: tuple[str, ...], line: str, tmp_path: Path) -> None:
    codes, lines = ended(tmp_path / "log", *arguments)
    of_torch = ("Warning", "check_worker_number", "  warnings.warn(")  # about few cores
    lines = [line for line in lines if not any(part in line for part in of_torch)]
    assert (codes, lines) == ([2], ["a message of the package", line])


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ((), "--kind"),
        (("--kind", "value", "--workers", "many"), "--workers: invalid INT value: 'many'"),
        (("--kind", "value", "--worker", "3"), "unknown: --worker 3; did you mean --workers?"),
    ],
    ids=["missing", "no number", "unknown"],
)
def test_a_command_line_that_does_not_parse_is_one_line(arguments: tuple[str, ...], said: str, tmp_path: Path) -> None:
    codes, lines = ended(tmp_path / "log", *arguments)
    assert codes == [2] and len(lines) == 1
    assert lines[0].startswith("error: ") and said in lines[0] and "─" not in lines[0]


def test_defaults_of_ones_own_may_warn_and_refuse(tmp_path: Path) -> None:
    codes, lines = ended(tmp_path / "log", defaults=own_defaults)
    assert (codes, lines) == ([2], ["a warning of the parser", "error: options that miss each other"])


def test_what_is_no_mistake_ends_as_in_python(tmp_path: Path) -> None:
    codes, lines = ended(tmp_path / "bug", "--kind", "bug")
    assert codes == [1] and "KeyError: 'a key'" in lines[-1] and any("Traceback" in line for line in lines)
    assert ended(tmp_path / "exit", "--kind", "exit") == ([143], ["a message of the package"])
    assert ended(tmp_path / "interrupt", "--kind", "interrupt") == ([130], ["a message of the package", "interrupted"])
    assert ended(tmp_path / "none", "--kind", "none") == ([0], ["a message of the package", "a result"])


def test_help_is_shown_once(tmp_path: Path) -> None:
    codes, lines = ended(tmp_path / "log", "--help", world=2)
    assert codes == [0, 0]
    assert sum("What this command is for." in line for line in lines) == 1


def test_a_traceback_is_shown_on_request(tmp_path: Path) -> None:
    codes, lines = ended(tmp_path / "log", "--kind", "value", traceback="1")
    assert codes == [2] and "Traceback (most recent call last):" in lines


def test_one_rank_tells_of_a_mistake(tmp_path: Path) -> None:
    """The first, if all make it; else the one that does."""
    codes, lines = ended(tmp_path / "all", "--kind", "ranks: all", world=2)
    assert codes == [2, 2] and [line for line in lines if "error" in line] == ["error: a mistake on ranks: all"]
    codes, lines = ended(tmp_path / "one", "--kind", "ranks: one", world=2, seconds=0.5)
    assert codes[1] == 2 and "rank 1: error: a mistake on ranks: one" in lines
