"""Bringing an index up to date while it goes on to answer."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable

_log = logging.getLogger(__name__)


class Reindexing:
    """At most one at a time, in a thread of its own.

    Args:
        build: does it, and says what it did.
    """

    def __init__(self, build: Callable[[], str]) -> None:
        self.state, self._build = "not asked for", build
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
            self.state = self._build()
        except Exception:  # a thread's own would be lost
            _log.exception("reindexing failed")
            self.state = "failed; the server's log says why"
        finally:
            self._lock.release()
