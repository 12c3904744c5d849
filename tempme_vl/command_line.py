"""Commands: their options as a dataclass, read from a command line, and what they run, imported once that is read.

A field `merge_layers: tuple[int, ...] | None = None` is the option --merge-layers 2 3 4, the text below it its help.
Classes of options are joined by inheritance: each that declares fields is a group of the help, headed by the first line
of its docstring. A field `Annotated[str, REGISTRY]` is one of the registry's names, those registered meanwhile
included; one with the metadata FIRST_WORD is written without its name, in front of the options, a tuple as several
words; and `short("-k")` gives an option one letter. Reading options and --help import only what the options do, so that
no module of options needs torch.
"""

from __future__ import annotations

import argparse
import ast
import difflib
import inspect
import itertools
import json
import shutil
import sys
import textwrap
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import MISSING, Field, dataclass, fields
from importlib import import_module
from pathlib import Path
from types import NoneType
from typing import Annotated, Any, Generic, Literal, NoReturn, TypeVar, get_args, get_origin, get_type_hints

T = TypeVar("T")
WORDS = {int: "INT", float: "FLOAT", str: "TEXT", Path: "PATH"}
WIDEST = 110  # columns of a help, in wider terminals too
FIRST_WORD: Mapping[str, Any] = {"first_word": True}  # metadata of a field


def short(letter: str) -> dict[str, Any]:
    """Metadata of a field whose option is also written so, "-k"."""
    return {"short": letter}


@dataclass(frozen=True)
class Example:
    """A way to use a command: what for, its options, on how many GPUs (by the deepspeed launcher; None: without)."""

    about: str
    options: str = ""
    gpus: int | None = None


@dataclass(frozen=True)
class Command(Generic[T]):
    """A command of this package.

    Attributes:
        name: as `tempme-vl` has it, "train retrieval".
        options: the dataclass of its options; the docstring is what --help says first.
        main: what runs with them, as "module:function" if importing it takes more than an instant.
        examples: what --help says last.
        defaults: (arguments) -> the options' defaults that differ from those of the dataclass.
        checked: (options) -> the options; raises ValueError for those that miss each other.
        without: fields of the dataclass that this command does not offer.
        summary: what it is for, if not what the docstring of the options says first.
    """

    name: str
    options: type[T]
    main: str | Callable[[T], object]
    examples: Sequence[Example] = ()
    defaults: Callable[[Sequence[str]], Mapping[str, Any]] = lambda arguments: {}
    checked: Callable[[T], T] = lambda options: options
    without: Collection[str] = ()
    summary: str = ""

    def parse(self, arguments: Sequence[str] | None = None, module: str | None = None) -> T:
        """Options of a command line; --help is printed and ends the process.

        Args:
            arguments: default: those of the process.
            module: that the process runs; None for a script.

        Raises:
            ValueError: an unknown, repeated or missing option, or a value that it cannot have.
        """
        arguments = sys.argv[1:] if arguments is None else arguments
        text = self._examples(module)
        said = inspect.cleandoc(self.options.__doc__ or "").partition("\n\n")
        parser = _Parser(self._program(module), _usage(self.options), f"{self.about}{said[1]}{said[2]}", text)
        defaults = self.defaults(arguments)
        hints, texts = get_type_hints(self.options, include_extras=True), _texts(self.options)
        for group, members in _groups(self.options):
            section = parser.add_argument_group(group) if group else parser
            for field in members:
                if (name := field.name) not in self.without:
                    _add(section, field, hints[name], texts.get(name, ""), defaults.get(name, field.default))
        return self.checked(self.options(**{**defaults, **parser.read(arguments)}))

    def load(self) -> Callable[[T], object]:
        """What runs."""
        if callable(self.main):
            return self.main
        module, function = self.main.split(":")
        return getattr(import_module(module), function)

    @property
    def about(self) -> str:
        """What it is for."""
        return self.summary or inspect.cleandoc(self.options.__doc__ or "").partition("\n\n")[0]

    def _program(self, module: str | None) -> str:
        return sys.argv[0] if module is None else f"tempme-vl {self.name}"

    def _examples(self, module: str | None) -> str:
        lines = []
        for example in self.examples:
            start = self._program(module) if module else f"python {self._program(module)}"
            if example.gpus is not None:
                what = f"--module {module} {self.name}" if module else self._program(module)
                start = f"deepspeed --num_gpus {example.gpus} {what}"
            lines += [f"  # {example.about}", *_continued(f"{start} {example.options}")]
        return "\n".join(["examples:", *lines]) if lines else ""


