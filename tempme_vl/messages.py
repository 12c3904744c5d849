"""How error messages name what came."""

from __future__ import annotations

import reprlib
from collections.abc import Sequence


def few(items: Sequence[object], limit: int = 5) -> str:
    """The first items, for error messages."""
    return ", ".join(map(str, items[:limit])) + (", ..." if len(items) > limit else "")


def shown(value: object) -> str:
    """A value for an error message: short, whatever it is."""
    text = _SHORT.repr(value)  # looks neither into every item nor into every depth
    return text if len(text) <= 120 else f"{text[:117]}..."


_SHORT = reprlib.Repr()
_SHORT.maxstring = _SHORT.maxother = 80
