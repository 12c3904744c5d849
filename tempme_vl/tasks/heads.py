"""Heads: what makes answers, or similarities with texts, of the tokens of a front end.

A new one is a file with its class, and a line in `tempme_vl.registries`; from outside of the package
`HEADS.register("name", Class)`, or an entry point of the group "tempme_vl.heads". Nothing here imports torch, so that
command lines can list the names.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from tempme_vl.messages import few
from tempme_vl.registries import HEADS, QA_HEADS, SIMILARITY_HEADS
from tempme_vl.schema import read
from tempme_vl.tasks.qa.options import NAMED

_log = logging.getLogger(__name__)

Task = Literal["qa", "retrieval"]
_IN_WORDS = {"qa": "question answering", "retrieval": "retrieval"}


@dataclass(frozen=True)
class NoOptions:
    """Of a head that can be told nothing."""


class Head:
    """What heads of all kinds say of themselves.

    Attributes:
        name: in `HEADS`, and in the configuration of a saved model.
        task: what it is for.
        options: a frozen dataclass; on a command line `--head-options name=value`.
        published: options of a retrieval run (`tempme_vl.recipes.options`) that its authors train with on MSRVTT; what
            they do not say is not here.
        new_parameters: patterns (re.search) of the names of those parameters that no pretrained model had; they learn
            at their own rate.
    """

    name: ClassVar[str]
    task: ClassVar[Task]
    options: ClassVar[type[Any]] = NoOptions
    published: ClassVar[Mapping[str, Any]] = {}
    new_parameters: tuple[str, ...] = ()


@dataclass(frozen=True)
class HeadNames:
    """The heads for a task. Those of other packages are imported to know theirs."""

    task: Task

    def __iter__(self) -> Iterator[str]:
        return (name for name in HEADS if _task(name) == self.task)


def find_head(name: str, task: Task) -> type[Head]:
    """A head by its name.

    Raises:
        ValueError: there is none of the name for this task, or it cannot be imported.
    """
    if name not in HEADS or _task(name) not in (task, None):
        other = " is for another task, and" if name in HEADS else ""
        known = few(list(HeadNames(task)), 99)
        raise ValueError(f"{name!r}{other} is no head for {_IN_WORDS[task]}; expected one of {known}")
    head, own = HEADS[name], getattr(HEADS[name], "name", None)
    if own != name:
        raise ValueError(f"the head {name!r} calls itself {own!r}, by which its saved models would not be found")
    return head


def options_of(name: str) -> type[Any]:
    """The dataclass of a head's options; a head whose options have names of their own on the command line is not
    imported."""
    return NAMED[name] if name in NAMED else HEADS[name].options


def read_options(name: str, given: Mapping[str, Any]) -> Any:
    """A head's options.

    Raises:
        ValueError: options that it does not have, or not of their types; those that are missing.
    """
    return read(options_of(name), given, f"head {name!r}")


def _task(name: str) -> Task | None:
    if name in QA_HEADS or name in SIMILARITY_HEADS:
        return "qa" if name in QA_HEADS else "retrieval"
    try:
        return HEADS[name].task
    except ValueError as error:  # of a package of others, which is to stop nothing but its own use
        _log.warning("%s", error)
        return None
