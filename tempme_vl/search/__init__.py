"""Search over a folder of videos: an index of vectors and merged tokens, and queries by texts, pictures and videos.

    import tempme_vl.search

    tempme_vl.search.build("videos", "index", checkpoint="runs/demo/tempme-seed0/best")
    for hit in tempme_vl.search.open("index").search("a red circle moves left", k=10):
        print(hit.path, hit.start, hit.end, hit.score)

The names below are imported on first use, so that command lines are read without loading torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tempme_vl.search.answers import Answer, ask
    from tempme_vl.search.embed import Embedder, Query
    from tempme_vl.search.hits import Hit, Hits
    from tempme_vl.search.index import IndexReport, build
    from tempme_vl.search.locate import Location
    from tempme_vl.search.options import IndexOptions
    from tempme_vl.search.query import SearchIndex, open
    from tempme_vl.search.store import IndexFolderError

__all__ = [
    "Answer",
    "Embedder",
    "Hit",
    "Hits",
    "IndexFolderError",
    "IndexOptions",
    "IndexReport",
    "Location",
    "Query",
    "SearchIndex",
    "ask",
    "build",
    "open",
]

_HOMES = {
    "answers": ("Answer", "ask"),
    "embed": ("Embedder", "Query"),
    "hits": ("Hit", "Hits"),
    "index": ("IndexReport", "build"),
    "locate": ("Location",),
    "options": ("IndexOptions",),
    "query": ("SearchIndex", "open"),
    "store": ("IndexFolderError",),
}


def __getattr__(name: str) -> Any:
    for home, names in _HOMES.items():
        if name in names:
            return getattr(import_module(f"{__name__}.{home}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