def first_look(arguments: Sequence[str], names: Sequence[str], several: Sequence[str] = ()) -> argparse.Namespace:
    """The options that decide about the defaults of others, as texts or None, before all are read.

    Args:
        several: those that take several values, as lists.
    """
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    for name in names:
        parser.add_argument(f"--{name}")
    for name in several:
        parser.add_argument(f"--{name}", nargs="*", default=[])
    return parser.parse_known_args(_hyphens(arguments))[0]


class _Parser(argparse.ArgumentParser):
    def __init__(self, program: str, usage: str, description: str, examples: str):
        wrapped = [textwrap.fill(paragraph, _width()) for paragraph in description.split("\n\n")]
        super().__init__(
            program,
            usage,
            "\n\n".join(wrapped),
            examples,
            formatter_class=_Help,
            allow_abbrev=False,
        )
        # the deepspeed launcher's; the environment says the same
        self.add_argument("--local-rank", default=argparse.SUPPRESS, help=argparse.SUPPRESS)

    def read(self, arguments: Sequence[str]) -> dict[str, Any]:
        """The options that are given, by name."""
        given, unknown = self.parse_known_args(_hyphens(arguments))
        if unknown:
            names = [name for action in self._actions for name in action.option_strings]
            near = difflib.get_close_matches(unknown[0].partition("=")[0], names, 1)
            self.error(f"unknown: {' '.join(unknown)}" + (f"; did you mean {near[0]}?" if near else ""))
        return {name: value for name, value in vars(given).items() if name != "local_rank"}

    def error(self, message: str) -> NoReturn:
        raise ValueError(f"{message.removeprefix('argument ')} (--help lists the options)")


class _Help(argparse.RawDescriptionHelpFormatter):
    def __init__(self, prog: str):
        super().__init__(prog, max_help_position=26, width=_width())

    def _split_lines(self, text: str, width: int) -> list[str]:
        return textwrap.wrap(text, width, break_on_hyphens=False)


class _Several(argparse.Action):
    """Values as a tuple, or None."""

    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: str | None = None) -> None:
        setattr(namespace, self.dest, None if values == [None] else tuple(values))


