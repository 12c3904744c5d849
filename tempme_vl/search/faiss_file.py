"""All vectors of an index as an index of FAISS, and beside it what its row numbers mean."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from tempme_vl.search.store import FACTS, MissingPackageError, Store

_AT_ONCE = 8192  # rows in memory beside those that FAISS holds


def write_faiss(store: Store, target: Path) -> None:
    """Writes a flat index of inner products, which are cosines since all vectors are L2-normalised.

    The row numbers of the index, from 0 in the order of the table, are `row` of the Parquet file whose name is the
    target's with ".parquet" behind it; its other columns are `FACTS`.

    Raises:
        MissingPackageError: FAISS is not installed.
        OSError: a file cannot be written.
    """
    import pyarrow as pa
    import pyarrow.parquet

    faiss = _faiss()
    index = faiss.IndexIDMap2(faiss.IndexFlatIP(store.settings.width))
    kinds = [store.table.schema.field(name) for name in FACTS]
    schema = pa.schema([("row", pa.int64()), *kinds])
    rows: Any = store.table.search().select([*FACTS, "vector"])  # one of LanceDB's several builders
    with pyarrow.parquet.ParquetWriter(Path(f"{target}.parquet"), schema) as facts:
        for batch in rows.to_batches(batch_size=_AT_ONCE):
            numbers = np.arange(index.ntotal, index.ntotal + len(batch), dtype=np.int64)
            vectors = batch.column("vector").flatten().to_numpy().reshape(len(batch), store.settings.width)
            index.add_with_ids(vectors, numbers)
            columns = [pa.array(numbers), *(batch.column(name) for name in FACTS)]
            facts.write_table(pa.Table.from_arrays(columns, schema=schema))
    _write(faiss, index, target)


def _write(faiss: Any, index: Any, target: Path) -> None:
    try:
        faiss.write_index(index, str(target))
    except RuntimeError as error:
        raise OSError(f"{target} cannot be written: {str(error).partition(chr(10))[0]}") from error


def _faiss() -> Any:
    try:
        import faiss
    except ImportError as error:
        raise MissingPackageError("a file .faiss is written by FAISS: pip install 'tempme_vl[faiss]'") from error
    return faiss
