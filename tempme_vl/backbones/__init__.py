"""Encoders by family. A new one is a file with `load_tower` and `build_tower`, and a line in `FAMILIES`."""

from __future__ import annotations

from typing import Any, Protocol

from tempme_vl.backbones import open_clip
from tempme_vl.backbones.base import Backbone

__all__ = ["FAMILIES", "Family", "split_name"]


class Family(Protocol):
    """What a family's module offers; the configuration is JSON data with at least "family" and "preprocess"."""

    def load_tower(self, name: str, pretrained: str | None) -> tuple[Backbone, dict[str, Any]]: ...

    def build_tower(self, config: dict[str, Any]) -> Backbone: ...


FAMILIES: dict[str, Family] = {"open_clip": open_clip}


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
