"""What the commands of video search run."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

from tempme_vl.reports import format_columns, show
from tempme_vl.search.embed import Query
from tempme_vl.search.hits import Hits
from tempme_vl.search.index import IndexReport, build_index
from tempme_vl.search.options import IndexOptions, SearchOptions
from tempme_vl.search.query import open as open_index


def index(options: IndexOptions) -> None:
    """`tempme-vl index`."""
    report = build_index(options)
    show(_as_json(asdict(report)) if options.json else format_report(report))


def search(options: SearchOptions) -> None:
    """`tempme-vl search`."""
    query = query_of(options)
    index = open_index(options.index, options.checkpoint, options.device)
    hits = index.search(query, options.k, options.where, options.fine, options.candidates, not options.ann)
    times = ", ".join(f"{name} {1000 * seconds:.1f} ms" for name, seconds in hits.seconds.items())
    print(f"{len(index)} segments: {times}", file=sys.stderr)
    show(_as_json([asdict(hit) for hit in hits]) if options.json else format_hits(hits))


def query_of(options: SearchOptions) -> Query:
    """What is looked for.

    Raises:
        ValueError: nothing, more than one thing, or a picture that cannot be read.
    """
    given = [value for value in (options.text, options.image, options.clip) if value is not None]
    if len(given) != 1:
        raise ValueError(f"expected one of a text, --image FILE and --clip FILE; got {len(given)} of them")
    return options.text or (read_picture(options.image) if options.image else Path(str(options.clip)))


def read_picture(file: Path) -> Query:
    """A picture. Raises ValueError that names the file."""
    from PIL import Image, UnidentifiedImageError

    try:
        with Image.open(file) as picture:
            return picture.convert("RGB")
    except (UnidentifiedImageError, OSError, Image.DecompressionBombError) as error:
        raise ValueError(f"{file} cannot be read as a picture: {error}") from error


def format_report(report: IndexReport) -> str:
    """The report to read."""
    lines = [
        f"{report.files} files, {report.segments} segments: {len(report.added)} files added, {len(report.changed)} "
        f"changed, {report.unchanged} as before, {len(report.removed)} gone, {len(report.broken)} not taken, in "
        f"{report.seconds:.1f} s"
    ]
    lines += [f"not taken: {problem.path}: {problem.reason}" for problem in report.broken]
    lines += [f"gone: {path}" for path in report.removed]
    if report.others:
        lines.append(f"{report.others} files have other endings than those of videos")
    return "\n".join(lines)


def format_hits(hits: Hits) -> str:
    """The hits to read."""
    if not hits:
        return "no segment"
    return format_columns(
        [
            {"score": f"{hit.score:.4f}", "start": _clock(hit.start), "end": _clock(hit.end), "path": hit.path}
            for hit in hits
        ]
    )


def _clock(seconds: float) -> str:
    minutes, rest = divmod(seconds, 60)
    return f"{int(minutes)}:{rest:04.1f}"


def _as_json(value: Any) -> str:
    return json.dumps(value, indent=1)
