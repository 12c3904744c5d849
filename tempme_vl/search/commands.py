"""What the commands of video search run."""

from __future__ import annotations

import io
import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from tempme_vl.reports import format_columns, show, write_whole
from tempme_vl.search.answers import ask_index
from tempme_vl.search.default_model import default_model
from tempme_vl.search.embed import Embedder, Query
from tempme_vl.search.hits import Hit, Hits
from tempme_vl.search.index import IndexReport, build_index
from tempme_vl.search.options import AskOptions, EmbedOptions, IndexOptions, SearchOptions
from tempme_vl.search.query import open as open_index
from tempme_vl.search.query_files import query_of_file, read_picture


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


def embed(options: EmbedOptions) -> None:
    """`tempme-vl embed`. Raises ValueError where nothing is given, or the file cannot be written."""
    if not options.texts and not options.files:
        raise ValueError("expected --texts, --files or both")
    embedder = Embedder.from_pretrained(options.checkpoint or default_model(), options.device)
    texts = [embedder.text(text).vector for text in options.texts]
    found: dict[str, np.ndarray] = {}
    broken = []
    for file in options.files:
        try:
            found[str(file)] = embedder.query(query_of_file(file)).vector
        except ValueError as error:
            broken.append({"path": str(file), "reason": getattr(error, "cause", None) or str(error)})
    none = np.empty((0, embedder.width), np.float32)
    packed = io.BytesIO()
    np.savez(
        packed,
        texts=np.array(options.texts, dtype=str),
        text_vectors=np.stack(texts) if texts else none,
        files=np.array(list(found), dtype=str),
        file_vectors=np.stack(list(found.values())) if found else none,
    )
    write_whole(options.out, packed.getvalue())
    report = {"texts": len(texts), "files": len(found), "width": embedder.width, "broken": broken}
    lines = [f"{len(texts)} texts and {len(found)} files as vectors of {embedder.width} in {options.out}"]
    lines += [f"not taken: {one['path']}: {one['reason']}" for one in broken]
    show(_as_json(report) if options.json else "\n".join(lines))


def ask(options: AskOptions) -> None:
    """`tempme-vl ask`."""
    index = open_index(options.index, options.checkpoint, options.device)
    answers = ask_index(index, options)
    if options.json:
        show(_as_json([{**asdict(one.hit), "answer": one.text, "answer_score": one.score} for one in answers]))
    else:
        show("\n".join(f"{one.text} ({one.score:.2f}): {format_place(one.hit)}" for one in answers) or "no segment")


def query_of(options: SearchOptions) -> Query:
    """What is looked for.

    Raises:
        ValueError: nothing, more than one thing, or a picture that cannot be read.
    """
    given = [value for value in (options.text, options.image, options.clip) if value is not None]
    if len(given) != 1:
        raise ValueError(f"expected one of a text, --image FILE and --clip FILE; got {len(given)} of them")
    return options.text or (read_picture(options.image) if options.image else Path(str(options.clip)))


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
        lines.append(f"no videos by their endings: {report.others}")
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


def format_place(hit: Hit) -> str:
    """A hit in words."""
    return f"{hit.path}, {_clock(hit.start)} to {_clock(hit.end)}"


def _clock(seconds: float) -> str:
    minutes, rest = divmod(seconds, 60)
    return f"{int(minutes)}:{rest:04.1f}"


def _as_json(value: Any) -> str:
    return json.dumps(value, indent=1)
