"""Searching an index: a first stage over the vectors of all segments, and a second over the tokens of the best."""

from __future__ import annotations

import json
import time
from collections.abc import Iterable, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

import numpy as np

from tempme_vl.search.embed import EmbeddedQuery, Embedder, Query
from tempme_vl.search.faiss_file import write_faiss
from tempme_vl.search.files import inside
from tempme_vl.search.hits import Hit, Hits
from tempme_vl.search.index import check_model
from tempme_vl.search.locate import Location, locate, max_sim_of, token_scores
from tempme_vl.search.matching import match_scores
from tempme_vl.search.store import FACTS, IndexFolderError, Store, select_of
from tempme_vl.search.tokens import unpack_attention, unpack_source, unpack_tokens
from tempme_vl.tasks.retrieval import MatchingRetrievalModel

if TYPE_CHECKING:
    import pyarrow as pa

Fine = Literal["none", "maxsim", "matching"]
PROBES, REFINED = 256, 10  # of an approximate search: partitions, of some 4,000 vectors each; and exact cosines a hit
_SHOWN = ["path", "segment", "start", "end", "duration", "size"]


def open(
    folder: str | Path,
    checkpoint: str | Path | Embedder | None = None,
    device: str | None = None,
    root: str | Path | None = None,
) -> SearchIndex:
    """The index that `tempme-vl index` or `build` made. The model is read when it is first needed.

    Args:
        checkpoint: where the model lies now, or one that is loaded; default: where it lay.
        device: of the model; default: a GPU where there is one.
        root: where the folder of the videos lies now.

    Raises:
        IndexFolderError: no index, or a damaged one.
    """
    return SearchIndex(Store(folder), checkpoint, device, None if root is None else Path(root))


