"""The model that makes an index, or embeds, where none is named: the one that the demo has trained here."""

from __future__ import annotations

import logging
from pathlib import Path

_log = logging.getLogger(__name__)

DEMO_MODEL = Path("runs/demo/tempme-seed0/best")
"""Where `make demo` and `tempme-vl demo` leave TempMe's model, below the folder they run in."""


def default_model() -> str:
    """The demo's model, with a warning that it knows nothing of real videos.

    Raises:
        ValueError: there is none.
    """
    if not DEMO_MODEL.is_dir():
        raise ValueError(
            "expected --checkpoint, the folder of a retrieval model or its name on the Hugging Face hub, as there is "
            f"no {DEMO_MODEL} here either. Give one that was trained on real videos; or make that one, which knows "
            "moving shapes, with make demo or tempme-vl demo"
        )
    _log.warning(
        "%s makes the vectors, the demo's model: it knows shapes that move and nothing else. For real videos give "
        "--checkpoint with a model that was trained on some",
        DEMO_MODEL,
    )
    return str(DEMO_MODEL)
