"""An index on disk: a folder with its settings, a LanceDB table of one row a segment, and a list of broken files.

A commit of LanceDB is there whole or not at all, and a file's rows are written in one: whatever ends the process, no
file is there in part or twice.
"""

from __future__ import annotations

import errno
import fcntl
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import numpy as np

from tempme_vl.pretrained import VERSION, read_settings
from tempme_vl.reports import write_json
from tempme_vl.schema import Count, Range, Size, write
from tempme_vl.search.embed import Layout
from tempme_vl.search.files import VideoFile
from tempme_vl.search.tokens import TokenForm

if TYPE_CHECKING:
    import lancedb
    import pyarrow as pa

SETTINGS_FILE, BROKEN_FILE, LOCK_FILE, TABLE = "index.json", "broken.json", "lock", "segments"
FACTS = ("path", "segment", "start", "end", "duration", "size", "modified")
"""Columns that a filter can name."""
_FULL = ("No space left on device", "os error 28", "File too large", "os error 27", "Disk quota", "os error 122")
_KEPT = timedelta(hours=1)  # old versions, which another process may be reading
_MOST_FILES = 100  # of a table, each of which a search opens
ANN_BITS = 4  # a number of a vector: of random directions, the hardest, ten of ten are found; with 1 bit four
_AT_ONCE = 500  # names in one filter


class IndexFolderError(ValueError):
    """The folder of an index is not as expected; says what to do."""


class MissingPackageError(ImportError):
    """An optional package is not installed."""


@dataclass(frozen=True)
class IndexSettings:
    """What holds for all rows.

    Attributes:
        root: the folder of the videos.
        checkpoint: the model's folder or name, and `fingerprint` of what it holds.
        width: E, of vectors.
        frames, prefix, grid, resize: see `Layout`.
        scenes: whether segments end where scenes do.
        tokens: their form.
        fusion_width: D, of tokens as the model's fusion layers take them; None of a model without them, whose
            tokens are in the space of texts, E wide.
    """

    root: str
    checkpoint: str
    fingerprint: str
    width: Size
    frames: Size
    prefix: Count
    grid: Size
    resize: str
    sampling: str
    segment_seconds: Annotated[float, Range(0, 1e9)]
    overlap: Annotated[float, Range(0, 1e9)]
    tokens: TokenForm
    fusion_width: Size | None = None
    scenes: bool = False

    @property
    def layout(self) -> Layout:
        """What merged tokens stand for."""
        return Layout(self.frames, self.prefix, self.grid, self.resize)


@dataclass(frozen=True)
class Row:
    """A segment, as it is stored.

    Attributes:
        vector: (E,) float32, L2-normalised.
        tokens, source, attention: see `tempme_vl.search.tokens`.
        times: (F,) seconds after the file's first frame.
    """

    file: VideoFile
    segment: int
    start: float
    end: float
    duration: float
    vector: np.ndarray
    tokens: bytes
    source: bytes
    attention: bytes
    times: np.ndarray


