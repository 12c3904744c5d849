"""Command lines: what they are read into, what --help shows of them, and what is imported to do so."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Annotated, Any, Literal

import pytest
from training.processes import ROOT, SCRIPTS

from tempme_vl.cli import COMMANDS
from tempme_vl.command_line import FIRST_WORD, Command, Example, short
from tempme_vl.merging import METHODS
from tempme_vl.recipes.options.presets import SETTING
from tempme_vl.recipes.options.shared import MergeOptions
from tempme_vl.registry import Registry
from tempme_vl.tasks.heads import HeadNames

HEAVY = {"torch", "deepspeed", "transformers", "open_clip", "timm", "peft", "torchvision"}


@dataclass(frozen=True)
class Shared:
    """How long it takes."""

    steps: int | None = None
    """Updates,
    100 % of them."""
    rate: float = 0.5
    keep: bool = True


@dataclass(frozen=True)
class Options(Shared):
    """What this is for.

    More about it.
    """

    kind: Literal["a", "none"] | None = None
    """Which one."""
    layers: tuple[int, ...] = ()
    kinds: tuple[Literal["a", "b"], ...] = ()
    file: Path | None = None
    hidden: int = 3


COMMAND = Command("do it", Options, print, (Example("eight", "--steps 3", gpus=8),), without=("hidden",))


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("", {}),
        ("--steps 3 --rate=1e-3 --file a/b", {"steps": 3, "rate": 1e-3, "file": Path("a/b")}),
        ("--layers 2 3 --no-keep", {"layers": (2, 3), "keep": False}),
        ("--layers --kinds b a", {"layers": (), "kinds": ("b", "a")}),
        ("--kind none --steps none", {"kind": "none", "steps": None}),
        ("--kind None --file None --no_keep --keep", {"kind": None, "file": None, "keep": True}),
        ("--local_rank=1 --rate -1", {"rate": -1.0}),
        ("--steps 1 --steps 2", {"steps": 2}),
    ],
)
def test_what_is_read(given: str, expected: dict[str, Any]) -> None:
    assert COMMAND.parse(given.split()) == Options(**expected)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("--steps many", r"^--steps: invalid INT value: 'many' \(--help lists the options\)$"),
        ("--kind b", "^--kind: invalid choice: 'b'"),
        ("--kinds a c", "^--kinds: invalid choice: 'c'"),
        ("--step 3", r"^unknown: --step 3; did you mean --steps\?"),
        ("--hidden 3", "unknown: --hidden 3"),
        ("a word", "unknown: a word"),
        ("--rate", "--rate: expected one argument"),
        ("--rate none", "--rate: invalid FLOAT value: 'none'"),
    ],
)
def test_what_is_refused(given: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        COMMAND.parse(given.split())


def test_help_has_groups_defaults_and_examples(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        COMMAND.parse(["--help"], module="some.module")
    assert end.value.code == 0
    shown = capsys.readouterr().out
    first, _, shared = shown.partition("\nHow long it takes:\n")
    assert first.startswith("usage: tempme-vl do it [options]\n\nWhat this is for.\n\nMore about it.\n")
    assert "  --kind {a,none} " in first and "--kinds [{a,b} ...]" in first and "--file PATH" in first
    assert "--steps INT" in shared and "Updates, 100 % of them." in shared and "--rate" not in first
    assert "(default: 0.5)" in shared and "--keep, --no-keep" in shared and "(default: on)" in shared
    assert "hidden" not in shown and "local" not in shown and "None" not in shown
    examples = "examples:\n  # eight\n  deepspeed --num_gpus 8 --module some.module do it --steps 3\n"
    assert shown.endswith(examples)


@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: command.name)
def test_help_imports_no_framework_and_explains_every_option(command: Command[Any]) -> None:
    code = f"""
import sys, tempme_vl.cli
sys.argv = ["tempme-vl", *{command.name.split()}, "--help"]
try:
    tempme_vl.cli.main()
except SystemExit as end:
    assert not end.code
