"""JSON data as dataclasses: what is taken, and what is said of everything else."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Annotated, Any, Literal

import pytest

from tempme_vl.backbones import open_clip as clip_family
from tempme_vl.backbones import open_clip_models as clip_models
from tempme_vl.configs import FrontendConfig
from tempme_vl.data.sampling import SAMPLING
from tempme_vl.frontend import VisualFrontend, create_frontend
from tempme_vl.schema import LEFT_OUT, ConfigError, Range, check_plain, read, read_json, write
from tempme_vl.tasks.inputs import Inputs


@dataclass(frozen=True)
class Inner:
    rate: Annotated[float, Range(0, 1)]


@dataclass(frozen=True)
class Outer:
    layers: Annotated[int, Range(1, 1000)]
    mode: Literal["joint", "clip"]
    inner: Inner
    pair: tuple[int, int] = (0, 0)
    joins: tuple[Annotated[int, Range(1, 9)] | None, ...] = ()
    on: bool = False
    name: str | None = None
    more: Mapping[str, Any] | None = None

    def __post_init__(self) -> None:
        if self.pair[0] > self.pair[1]:
            raise ValueError(f"expected an ordered pair; got {self.pair}")


GOOD: dict[str, Any] = {"layers": 12, "mode": "clip", "inner": {"rate": 1}}


def test_what_is_right_is_taken() -> None:
    assert read(Outer, GOOD, "f") == Outer(12, "clip", Inner(1.0))
    assert isinstance(read(Outer, GOOD, "f").inner.rate, float)
    given = GOOD | {"pair": [1, 2], "joins": [None, 9], "on": True, "name": "x", "more": {"any": [1]}}
    assert read(Outer, given, "f") == Outer(12, "clip", Inner(1.0), (1, 2), (None, 9), True, "x", {"any": [1]})


@dataclass(frozen=True)
class Plan:
    """With a layout of its own: 3 steps are "xxx"."""

    steps: int

    def to_dict(self) -> str:
        return "x" * self.steps

    @classmethod
    def from_dict(cls, data: Any, place: str) -> Plan:
        if set(data) - {"x"}:
            raise ConfigError(f"{place}: expected x's; got {data!r}")
        return cls(len(data))


@dataclass(frozen=True)
class Written:
    outer: Outer
    plans: Mapping[str, Plan]
    name: str | None = field(default=None, metadata=LEFT_OUT)
    more: Mapping[str, Any] = field(default_factory=dict, metadata=LEFT_OUT)


def test_what_is_written_is_read_again() -> None:
    outer = Outer(12, "clip", Inner(0.5), (1, 2), (None, 9), True, None, {"any": [1, {"x": None}]})
    value = Written(outer, {"a": Plan(2)})
    data = write(value)
    assert data["outer"] == {**vars(outer), "inner": {"rate": 0.5}, "pair": [1, 2], "joins": [None, 9]}
    assert data.keys() == {"outer", "plans"} and data["plans"] == {"a": "xx"}
    assert read(Written, json.loads(json.dumps(data)), "f") == value
    full = Written(outer, {}, "n", {"b": 1})
    assert write(full).keys() == {"outer", "plans", "name", "more"} and read(Written, write(full), "f") == full
    with pytest.raises(ConfigError, match="f, 'plans', 'a': expected x's; got 'xy'"):
        read(Written, {**data, "plans": {"a": "xy"}}, "f")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"layers": True}, "'layers': expected a whole number from 1 to 1000; got True"),
        ({"layers": "12"}, "'layers': expected a whole number from 1 to 1000; got '12'"),
        ({"layers": 12.0}, "'layers': expected a whole number from 1 to 1000; got 12.0"),
        ({"layers": 0}, "'layers': expected a whole number from 1 to 1000; got 0"),
        ({"layers": 10**9}, "'layers': expected a whole number from 1 to 1000; got 1000000000"),
        ({"layers": 10**400}, "'layers': expected a whole number from 1 to 1000; got 1000"),
        ({"layers": None}, "'layers': expected a whole number from 1 to 1000; got None"),
        ({"inner": {"rate": float("nan")}}, "'inner', 'rate': expected a number from 0 to 1; got nan"),
        ({"inner": {"rate": float("inf")}}, "'inner', 'rate': expected a number from 0 to 1; got inf"),
        ({"inner": {"rate": False}}, "'inner', 'rate': expected a number from 0 to 1; got False"),
        ({"inner": 3}, "'inner': expected an object of settings; got 3"),
        ({"inner": {}}, "'inner': expected the keys rate; 'rate' are missing"),
        ({"mode": "Clip"}, "'mode': expected one of 'joint', 'clip'; got 'Clip'"),
        ({"mode": ["clip"]}, r"'mode': expected one of 'joint', 'clip'; got \['clip'\]"),
        ({"pair": [1, 2, 3]}, r"'pair': expected 2 values; got \[1, 2, 3\]"),
        ({"pair": "12"}, "'pair': expected a list of: a whole number; got '12'"),
        ({"pair": [2, 1]}, r"f: expected an ordered pair; got \(2, 1\)"),
        ({"joins": 5}, "'joins': expected a list of: a whole number from 1 to 9 or null; got 5"),
        ({"joins": [10]}, "'joins': expected a whole number from 1 to 9; got 10"),
        ({"on": 1}, "'on': expected true or false; got 1"),
        ({"name": 1}, "'name': expected a text; got 1"),
        ({"more": []}, r"'more': expected an object of settings; got \[\]"),
        ({"surprise": 1}, "f: unknown keys 'surprise'; expected layers, mode, inner"),
    ],
)
def test_what_is_wrong_is_named(change: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        read(Outer, GOOD | change, "f")


def test_settings_of_other_libraries_are_finite_and_bounded() -> None:
    limits = {"layers": Range(1, 9)}
    check_plain({"layers": 9, "deep": {"layers": [1, 2], "any": None, "x": -0.5}}, "f", limits)
    for value in (10, 0, "9", True, float("nan")):
        with pytest.raises(ConfigError, match="f, 'deep', 'layers': expected"):
            check_plain({"deep": {"layers": value}}, "f", limits)
    for value in (float("inf"), 2**60):
        with pytest.raises(ConfigError, match="f, 'x': expected a"):
            check_plain({"x": value}, "f")
    nested: Any = 1
    for _ in range(30):
        nested = [nested]
    with pytest.raises(ConfigError, match="f: nested too deeply"):
        check_plain(nested, "f")


@pytest.mark.parametrize(
    ("text", "said"),
    [('{"a": NaN}', "NaN is no number"), ('{"a": 1, "a": 2}', "occur more than once"), ("{", "line 1")],
)
def test_files_that_are_no_json(tmp_path: Path, text: str, said: str) -> None:
    (tmp_path / "c.json").write_text(text)
    with pytest.raises(ConfigError, match=rf"c\.json: .*{said}"):
        read_json(tmp_path / "c.json")
    with pytest.raises(ConfigError, match=r"gone\.json: no such file"):
        read_json(tmp_path / "gone.json")
    (tmp_path / "long.json").write_bytes(b" " * (1 << 24) + b"1")
    with pytest.raises(ConfigError, match=r"long\.json: expected at most 16777216 bytes"):
        read_json(tmp_path / "long.json")


def test_inputs_know_the_ways_of_sampling_that_there_are() -> None:
    for name in SAMPLING:
        assert read(Inputs, {"sampling": name}, "f").sampling == name
    with pytest.raises(ConfigError, match=f"expected one of .*{next(iter(SAMPLING))}"):
        read(Inputs, {"sampling": "fps2"}, "f")


@cache
def tiny() -> dict[str, Any]:
    return create_frontend("umt:tiny", method="none", num_frames=4).full_config().to_dict()


def tower(**changes: Any) -> dict[str, Any]:
    return tiny() | changes


def built(settings: dict[str, Any]) -> VisualFrontend:
    return VisualFrontend.from_config(FrontendConfig.from_dict(settings, "FILE"), "FILE")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"heads": 5}, "heads the width; got patches of 8 in 32 px, 5 heads in width 64"),
        ({"width": -64}, "'width': expected a whole number from 1"),
        ({"layers": 10**9}, "'layers': expected a whole number from 1 to 1000"),
        ({"layers": 7}, "the backbone has 7 layers"),
        ({"num_frames": 10**9}, "'num_frames': expected a whole number from 1 to 10000"),
        ({"family": "umt2"}, "'family': expected one of open_clip, umt, hf, timm"),
        ({"drop_path": 1.5}, "'drop_path': expected a number from 0 to 1"),
        ({"surprise": 1}, "unknown keys 'surprise'"),
        ({"schedule": {"method": "none"}}, "'schedule': expected the keys method, frames, tokens, plan"),
        ({"schedule": None}, "'schedule': expected an object"),
        ({"preprocess": {}}, "'preprocess': expected the keys image_size, mean"),
    ],
)
def test_towers_are_bounded(change: dict[str, Any], said: str) -> None:
    assert built(tower()).shape.width == 64
    with pytest.raises(ConfigError, match=rf"FILE.*{said}"):
        built(tower(**change))


def test_preprocessing_and_tower_agree() -> None:
    config = tower()
    config["preprocess"] = {**config["preprocess"], "image_size": 64}
    with pytest.raises(ConfigError, match="'preprocess', 'image_size': expected 32, as the tower takes; got 64"):
        built(config)


def test_heads_that_do_not_divide_a_clip_are_no_other_heads() -> None:
    """open_clip itself would round the heads down: 64 // 48 is 1."""
    config = write(clip_family.load_clip("tiny").config)
    for part, key, value in (("vision_cfg", "head_width", 48), ("text_cfg", "heads", 3)):
        wrong = {**config, part: {**config[part], key: value}}
        with pytest.raises(ConfigError, match=f"FILE: '{part}'.*divide"):
            read(clip_models.Config, wrong, "FILE")
