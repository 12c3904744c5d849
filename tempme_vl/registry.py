"""Things of one kind by name: this package's own, those that a program registers, and those of installed packages."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from importlib import import_module
from importlib.metadata import EntryPoint, entry_points
from typing import Any, Generic, TypeVar

_log = logging.getLogger(__name__)

T = TypeVar("T")


class UnknownName(ValueError, KeyError):
    """A name that a registry does not have; the message lists those that it has."""

    __str__ = ValueError.__str__  # KeyError's shows the message as a literal


class Registry(Mapping[str, T], Generic[T]):
    """A mapping by name, in the order of registration, that other packages can add to.

    From a program by `register`; from an installed package by an entry point, which is loaded when its name is asked
    for:

        [project.entry-points."tempme_vl.methods"]
        mine = "my_package.mine:METHOD"

    Args:
        kind: what the things are, in errors: "method".
        group: of entry points: "tempme_vl.methods".
        type_: a class that every thing must be an instance or a subclass of.
        own: the package's things; each and `type_` may be "module:attribute", imported only when it is asked for.
    """

    __eq__, __hash__ = object.__eq__, object.__hash__  # a type may name it: `Annotated[str, REGISTRY] | None`

    def __init__(self, kind: str, group: str, type_: type[Any] | str, own: Mapping[str, T | str]):
        self.kind, self.group, self._type = kind, group, type_
        self._things: dict[str, T | str | EntryPoint] = dict(own)
        self._installed = False  # whether entry points were looked up, which takes some 10 ms

    def register(self, name: str, thing: T, exist_ok: bool = False) -> None:
        """Adds a thing.

        Args:
            exist_ok: whether it may take another one's place.

        Raises:
            ValueError: a thing of another type, or a name that is taken.
        """
        if name in self and not exist_ok:
            raise ValueError(f"there is a {self.kind} {name!r} already; take another name, or give exist_ok=True")
        self._things[name] = self._checked(name, thing)

    def unregister(self, name: str) -> None:
        """Takes a thing out.

        Raises:
            UnknownName: there is none of the name.
        """
        if name not in self:
            raise self._unknown(name)
        del self._things[name]

    def __getitem__(self, name: str) -> T:
        """Raises:
        UnknownName: there is none of the name.
        ValueError: it cannot be imported, or is of another type.
        """
        if name not in self:
            raise self._unknown(name)
        thing = self._things[name]
        if isinstance(thing, (str, EntryPoint)):
            thing = self._things[name] = self._checked(name, self._load(name, thing))
        return thing

    def __contains__(self, name: object) -> bool:
        return name in self._things or name in self._with_installed()

    def __iter__(self) -> Iterator[str]:
        return iter(self._with_installed())

    def __len__(self) -> int:
        return len(self._with_installed())

    def __repr__(self) -> str:
        return f"Registry({self.kind}: {', '.join(self)})"

    def _with_installed(self) -> dict[str, T | str | EntryPoint]:
        if not self._installed:
            self._installed = True
            for point in entry_points(group=self.group):
                if point.name in self._things:
                    _log.warning(
                        "the %s %r of %s is not used: there is one of this name", self.kind, point.name, _package(point)
                    )
                else:
                    self._things[point.name] = point
        return self._things

    def _load(self, name: str, thing: str | EntryPoint) -> Any:
        if isinstance(thing, EntryPoint):
            try:
                return thing.load()
            except Exception as error:  # of a package of others
                raise ValueError(
                    f"the {self.kind} {name!r} of {_package(thing)} ({thing.value}) cannot be imported: "
                    f"{type(error).__name__}: {error}"
                ) from error
        return _imported(thing)

    def _checked(self, name: str, thing: Any) -> Any:
        expected = self._type = _imported(self._type) if isinstance(self._type, str) else self._type
        if isinstance(thing, expected) or (isinstance(thing, type) and issubclass(thing, expected)):
            return thing
        raise ValueError(f"expected a {expected.__name__} as the {self.kind} {name!r}; got {type(thing).__name__}")

    def _unknown(self, name: str) -> UnknownName:
        return UnknownName(
            f"unknown {self.kind} {name!r}; expected one of {', '.join(self)} (other packages add theirs by entry "
            f"points {self.group!r})"
        )


def _imported(place: str) -> Any:
    """What "module:attribute" names, or the module alone."""
    module, _, attribute = place.partition(":")
    found: Any = import_module(module)
    return getattr(found, attribute) if attribute else found


def _package(point: EntryPoint) -> str:
    return point.dist.name if point.dist else "an installed package"
