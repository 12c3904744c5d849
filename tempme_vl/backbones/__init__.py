"""Encoders by family. A new one is a file with what `Family` asks for, and its name in `FAMILIES`."""

from __future__ import annotations

from importlib import import_module
from typing import Any, Protocol, cast

from tempme_vl.backbones.base import Backbone

__all__ = ["FAMILIES", "Family", "find_family", "split_name"]

# modules here, each imported when a tower of it is wanted, with the library that it takes them from
FAMILIES = ("open_clip", "umt", "hf", "timm")


class Family(Protocol):
    """What a family's module offers; the configuration is JSON data with at least "family" and "preprocess".

    `TOWER_OPTIONS` are the keywords that `load_tower` takes beside the name, the weights and the number of frames.
    `Config` is a dataclass of the configuration's keys and their bounds (`tempme_vl.schema`).
    """

    TOWER_OPTIONS: tuple[str, ...]
    Config: type[Any]

    def load_tower(
        self, name: str, pretrained: str | None, num_frames: int, **options: Any
    ) -> tuple[Backbone, dict[str, Any]]: ...

    def build_tower(self, config: dict[str, Any]) -> Backbone: ...


def find_family(name: str) -> Family:
    """The module of a family.

    Raises:
        ValueError: an unknown one.
    """
    if name not in FAMILIES:
        raise ValueError(f"unknown family {name!r}; known families: {', '.join(FAMILIES)}")
    return cast(Family, import_module(f"tempme_vl.backbones.{name}"))


def split_name(name: str) -> tuple[str, str]:
    """ "family:model" -> (family, model).

    Raises:
        ValueError: no colon, or an unknown family.
    """
    family, _, model = name.partition(":")
    if family not in FAMILIES or not model:
        raise ValueError(
            f"expected a model name like 'open_clip:ViT-B-16-quickgelu'; got {name!r} "
            f"(known families: {', '.join(FAMILIES)})"
        )
    return family, model
