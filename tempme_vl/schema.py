"""JSON data read into dataclasses, and written from them: every key known, every value of its type, every number within
bounds.

What a saved folder says decides how much is built, so nothing is taken as it comes: true is no number, "12" is no
number, NaN is nothing, and a tower of a thousand million layers is a mistake.
"""

from __future__ import annotations

import types
from collections.abc import Mapping
from dataclasses import MISSING, Field, dataclass, fields, is_dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, Protocol, TypeVar, Union, get_args, get_origin, get_type_hints

from tempme_vl.data.files import AnnotationError, load_json
from tempme_vl.messages import few, shown


class Settings(Protocol):
    """Any dataclass."""

    __dataclass_fields__: ClassVar[dict[str, Any]]


T = TypeVar("T", bound=Settings)


class ConfigError(ValueError):
    """Settings that are not as described; the message names the file, the key, what was expected and what is there."""


@dataclass(frozen=True)
class Range:
    """Numbers from `low` to `high`, both included."""

    low: float
    high: float

    def __str__(self) -> str:
        return " ".join(
            f"{word} {int(end) if end == int(end) else end}" for word, end in (("from", self.low), ("to", self.high))
        )


# Bounds of what is built. Generous: the largest public towers and language models stay far below them.
LAYERS, SIZE, COUNT = Range(1, 1000), Range(1, 1 << 20), Range(0, 1 << 20)
_NUMBER = Range(-(2.0**53), 2.0**53)  # where nothing else is said: whole numbers that every JSON reader keeps
_DEEPEST, _LARGEST = 20, 1 << 24  # nesting, bytes of a file
# what configurations of other libraries call the number of layers: making each takes time, whatever its size
THEIR_LAYERS = dict.fromkeys(("num_hidden_layers", "num_layers", "n_layer", "n_layers", "layers", "depth"), LAYERS)

LEFT_OUT = {"left_out": True}  # of a field, for `write`

Layers = Annotated[int, LAYERS]
Size = Annotated[int, SIZE]
Count = Annotated[int, COUNT]
Share = Annotated[float, Range(0, 1)]
Portion = Annotated[float, Range(1e-6, 1)]  # a share of which something is left
Cosine = Annotated[float, Range(-1, 1)]


def read_json(path: Path) -> Any:
    """The content of a JSON file of at most 16 MiB.

    Raises:
        ConfigError: no such file, no JSON, a key twice, NaN, or a file that is too long.
    """
    try:
        if path.is_file() and path.stat().st_size > _LARGEST:
            raise ConfigError(f"{path}: expected at most {_LARGEST} bytes; got {path.stat().st_size}")
        return load_json(path)
    except AnnotationError as error:
        raise ConfigError(str(error)) from error


def read(kind: type[T], values: object, place: str, limits: Mapping[str, Range] | None = None) -> T:
    """A dataclass from JSON data. Its annotations are the schema; `Annotated[int, Range(...)]` bounds a number.

    Args:
        kind: fields may be bool, int, float, str, Literal, None, unions, tuples, lists, mappings, dataclasses, classes
            with `from_dict(data, place)`, Any.
        values: an object of JSON; keys of fields with a default may be left out.
        place: to name in errors, such as the file.
        limits: bounds by the names of fields, for classes of other libraries, at any depth.

    Raises:
        ConfigError: unknown or missing keys, a value of another type or out of bounds, or what the class itself
            refuses.
    """
    if not isinstance(values, Mapping):
        raise ConfigError(f"{place}: expected an object of settings; got {shown(values)}")
    known = {field.name: field for field in fields(kind) if field.init}
    if unknown := [str(key) for key in values if key not in known]:
        raise ConfigError(f"{place}: unknown keys {few(list(map(repr, unknown)))}; expected {', '.join(known)}")
    needed = [name for name, f in known.items() if f.default is MISSING and f.default_factory is MISSING]
    if missing := [name for name in needed if name not in values]:
        raise ConfigError(
            f"{place}: expected the keys {', '.join(needed)}; {few(list(map(repr, missing)))} are missing"
        )
    hints = get_type_hints(kind, include_extras=True)
    given = {key: _read(hints[key], value, f"{place}, {key!r}", key, limits or {}) for key, value in values.items()}
    try:
        return kind(**given)
    except ValueError as error:
        raise ConfigError(f"{place}: {error}") from error


def write(value: Settings) -> dict[str, Any]:
    """The JSON data that `read` makes the same dataclass of; a class with `to_dict` and `from_dict(data, place)` has a
    layout of its own. A field with the metadata `LEFT_OUT` is left out where it is as by default."""
    return {
        one.name: _written(getattr(value, one.name))
        for one in fields(value)
        if one.init and not (one.metadata.get("left_out") and getattr(value, one.name) == _default(one))
    }


def _default(one: Field[Any]) -> Any:
    return one.default if one.default_factory is MISSING else one.default_factory()


def _written(value: Any) -> Any:
    if hasattr(value, "to_dict"):
        return value.to_dict()
    if is_dataclass(value) and not isinstance(value, type):
        return write(value)
    if isinstance(value, Mapping):
        return {name: _written(part) for name, part in value.items()}
    if isinstance(value, list | tuple):
        return [_written(part) for part in value]
    return value