class _Switch(argparse.Action):
    """--name, --no-name."""

    def __init__(self, option_strings: Sequence[str], dest: str, **shared: Any):
        off = [f"--no-{name.removeprefix('--')}" for name in option_strings]
        super().__init__([*option_strings, *off], dest, nargs=0, **shared)

    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: str | None = None) -> None:
        setattr(namespace, self.dest, option_string in self.option_strings[: len(self.option_strings) // 2])


def _add(section: Any, field: Field[Any], hint: Any, text: str, default: Any) -> None:
    """The option of a field; one that is not given is left out of what is read.

    Args:
        hint: the field's type.
        default: MISSING where it must be given.
    """
    optional = NoneType in get_args(hint)
    kind = next(kind for kind in get_args(hint) if kind is not NoneType) if optional else hint
    several = get_origin(kind) is tuple
    kind = get_args(kind)[0] if several else kind
    how: dict[str, Any]
    if kind is bool:
        how = {"action": _Switch}
    elif names := _names(kind):
        choices = [*names, None] if optional else names
        how = {"type": _reader(str, optional), "metavar": f"{{{','.join(names)}}}", "choices": choices}
    else:
        how = {"type": _reader(kind, optional), "metavar": WORDS.get(kind)}
    if several:
        how |= {"nargs": "*", "action": _Several}
    if default is MISSING:
        how["required"] = True
        text = f"{text} (required)"
    elif default is not None and default is not False and default != ():
        text = f"{text} (default: {_shown(default)})"
    name = f"--{field.name.replace('_', '-')}"
    shared: dict[str, Any] = {"default": argparse.SUPPRESS, "help": text.strip().replace("%", "%%")}
    if field.metadata.get("first_word"):
        needed = how.pop("required", False)
        how |= {"nargs": "*" if several else None if needed else "?", "metavar": field.name.upper()}
        section.add_argument(field.name, **how, **shared)
    else:
        letters = [letter for letter in [field.metadata.get("short")] if letter]
        section.add_argument(*letters, name, dest=field.name, **shared, **how)


def _names(kind: Any) -> tuple[str, ...]:
    """Those that a value has to be one of."""
    if get_origin(kind) is Annotated:
        return tuple(get_args(kind)[1])
    return get_args(kind) if get_origin(kind) is Literal else ()


def _reader(kind: Any, optional: bool) -> Callable[[str], Any]:
    """Reads a value, or None from "None", which numbers may have small."""

    def read(text: str) -> Any:
        return None if optional and (text == "None" or (text == "none" and kind in (int, float))) else kind(text)

    read.__name__ = WORDS.get(kind, "")  # as argparse names it
    return read


def _shown(value: Any) -> str:
    return "on" if value is True else " ".join(map(str, value)) if isinstance(value, tuple) else str(value)


def _hyphens(arguments: Sequence[str]) -> list[str]:
    """--data_root=x as --data-root=x."""
    split = (argument.partition("=") for argument in arguments)
    return [
        f"{name.replace('_', '-')}{equals}{value}" if name.startswith("--") else f"{name}{equals}{value}"
        for name, equals, value in split
    ]


def _usage(kind: type[Any]) -> str:
    """As argparse wants it."""
    words = [field for field in fields(kind) if field.metadata.get("first_word")]
    shown = [one.name.upper() if one.default is MISSING else f"[{one.name.upper()}]" for one in words]
    return " ".join(["%(prog)s", *shown, "[options]"])


def _groups(kind: type[Any]) -> list[tuple[str, list[Field[Any]]]]:
    """Fields by the class that declares them last, with what the class says of them; "" for `kind` itself."""
    owners = {name: cls for cls in reversed(kind.__mro__) for name in inspect.get_annotations(cls)}
    groups = [(cls, [field for field in fields(kind) if owners[field.name] is cls]) for cls in kind.__mro__]
    return [("" if cls is kind else _heading(cls), members) for cls, members in groups if members]


def _heading(cls: type[Any]) -> str:
    return inspect.cleandoc(cls.__doc__ or cls.__name__).splitlines()[0].rstrip(".")


def _texts(kind: type[Any]) -> dict[str, str]:
    """The string below each field, by its name."""
    found = {}
    for cls in reversed(kind.__mro__):
        if "__annotations__" not in cls.__dict__:
            continue
        body = ast.parse(textwrap.dedent(inspect.getsource(cls))).body[0]
        assert isinstance(body, ast.ClassDef)
        for field, text in itertools.pairwise(body.body):
            if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name) and isinstance(text, ast.Expr):
                found[field.target.id] = " ".join(ast.literal_eval(text.value).split())
    return found


def _width() -> int:
    return max(40, min(WIDEST, shutil.get_terminal_size().columns - 2))


def _continued(command: str) -> list[str]:
    """A command in lines that fit, as a shell reads them."""
    lines = textwrap.wrap(command, _width() - 8, break_long_words=False, break_on_hyphens=False)
    return [f"  {'  ' * (i > 0)}{line}{' ' + chr(92) * (i < len(lines) - 1)}".rstrip() for i, line in enumerate(lines)]


def named_value(option: str) -> tuple[str, Any]:
    """ "rank=16" as ("rank", 16)."""
    name, equals, text = option.partition("=")
    if not equals:
        raise ValueError(f"expected NAME=VALUE; got {option!r}")
    try:
        return name, json.loads(text)
    except ValueError:  # a word
        return name, text
