"""An index of a folder, as the server asks it."""

from __future__ import annotations

import threading
from collections.abc import Collection
from pathlib import Path, PurePath

import torch

from tempme_vl import __version__
from tempme_vl.search.hits import Hit, Hits
from tempme_vl.search.index import build
from tempme_vl.search.locate import Location
from tempme_vl.search.query import SearchIndex
from tempme_vl.search.web.interface import Fine, Query


class Served:
    """What `Index` asks for, of a `SearchIndex`. The list of files is read anew when rows have changed."""

    def __init__(self, index: SearchIndex):
        self._index = index
        self._lock = threading.Lock()
        self._paths: tuple[int, Collection[str]] = (-1, ())

    @property
    def root(self) -> Path:
        return self._index.root

    @property
    def version(self) -> int:
        return int(self._index.store.table.version)

    @property
    def paths(self) -> Collection[str]:
        version = self.version
        with self._lock:
            if self._paths[0] != version:
                self._paths = version, dict.fromkeys(sorted(self._index.store.files()))
            return self._paths[1]

    @property
    def has_tokens(self) -> bool:
        return self._index.settings.tokens != "none"

    @property
    def has_fusion(self) -> bool:
        return self._index.settings.fusion_width is not None

    def facts(self) -> dict[str, str | int | float]:
        settings, schedule = self._index.settings, self._index.embedder.model.frontend.schedule
        local = PurePath(settings.checkpoint).is_absolute()  # where it lies here is nobody's business
        return {
            "segments": len(self._index),
            "model": "/".join(PurePath(settings.checkpoint).parts[-2:]) if local else settings.checkpoint,
            "method": f"{schedule.method}, {schedule.output_tokens} of {schedule.input_tokens} tokens",
            "tempme_vl": __version__,
            "torch": torch.__version__,
        }

    def search(self, query: Query, k: int, where: str | None, fine: Fine) -> Hits:
        return self._index.search(query, k, where, fine)

    def locate(self, query: Query, hit: Hit, top: int) -> Location:
        return self._index.locate(query, hit, top)

    def bring_up_to_date(self) -> str:
        """Reads files that are new or changed, with a model of its own: the other one goes on to answer.

        Raises:
            ValueError: see `build`.
        """
        report = build(self.root, self._index.store.folder)
        return f"{len(report.added)} added, {len(report.changed)} changed, {len(report.removed)} gone"
