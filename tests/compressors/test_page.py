"""docs/compressors.md says of each compressor what its record says."""

from __future__ import annotations

import re
from pathlib import Path

from tempme_vl.compressors import COMPRESSORS

PAGE = (Path(__file__).parents[2] / "docs" / "compressors.md").read_text()


def test_the_table_is_that_of_the_records() -> None:
    rows = dict(re.findall(r"^\| `(\w+)` \|(.*)\|$", PAGE, re.M))
    assert list(rows) == list(COMPRESSORS)
    for name, text in rows.items():
        record, (_, known, reads, budget) = COMPRESSORS[name], [cell.strip() for cell in text.split("|")]
        options = record.options()
        ahead = record.count is not None and record.count(4, (4, 4), options) is not None
        assert ("yes" in known) == (record.count is not None) and (not ahead or "yes" in known), name
        assert set(re.findall(r"received|keys|summary", reads)) == set(record.reads_with(options)), name
        kept = record.keep(1.0, 4, (4, 4)) if record.keep else record.keep_inside(1.0) if record.keep_inside else ()
        assert set(budget.replace(",", " ").split()) == set(kept) - {"expansion"}, name