def check_plain(values: object, place: str, limits: Mapping[str, Range] | None = None) -> None:
    """Settings of another library, whose keys are its own affair: only that numbers are finite and within bounds.

    Args:
        limits: bounds by key, at any depth; a key without one may have any number up to 2^53.

    Raises:
        ConfigError: names the key.
    """
    _check_plain(values, place, "", limits or {}, 0)


def _check_plain(value: object, place: str, key: str, limits: Mapping[str, Range], depth: int) -> None:
    if depth > _DEEPEST:
        raise ConfigError(f"{place}: nested too deeply")
    if isinstance(value, Mapping):
        for name, part in value.items():
            _check_plain(part, f"{place}, {name!r}", str(name), limits, depth + 1)
    elif isinstance(value, list | tuple):
        for part in value:
            _check_plain(part, place, key, limits, depth + 1)
    elif isinstance(value, bool) or not isinstance(value, int | float):
        if key in limits and value is not None:
            raise ConfigError(f"{place}: expected a number {limits[key]}; got {shown(value)}")
    else:
        _number(value, place, limits.get(key, _NUMBER), whole=isinstance(value, int))


def _read(hint: Any, value: object, place: str, key: str, limits: Mapping[str, Range]) -> Any:
    """A value as its annotation wants it."""
    bounds = limits.get(key, _NUMBER)
    if get_origin(hint) is Annotated:
        bounds = next((part for part in get_args(hint)[1:] if isinstance(part, Range)), bounds)
        hint = get_args(hint)[0]
    origin, parts = get_origin(hint), get_args(hint)
    if hint is Any:
        return value
    if origin in (Union, types.UnionType):
        return _union(parts, value, place, key, limits)
    if hint is type(None) and value is None:
        return None
    if origin is Literal and any(type(value) is type(part) and value == part for part in parts):
        return value
    if hint is int or hint is float:
        return _number(value, place, bounds, whole=hint is int)
    if hint in (bool, str) and type(value) is hint:
        return value
    if isinstance(hint, type) and hasattr(hint, "from_dict"):
        return hint.from_dict(value, place)
    if isinstance(hint, type) and is_dataclass(hint):
        return read(hint, value, place, limits)
    if (origin or hint) in (tuple, list) and isinstance(value, list | tuple):
        if origin is tuple and parts[-1:] != (...,) and len(parts) != len(value):
            raise ConfigError(f"{place}: expected {len(parts)} values; got {shown(value)}")
        each = parts if origin is tuple and parts[-1:] != (...,) else parts[:1] * len(value)
        return (origin or hint)(_read(part, item, place, key, limits) for part, item in zip(each, value, strict=True))
    if origin is not None and isinstance(origin, type) and issubclass(origin, Mapping) and isinstance(value, Mapping):
        return {name: _read(parts[1], part, f"{place}, {name!r}", str(name), limits) for name, part in value.items()}
    if hint is dict and isinstance(value, Mapping):  # of classes of other libraries: whatever plain data
        _check_plain(value, place, key, limits, 0)
        return dict(value)
    raise ConfigError(f"{place}: expected {_described(hint, bounds)}; got {shown(value)}")


def _union(parts: tuple[Any, ...], value: object, place: str, key: str, limits: Mapping[str, Range]) -> Any:
    problems = []
    for part in parts:
        try:
            return _read(part, value, place, key, limits)
        except ConfigError as error:
            problems.append(error)
    # of a value and None, what the value is to be
    others = [problem for part, problem in zip(parts, problems, strict=True) if part is not type(None)]
    if len(others) == 1:
        raise others[0]
    expected = " or ".join(_described(part, limits.get(key, _NUMBER)) for part in parts)
    raise ConfigError(f"{place}: expected {expected}; got {shown(value)}")


def _number(value: object, place: str, bounds: Range, whole: bool) -> int | float:
    wrong = isinstance(value, bool) or (whole and isinstance(value, float))  # true is an int, too
    if isinstance(value, int | float) and not wrong and bounds.low <= value <= bounds.high:  # which NaN never is
        return value if whole else float(value)
    raise ConfigError(f"{place}: expected {_described(int if whole else float, bounds)}; got {shown(value)}")


def _described(hint: Any, bounds: Range) -> str:
    """A type in words."""
    if get_origin(hint) is Annotated:
        bounds = next((part for part in get_args(hint)[1:] if isinstance(part, Range)), bounds)
        hint = get_args(hint)[0]
    origin, parts = get_origin(hint), get_args(hint)
    if origin is Literal:
        return f"one of {', '.join(map(repr, parts))}"
    if hint in (int, float):
        number = "a whole number" if hint is int else "a number"
        return number if bounds == _NUMBER else f"{number} {bounds}"
    if (origin or hint) in (tuple, list):
        return f"a list of: {_described(parts[0], bounds)}" if parts else "a list"
    if origin in (Union, types.UnionType):
        return " or ".join(_described(part, bounds) for part in parts)
    names = {bool: "true or false", str: "a text", type(None): "null"}
    return names.get(hint, "an object of settings")
