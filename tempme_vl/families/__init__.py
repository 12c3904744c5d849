"""Families of towers. A new one is a file with a `Family`, and a line in `tempme_vl.registries`; from outside the
package `FAMILIES.register("mine", FAMILY)`, or an entry point of the group "tempme_vl.families"."""

from __future__ import annotations

from tempme_vl.families.base import Family, Pair, Texts, TextSide
from tempme_vl.registries import FAMILIES

__all__ = ["FAMILIES", "Family", "Pair", "TextSide", "Texts", "find_family", "split_name"]


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


def find_family(name: str) -> Family:
    """The family of a model's name, "family:model".

    Raises:
        ValueError: see `split_name`.
    """
    return FAMILIES[split_name(name)[0]]
