"""How a model is fine-tuned: whole, in part, or through small modules beside its frozen weights.

A new way is a file with a `Tuning` and its line in `tempme_vl.registries.TUNINGS` (docs/add_a_tuning.md).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from tempme_vl.registries import TUNINGS
from tempme_vl.schema import read
from tempme_vl.tuning.base import AddedModules, Tuning
from tempme_vl.tuning.clip4clip import CLIP4Clip
from tempme_vl.tuning.full import Full
from tempme_vl.tuning.lora import Lora

if TYPE_CHECKING:
    from tempme_vl.tuning.model import TunableModel

__all__ = [
    "TUNINGS",
    "AddedModules",
    "CLIP4Clip",
    "Full",
    "Lora",
    "TunableModel",
    "Tuning",
    "find_tuning",
]


def find_tuning(tuning: str | Tuning, options: Mapping[str, Any] | None = None) -> Tuning:
    """A way of tuning by its name.

    Args:
        options: of its dataclass.

    Raises:
        ValueError: a name that is not in `TUNINGS`, or options that are not its own or not of their types.
    """
    return tuning if isinstance(tuning, Tuning) else read(TUNINGS[tuning], options or {}, f"tuning {tuning!r}")


def __getattr__(name: str) -> Any:
    if name == "TunableModel":  # which needs torch; the names of the ways do not
        from tempme_vl.tuning.model import TunableModel

        return TunableModel
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