assert not {HEAVY} & set(sys.modules), {HEAVY} & set(sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, ""), done.stderr
    lines = done.stdout.splitlines()
    options = [number for number, line in enumerate(lines) if re.match(r"  (-\w \w+, )?--|  [A-Z]+ ", line)]
    assert len(options) == len(fields(command.options)) - len(command.without)
    for number in options:  # its text is on the same line, or on the next
        beside = len(lines[number].split("  ")) > 2
        assert beside or lines[number + 1].startswith(" " * 20), lines[number]
    assert "\nexamples:\n" in done.stdout and f"tempme-vl {command.name}" in done.stdout


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_script_is_the_command(name: str) -> None:
    script = SCRIPTS[name]
    done = subprocess.run([sys.executable, script, "--help"], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    command = next(command for command in COMMANDS if command.name == name)
    assert done.stdout.startswith(f"usage: {script} [options]\n\n") and f"python {script}" in done.stdout
    assert command.about.split(":")[0].split()[-1] in done.stdout
    assert f"--module tempme_vl.cli {name}" not in done.stdout


@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: command.name)
def test_examples_can_be_read_and_what_runs_is_there(command: Command[Any]) -> None:
    for example in command.examples:
        command.parse(shlex.split(example.options))
    assert callable(command.load())


def test_names_that_are_written_out_are_those_of_the_tables() -> None:
    """Reading them from the tables would import torch."""
    qa = next(command for command in COMMANDS if command.name == "train videoqa")
    assert all(qa.parse(["--head", head]).head == head for head in HeadNames("qa"))
    assert {*METHODS["tempme"].option_names, *METHODS["tome"].option_names} - {"proportional"} == set(SETTING)
    assert set(SETTING) < {field.name for field in fields(MergeOptions)}


THINGS: Registry[int] = Registry("thing", "tempme_vl.of_tests", int, {"one": 1})


@dataclass(frozen=True)
class Chosen:
    """Of a registry."""

    thing: Annotated[str, THINGS] = "one"
    other: Annotated[str, THINGS] | None = None


def test_names_of_a_registry_are_read_anew(capsys: pytest.CaptureFixture[str]) -> None:
    command = Command("choose", Chosen, print)
    with pytest.raises(ValueError, match="--thing: invalid choice: 'two'"):
        command.parse(["--thing", "two"])
    THINGS.register("two", 2)
    assert command.parse(["--thing", "two", "--other", "one"]) == Chosen("two", "one")
    assert command.parse(["--other", "None"]) == Chosen()
    with pytest.raises(SystemExit):
        command.parse(["--help"])
    assert "--thing {one,two}" in capsys.readouterr().out


@dataclass(frozen=True)
class Words:
    """Words in front of options."""

    place: Path = field(metadata=FIRST_WORD)
    text: str = field(default="all", metadata=FIRST_WORD)
    k: int = field(default=3, metadata=short("-k"))


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (["a/b"], Words(Path("a/b"))),
        (["a/b", "some words", "-k", "4"], Words(Path("a/b"), "some words", 4)),
        (["--k=5", "a/b"], Words(Path("a/b"), k=5)),
    ],
)
def test_words_stand_in_front_of_options(given: list[str], expected: Words) -> None:
    assert Command("look in", Words, print).parse(given) == expected


@dataclass(frozen=True)
class Several:
    """Any number of words in front of options."""

    files: tuple[Path, ...] = field(default=(), metadata=FIRST_WORD)
    k: int = 3


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ([], Several()),
        (["--k", "4"], Several(k=4)),
        (["a", "b c", "--k", "4"], Several((Path("a"), Path("b c")), 4)),
        (["--k=4", "a"], Several((Path("a"),), 4)),
    ],
)
def test_a_tuple_takes_several_words(given: list[str], expected: Several) -> None:
    assert Command("look at", Several, print).parse(given) == expected


def test_a_missing_word_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    command = Command("look in", Words, print)
    with pytest.raises(ValueError, match="are required: PLACE"):
        command.parse(["-k", "4"])
    with pytest.raises(ValueError, match="unknown: third"):
        command.parse(["first", "second", "third"])
    with pytest.raises(SystemExit):
        command.parse(["--help"], "tempme_vl.cli")
    assert capsys.readouterr().out.startswith("usage: tempme-vl look in PLACE [TEXT] [options]\n")