class SearchIndex:
    """An index of videos; what other processes add to it is found too.

    Args:
        store: the rows.
        others: see `open`.
    """

    def __init__(self, store: Store, checkpoint: str | Path | Embedder | None, device: str | None, root: Path | None):
        self.store, self.settings = store, store.settings
        self.root = root or Path(self.settings.root)
        self._checkpoint, self._device = checkpoint, device

    def __len__(self) -> int:
        """Segments."""
        return int(self.store.table.count_rows())

    def __repr__(self) -> str:
        return f"SearchIndex({str(self.store.folder)!r}, {len(self)} segments of videos in {str(self.root)!r})"

    @cached_property
    def embedder(self) -> Embedder:
        """The model.

        Raises:
            IndexFolderError: it is not the one that made the index.
        """
        given = self._checkpoint or self.settings.checkpoint
        embedder = given if isinstance(given, Embedder) else Embedder.from_pretrained(given, self._device)
        check_model(self.store, embedder.source, embedder.fingerprint)
        return embedder

    def search(
        self,
        query: Query | EmbeddedQuery,
        k: int = 10,
        where: str | None = None,
        fine: Fine = "none",
        candidates: int = 100,
        exact: bool = True,
    ) -> Hits:
        """The segments that are nearest to a query, the best first.

        Args:
            query: a text (str); a video, a Path or a part of one, `tempme_vl.data.splits.Video(name, path, start,
                end)`; a picture of Pillow; or what `embedder.query` made of one of these.
            k: the most hits.
            where: only segments of which this holds, in SQL, over `path`, `segment`, `start`, `end`, `duration`
                (seconds), `size` (bytes), `modified` (nanoseconds since 1970).
            fine: "maxsim" ranks the best candidates by their merged tokens, "matching" by the score that UMT's and
                TESTA's fusion layers give a text with these, as their re-ranking in evaluation.
            candidates: that the second stage ranks, or k where that is more.
            exact: False searches through LanceDB's index of the vectors, which may miss some.

        Raises:
            VideoError: a query file that cannot be read.
            ValueError: numbers below 1, an empty text, a filter that cannot be read, an index or a model without what
                is asked for, or "matching" of something else than a text.
        """
        self._check(query, k, candidates, fine, exact)
        if not isinstance(query, EmbeddedQuery):
            _ = self.embedder  # reading a model is no part of searching
        begun = time.perf_counter()
        embedded = query if isinstance(query, EmbeddedQuery) else self.embedder.query(query)
        between = time.perf_counter()
        most = k if fine == "none" else max(k, candidates)
        rows = self._nearest(embedded.vector, most, where, exact)
        hits = _sorted(Hit(score=row["coarse"], **row) for row in rows.drop_columns("_rowid").to_pylist())
        seconds = {"embed": between - begun, "coarse": time.perf_counter() - between}
        if fine != "none":
            between = time.perf_counter()
            hits = self._by_tokens(fine, embedded, hits, rows.column("_rowid").to_pylist())
            seconds["fine"] = time.perf_counter() - between
        return Hits(hits[:k], seconds)

    def locate(self, query: Query | EmbeddedQuery, hit: Hit, top: int = 5) -> Location:
        """Where a query was found: the merged tokens of a hit that are nearest to it, with their frames and patches.

        A text is compared with tokens by `tempme_vl.search.locate.token_scores`, a video or picture by cosines alone.

        Args:
            query, hit: of a search.
            top: how many tokens.

        Raises:
            IndexFolderError: an index without tokens, or the segment is not there any more.
        """
        self._require_tokens()
        embedded = query if isinstance(query, EmbeddedQuery) else self.embedder.query(query)
        found = self.store.table.search().where(select_of(hit.path, hit.segment)).limit(1).to_arrow().to_pylist()
        if not found:
            raise IndexFolderError(f"segment {hit.segment} of {hit.path} is not in the index any more; search again")
        (row,) = found
        layout = self.settings.layout
        source = unpack_source(row["source"], layout.frames, layout.tokens)
        tokens = self._in_texts(self._unpacked(row["tokens"]))
        attention = unpack_attention(row["attention"]) if embedded.of_cls else None
        scores = token_scores(self._parts(embedded), tokens, attention)
        return locate(scores, source, np.asarray(row["times"], np.float32), layout, top)

    def file(self, hit: Hit | str) -> Path:
        """The file of a hit, or of a path in the index.

        Raises:
            ValueError: it leads out of the folder that was indexed, or is none of the index's videos.
        """
        path = hit if isinstance(hit, str) else hit.path
        file = inside(self.root, path)
        if not self.store.table.count_rows(select_of(path, 0)):
            raise ValueError(f"{path} is no video of {self.store.folder}")
        return file

    def export(self, path: str | Path) -> None:
        """Writes all rows to a file: .npz with vectors (S, E) float32 and columns `path`, `segment`, `start`, `end`,
        `duration`, `size`, `modified` (S,); .parquet with tokens and sources, too, as they are stored; or .faiss with
        the vectors as an index of FAISS, and what its row numbers mean (`tempme_vl.search.faiss_file.write_faiss`).

        Raises:
            ValueError: another ending.
            MissingPackageError: .faiss, and FAISS is not installed.
        """
        target = Path(path)
        if target.suffix not in (".npz", ".parquet", ".faiss"):
            raise ValueError(f"expected a file .npz, .parquet or .faiss; got {target}")
        if target.suffix == ".faiss":
            write_faiss(self.store, target)
            return
        rows = self.store.table.to_arrow().sort_by([("path", "ascending"), ("segment", "ascending")])
        if target.suffix == ".parquet":
            import pyarrow.parquet

            kept = ("fingerprint", "tokens", "fusion_width")
            told = {"tempme_vl": json.dumps({name: getattr(self.settings, name) for name in kept})}
            pyarrow.parquet.write_table(rows.replace_schema_metadata(told), target)
            return
        facts = {name: rows.column(name).to_numpy() for name in FACTS}
        facts["path"] = facts["path"].astype(str)
        np.savez(target, vectors=_vectors(rows), **facts)

    def _check(self, query: Query | EmbeddedQuery, k: int, candidates: int, fine: Fine, exact: bool) -> None:
        if k < 1 or candidates < 1:
            raise ValueError(f"expected k and candidates of 1 or more; got {k} and {candidates}")
        if fine not in get_args(Fine):
            raise ValueError(f"fine must be 'none', 'maxsim' or 'matching'; got {fine!r}")
        if fine == "matching":
            self._require_matching(query)
        elif fine == "maxsim":
            self._require_tokens()
        if not exact and not self.store.has_ann:
            raise IndexFolderError(f"{self.store.folder} has no index of its vectors; run tempme-vl index with --ann")

    def _require_tokens(self) -> None:
        if self.settings.tokens == "none":
            raise IndexFolderError(
                f"{self.store.folder} keeps no merged tokens; index into another folder with --tokens float16 or int8"
            )

    def _require_matching(self, query: Query | EmbeddedQuery) -> None:
        if self.embedder.fusion_width is None:
            raise ValueError(
                f"the model of {self.store.folder} has no layers that see a text and a segment together, as UMT's and "
                "TESTA's have for fine 'matching'; give 'maxsim'"
            )
        self._require_tokens()
        if not isinstance(query, str) and getattr(query, "fusion", None) is None:
            raise ValueError("fine 'matching' compares texts with segments; for a picture or a video give 'maxsim'")

    def _nearest(self, vector: np.ndarray, most: int, where: str | None, exact: bool) -> pa.Table:
        """The first stage's rows, the nearest first, with "coarse" and LanceDB's "_rowid"."""
        import pyarrow as pa

        search: Any = self.store.table.search(vector, vector_column_name="vector")  # one of LanceDB's several builders
        search = search.distance_type("dot").limit(most)
        if exact:
            search = search.bypass_vector_index()
        else:
            search = search.nprobes(PROBES).refine_factor(REFINED)
        if where is not None:
            search = search.where(where, prefilter=True)
        try:
            rows = search.select([*_SHOWN, "_distance"]).with_row_id(True).to_arrow()
        except (ValueError, RuntimeError, OSError) as error:
            if where is None:
                raise
            reason = str(error).partition("\n")[0].partition(", /")[0]
            raise ValueError(
                f"the filter {where!r} cannot be used: {reason}. It may name {', '.join(FACTS)}, as in "
                "\"path LIKE 'kitchen/%' AND duration < 60\""
            ) from error
        cosines = np.clip(1.0 - rows.column("_distance").to_numpy(), -1.0, 1.0)  # rounding leads out of these
        return rows.drop_columns("_distance").append_column("coarse", pa.array(cosines.astype(np.float64)))

    def _by_tokens(self, fine: Fine, query: EmbeddedQuery, hits: Sequence[Hit], numbers: Sequence[int]) -> list[Hit]:
        """The second stage."""
        if not hits:
            return []
        taken = self.store.table.take_row_ids(list(numbers)).select(["path", "segment", "tokens"]).to_arrow()
        packed = {(row["path"], row["segment"]): row["tokens"] for row in taken.to_pylist()}
        tokens = [self._unpacked(packed[hit.path, hit.segment]) for hit in hits]
        coarse = np.array([hit.coarse for hit in hits])
        scores = self._matched(query, tokens, coarse) if fine == "matching" else self._nearby(query, tokens, coarse)
        return _sorted(replace(hit, score=float(score)) for hit, score in zip(hits, scores, strict=True))

    def _matched(self, query: EmbeddedQuery, tokens: Sequence[np.ndarray], coarse: np.ndarray) -> np.ndarray:
        model = self.embedder.model
        assert isinstance(model, MatchingRetrievalModel) and query.fusion is not None, "as checked before"
        return match_scores(model, query.fusion, tokens, coarse)

    def _nearby(self, query: EmbeddedQuery, tokens: Sequence[np.ndarray], coarse: np.ndarray) -> np.ndarray:
        """Tokens that no head was trained to compare do not outvote the vectors, which were."""
        parts, share = self._parts(query), 1.0 if query.trained else 0.5
        nearest = np.array([max_sim_of(parts, self._in_texts(own)) for own in tokens])
        return share * nearest + (1 - share) * coarse

    def _unpacked(self, packed: bytes) -> np.ndarray:
        """(M, E) in the space of texts, or (M, D) as fusion layers take them."""
        return unpack_tokens(packed, self.settings.fusion_width or self.settings.width, self.settings.tokens)

    def _in_texts(self, tokens: np.ndarray) -> np.ndarray:
        """(M, E) in the space of texts."""
        return tokens if self.settings.fusion_width is None else self.embedder.in_texts(tokens)

    def _parts(self, query: EmbeddedQuery) -> np.ndarray:
        assert query.parts is not None, "an index has tokens only where its model has"
        return query.parts


def _sorted(hits: Iterable[Hit]) -> list[Hit]:
    """The best first; equal ones by their names."""
    return sorted(hits, key=lambda hit: (-hit.score, hit.path, hit.segment))


def _vectors(rows: Any) -> np.ndarray:
    """(S, E) float32."""
    column = rows.column("vector").combine_chunks()
    return column.flatten().to_numpy().reshape(len(column), -1)