class Store:
    """The folder of an index.

    Args:
        folder: that `create` made, or an earlier process.

    Raises:
        IndexFolderError: no index there, or a damaged one.
        MissingPackageError: LanceDB is not installed.
    """

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)
        if not (self.folder / SETTINGS_FILE).is_file():
            raise IndexFolderError(
                f"expected the folder of an index; {self.folder} has no {SETTINGS_FILE}: make one with "
                f"tempme-vl index FOLDER --out {self.folder} --checkpoint DIR"
            )
        self.settings = read_settings(self.folder / SETTINGS_FILE, IndexSettings)
        self.table = self._open()

    @classmethod
    def create(cls, folder: str | Path, settings: IndexSettings) -> Store:
        """A new index; the folder may be there.

        Raises:
            ValueError: the settings cannot be written.
        """
        write_json(Path(folder) / SETTINGS_FILE, {"version": VERSION, **write(settings)})
        return cls(folder)

    def _open(self) -> lancedb.table.Table:
        """A table that a process left before its first version is made anew."""
        database = _lancedb().connect(self.folder, read_consistency_interval=timedelta(0))
        place = self.folder / f"{TABLE}.lance"
        with self._errors():
            if not any((place / "_versions").glob("*.manifest")):
                mode = "overwrite" if place.exists() else "create"
                return database.create_table(TABLE, schema=self._schema(), mode=mode)
            try:
                table = database.open_table(TABLE)
            except (OSError, RuntimeError, ValueError) as error:
                reason = str(error).partition("\n")[0]
                raise IndexFolderError(
                    f"the table in {self.folder} cannot be opened ({reason}): delete the folder and index again"
                ) from error
        if missing := [name for name in self._schema().names if name not in table.schema.names]:
            raise IndexFolderError(
                f"the table in {self.folder} was made by an earlier version of tempme_vl, without "
                f"{', '.join(missing)}: delete the folder and index again"
            )
        return table

    def move(self, root: str) -> None:
        """Says where the folder of the videos lies now."""
        self.settings = IndexSettings(**{**asdict(self.settings), "root": root})
        write_json(self.folder / SETTINGS_FILE, {"version": VERSION, **write(self.settings)})

    @contextmanager
    def alone(self) -> Iterator[None]:
        """While one process writes.

        Raises:
            IndexFolderError: another does.
        """
        with (self.folder / LOCK_FILE).open("ab") as stream:
            try:
                fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                raise IndexFolderError(f"another process is writing to {self.folder}; wait for its end") from None
            yield

    def files(self) -> dict[str, VideoFile]:
        """The files that have rows, by path."""
        found = self.table.search().select(["path", "size", "modified"]).where("segment = 0").to_arrow()
        return {row["path"]: VideoFile(**row) for row in found.to_pylist()}

    def put(self, rows: Sequence[Row], changed: Sequence[str]) -> None:
        """Writes all rows of some files in one commit.

        Args:
            changed: those of the files that may have rows already, which these replace.
        """
        data = self._table_of(rows)
        with self._errors():
            if not changed:
                self.table.add(data)
                return
            merge = self.table.merge_insert(["path", "segment"]).when_matched_update_all().when_not_matched_insert_all()
            merge.when_not_matched_by_source_delete(_any_of(changed)).execute(data)

    def drop(self, paths: Sequence[str]) -> None:
        """Removes all rows of some files."""
        for first in range(0, len(paths), _AT_ONCE):
            with self._errors():
                self.table.delete(_any_of(paths[first : first + _AT_ONCE]))

    def tidy(self, ann: bool = False) -> None:
        """Brings the table's files together where there are many, and removes what only versions of an hour ago need.

        Args:
            ann: make LanceDB's index of the vectors, or bring it up to date. It holds them in few bits (RaBitQ), so
                that a query looks at more of them than it could of whole ones.
        """
        with self._errors():
            if ann and not self.has_ann:
                kind: dict[str, Any] = {"index_type": "IVF_RQ", "num_bits": ANN_BITS}
                if self.settings.width % 8:  # which those codes cannot have
                    kind = {"index_type": "IVF_FLAT"}
                self.table.create_index(metric="dot", vector_column_name="vector", **kind)
            stats: Any = self.table.stats()  # a dictionary, whatever its annotation
            if ann or stats["fragment_stats"]["num_small_fragments"] > _MOST_FILES:
                self.table.optimize(cleanup_older_than=_KEPT)

    @property
    def has_ann(self) -> bool:
        """Whether there is an index of the vectors for approximate search."""
        return any("vector" in index.columns for index in self.table.list_indices())

    def broken(self) -> dict[VideoFile, str]:
        """Files that could not be read as they were then, with the reason."""
        file = self.folder / BROKEN_FILE
        if not file.is_file():
            return {}
        try:
            return {
                VideoFile(one["path"], one["size"], one["modified"]): one["reason"]
                for one in json.loads(file.read_text())
            }
        except (ValueError, KeyError, TypeError) as error:
            raise IndexFolderError(f"{file} is damaged; delete it, and its videos are tried again") from error

    def write_broken(self, broken: dict[VideoFile, str]) -> None:
        """Replaces the list. Raises ValueError where it cannot be written."""
        write_json(self.folder / BROKEN_FILE, [{**asdict(file), "reason": why} for file, why in broken.items()])

    def _schema(self) -> pa.Schema:
        import pyarrow as pa

        kinds: dict[str, Any] = {
            "path": pa.string(),
            "segment": pa.int32(),
            "start": pa.float64(),
            "end": pa.float64(),
            "duration": pa.float64(),
            "size": pa.int64(),
            "modified": pa.int64(),
            "vector": pa.list_(pa.float32(), self.settings.width),
            "tokens": pa.binary(),
            "source": pa.binary(),
            "attention": pa.binary(),
            "times": pa.list_(pa.float32(), self.settings.frames),
        }
        return pa.schema(list(kinds.items()))

    def _table_of(self, rows: Sequence[Row]) -> pa.Table:
        import pyarrow as pa

        columns: dict[str, Any] = {name: [asdict(row.file)[name] for row in rows] for name in asdict(rows[0].file)}
        columns |= {
            name: [getattr(row, name) for row in rows]
            for name in ("segment", "start", "end", "duration", "tokens", "source", "attention")
        }
        for name, width in (("vector", self.settings.width), ("times", self.settings.frames)):
            values = np.concatenate([getattr(row, name) for row in rows]).astype(np.float32)
            columns[name] = pa.FixedSizeListArray.from_arrays(pa.array(values), width)
        return pa.table(columns, schema=self._schema())

    @contextmanager
    def _errors(self) -> Iterator[None]:
        """A full disk in words; LanceDB raises errors of several types."""
        try:
            yield
        except Exception as error:
            if any(words in str(error) for words in _FULL):
                full = f"{self.folder}: no space is left; what was written stays. Make room and run the command again"
                raise OSError(errno.ENOSPC, full) from error
            raise


def select_of(path: str, segment: int) -> str:
    """The filter of one row."""
    return f"{_any_of([path])} AND segment = {int(segment)}"


def _any_of(paths: Sequence[str]) -> str:
    quoted = ", ".join("'" + path.replace("'", "''") + "'" for path in paths)
    return f"path IN ({quoted})"


def _lancedb() -> Any:
    try:
        import lancedb
    except ImportError as error:
        raise MissingPackageError(
            "video search keeps its index with LanceDB: pip install 'tempme_vl[search]'"
        ) from error
    return lancedb
