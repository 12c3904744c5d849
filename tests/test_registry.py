"""Things by name: the package's own, registered ones, and those of installed packages."""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tempme_vl.registry import Registry, UnknownName

LAZY = "a_module_of_this_test"


def whole_numbers(group: str = "tempme_vl.of_tests") -> Registry[int]:
    return Registry("number", group, int, {"one": 1, "two": 2})


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An installed package with entry points: a good one, one of a taken name, and two bad ones."""
    points = f"three = {LAZY}:THREE\none = {LAZY}:THREE\nbroken = {LAZY}_broken:X\nword = {LAZY}:WORD\n"
    info = tmp_path / "numbers_of_others-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: numbers-of-others\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(f"[tempme_vl.of_tests]\n{points}")
    (tmp_path / f"{LAZY}.py").write_text("THREE, WORD = 3, 'three'\n")
    (tmp_path / f"{LAZY}_broken.py").write_text("import no_such_module\n")
    monkeypatch.syspath_prepend(tmp_path)
    yield tmp_path
    for name in (LAZY, f"{LAZY}_broken"):
        sys.modules.pop(name, None)


def test_a_registered_thing_is_there_until_it_is_taken_out() -> None:
    numbers = whole_numbers()
    numbers.register("three", 3)
    assert dict(numbers) == {"one": 1, "two": 2, "three": 3} and repr(numbers) == "Registry(number: one, two, three)"
    with pytest.raises(ValueError, match="a number 'three' already; take another name, or give exist_ok=True"):
        numbers.register("three", 33)
    numbers.register("three", 33, exist_ok=True)
    assert numbers["three"] == 33
    numbers.unregister("three")
    assert "three" not in numbers and len(numbers) == 2


def test_unknown_names_and_other_types_are_refused() -> None:
    numbers = whole_numbers()
    message = r"^unknown number 'ten'; expected one of one, two \(other packages .* 'tempme_vl.of_tests'\)"
    for look_up in (numbers.__getitem__, numbers.unregister):
        with pytest.raises(ValueError, match=message) as e:
            look_up("ten")
        assert isinstance(e.value, UnknownName)
    assert numbers.get("ten") is None
    with pytest.raises(ValueError, match="expected a int as the number 'ten'; got str"):
        numbers.register("ten", "10")
    kinds: Registry[type[int]] = Registry("kind", "tempme_vl.of_tests", int, {})
    kinds.register("bool", bool)
    with pytest.raises(ValueError, match="expected a int as the kind 'str'; got type"):
        kinds.register("str", str)


def test_what_lies_in_another_module_is_imported_when_it_is_asked_for(package: Path) -> None:
    lazy: Registry[int] = Registry("number", "none", int, {"one": 1, "three": f"{LAZY}:THREE"})
    assert list(lazy) == ["one", "three"] and LAZY not in sys.modules
    assert lazy["three"] == 3 and LAZY in sys.modules
    whole: Registry[object] = Registry("module", "none", object, {"it": LAZY})
    assert whole["it"] is sys.modules[LAZY]


def test_installed_packages_add_theirs(package: Path, caplog: pytest.LogCaptureFixture) -> None:
    numbers = whole_numbers()
    with caplog.at_level(logging.WARNING):
        assert list(numbers) == ["one", "two", "three", "broken", "word"] and LAZY not in sys.modules
    assert "the number 'one' of numbers-of-others is not used" in caplog.text
    assert numbers["three"] == 3 and numbers["one"] == 1
    with pytest.raises(ValueError, match=r"number 'broken' of numbers-of-others .* cannot be imported: ModuleNotFound"):
        _ = numbers["broken"]
    with pytest.raises(ValueError, match="expected a int as the number 'word'; got str"):
        _ = numbers["word"]
    with pytest.raises(ValueError, match="a number 'three' already"):
        whole_numbers().register("three", 4)
    assert list(whole_numbers("tempme_vl.of_nobody")) == ["one", "two"]
