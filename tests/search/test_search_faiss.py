"""Vectors as an index of FAISS: it finds what our exact search finds, and its row numbers lead to the segments."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
from search.test_search_query import of_random_directions

from tempme_vl.search import SearchIndex, faiss_file
from tempme_vl.search.embed import EmbeddedQuery
from tempme_vl.search.store import FACTS, MissingPackageError


def test_faiss_finds_the_same_ten(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    faiss = pytest.importorskip("faiss")
    import pyarrow.parquet

    monkeypatch.setattr(faiss_file, "_AT_ONCE", 128)
    index, vectors = of_random_directions(made, tmp_path / "index", 64, 600)
    index.store.drop(["3", "300"])
    index.export(tmp_path / "rows.faiss")
    facts = pyarrow.parquet.read_table(tmp_path / "rows.faiss.parquet")
    assert facts.column_names == ["row", *FACTS] and facts.column("row").to_pylist() == list(range(598))
    theirs = faiss.read_index(str(tmp_path / "rows.faiss"))
    assert isinstance(theirs, faiss.IndexIDMap2) and theirs.ntotal == 598
    queries = [vectors[3], *np.random.default_rng(1).normal(size=(10, 64)).astype(np.float32)]
    for query in queries:
        query = query / np.linalg.norm(query)
        hits = index.search(EmbeddedQuery(query, None), k=10)
        scores, rows = theirs.search(query[None], 10)
        assert facts.take(rows[0]).column("path").to_pylist() == [hit.path for hit in hits]
        assert scores[0] == pytest.approx([hit.score for hit in hits], abs=1e-5)


def test_segments_of_videos_in_faiss(index: SearchIndex, tmp_path: Path) -> None:
    faiss = pytest.importorskip("faiss")
    import pyarrow.parquet

    index.export(tmp_path / "rows.faiss")
    facts = pyarrow.parquet.read_table(tmp_path / "rows.faiss.parquet")
    query = index.embedder.query("a red ball moves left")
    _, rows = faiss.read_index(str(tmp_path / "rows.faiss")).search(query.vector[None], 10)
    found = [facts.slice(row, 1).to_pylist()[0] for row in rows[0] if row >= 0]
    places = [(one["path"], one["segment"], one["start"], one["end"]) for one in found]
    assert places == [(hit.path, hit.segment, hit.start, hit.end) for hit in index.search(query)]
    assert len(places) == 7


def test_errors(index: SearchIndex, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "faiss", None)
    with pytest.raises(MissingPackageError, match=r"pip install 'tempme_vl\[faiss\]'"):
        index.export(tmp_path / "rows.faiss")
    assert not list(tmp_path.glob("rows*"))
