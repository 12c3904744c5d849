"""How a model is fine-tuned: whole, in part, or through small modules beside its frozen weights.

A new way is a file with a `Tuning` and its line in `TUNINGS`, or, from outside the package, `TUNINGS["name"] = Class`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from tempme_vl.messages import few
from tempme_vl.schema import read
from tempme_vl.tuning.base import Tuning
from tempme_vl.tuning.clip4clip import Clip4Clip
from tempme_vl.tuning.full import Full
from tempme_vl.tuning.lora import Lora

if TYPE_CHECKING:
    from tempme_vl.tuning.model import TunableModel

__all__ = ["TUNINGS", "Clip4Clip", "Full", "Lora", "TunableModel", "Tuning", "find_tuning"]

TUNINGS: dict[str, type[Tuning]] = {kind.name: kind for kind in (Full, Clip4Clip, Lora)}


def find_tuning(tuning: str | Tuning, options: Mapping[str, Any] | None = None) -> Tuning:
    """A way of tuning by its name.

    Args:
        options: of its dataclass.

    Raises:
        ValueError: a name that is not in `TUNINGS`, or options that are not its own or not of their types.
    """
    if isinstance(tuning, Tuning):
        return tuning
    if tuning not in TUNINGS:
        raise ValueError(f"there is no tuning {tuning!r}; expected one of {few(list(TUNINGS), 99)}")
    return read(TUNINGS[tuning], options or {}, f"tuning {tuning!r}")


def __getattr__(name: str) -> Any:
    if name == "TunableModel":  # which needs torch; the names of the ways do not
        from tempme_vl.tuning.model import TunableModel

        return TunableModel
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
