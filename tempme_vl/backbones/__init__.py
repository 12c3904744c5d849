"""Encoders by family. A new one is a file with what `Family` asks for, and a line in `FAMILIES`."""

from __future__ import annotations

from typing import Any, Protocol, cast

from tempme_vl.backbones import hf, open_clip, timm, umt
from tempme_vl.backbones.base import Backbone

__all__ = ["FAMILIES", "Family", "split_name"]


class Family(Protocol):
    """What a family's module offers; the configuration is JSON data with at least "family" and "preprocess".

    `TOWER_OPTIONS` are the keywords that `load_tower` takes beside the name, the weights and the number of frames.
    """

    TOWER_OPTIONS: tuple[str, ...]

    def load_tower(
        self, name: str, pretrained: str | None, num_frames: int, **options: Any
    ) -> tuple[Backbone, dict[str, Any]]: ...

    def build_tower(self, config: dict[str, Any]) -> Backbone: ...


FAMILIES: dict[str, Family] = {
    "open_clip": cast(Family, open_clip),
    "umt": cast(Family, umt),
    "hf": cast(Family, hf),
    "timm": cast(Family, timm),
}


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
