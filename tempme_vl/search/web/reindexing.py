"""Building an index anew while the one that is there goes on to answer."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable

from tempme_vl.search.web.engine import Engine
from tempme_vl.search.web.interface import Index

_log = logging.getLogger(__name__)


class Reindexing:
    """At most one at a time, in a thread of its own.

    Args:
        build: reads the videos that are new or changed, and opens the index.
    """

    def __init__(self, engine: Engine, build: Callable[[], Index]) -> None:
        self.state, self._engine, self._build = "no", engine, build
        self._lock = threading.Lock()

    def start(self) -> bool:
        """False while one runs."""
        if not self._lock.acquire(blocking=False):
            return False
        self.state = "running"
        threading.Thread(target=self._run, name="tempme_vl-reindex", daemon=True).start()
        return True

    def _run(self) -> None:
        try:
            self._engine.exchange(self._build())
            self.state = "done"
        except Exception as error:  # a thread's own would be lost
            _log.exception("reindexing failed")
            self.state = f"failed: {error}"
        finally:
            self._lock.release()
