"""Building an index and bringing it up to date."""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Generator, Iterator, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

from tempme_vl.command import above_zero, at_least
from tempme_vl.hub import find_folder
from tempme_vl.search.cluster import Model, check_cluster, embed_on_cluster
from tempme_vl.search.decoding import Reading, decode_all
from tempme_vl.search.default_model import default_model
from tempme_vl.search.embed import Embedder, fingerprint
from tempme_vl.search.files import Found, Problem, VideoFile, find_videos
from tempme_vl.search.options import IndexOptions
from tempme_vl.search.rows import Made, Writing, in_batches, make_rows
from tempme_vl.search.segments import Segments
from tempme_vl.search.store import SETTINGS_FILE, IndexFolderError, IndexSettings, Store

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class IndexReport:
    """What became of a folder.

    Attributes:
        added, changed, removed: paths of files, relative to the folder.
        unchanged: how many files were there already.
        broken: files that cannot be read, those of earlier runs included, and what else was not taken.
        others: how many files have endings of no video.
        files, segments: in the index now.
        seconds: that it took.
        ann: whether there is an index of the vectors.
    """

    added: list[str]
    changed: list[str]
    removed: list[str]
    unchanged: int
    broken: list[Problem]
    others: int
    files: int
    segments: int
    seconds: float
    ann: bool


def build(
    folder: str | Path, out: str | Path, checkpoint: str | Path | Embedder | None = None, **options: Any
) -> IndexReport:
    """Indexes the videos of a folder, or brings its index up to date.

    Args:
        folder: the videos.
        out: the index.
        checkpoint: of a retrieval model, or one that is loaded; default: the model of the index, or where there is none
            yet the demo's (`default_model`).
        options: others of `IndexOptions`.

    Raises:
        IndexFolderError: the index was made otherwise, by another model or of another folder, or another process writes
            to it.
        ValueError: no such folder, or options that it cannot be.
        OSError: no space is left; what was written stays.
    """
    given = checkpoint if isinstance(checkpoint, Embedder) else None
    name = None if checkpoint is None or given else str(checkpoint)
    return build_index(IndexOptions(Path(folder), Path(out), name, **options), given)


def build_index(options: IndexOptions, embedder: Embedder | None = None) -> IndexReport:
    """`build` of the command's options."""
    begun = time.perf_counter()
    at_least(1, batch_size=options.batch_size, workers=options.workers)
    above_zero(decode_timeout=options.decode_timeout, memory=options.memory)
    check_cluster(options)
    found = find_videos(options.folder, options.out)
    if not (options.out / SETTINGS_FILE).is_file():
        embedder = embedder or _load(options, options.checkpoint or default_model())
        Store.create(options.out, _new_settings(options, embedder))
    store = Store(options.out)
    _check(options, store, embedder)
    with store.alone():
        return _bring_up_to_date(options, store, embedder, found, begun)


def _bring_up_to_date(
    options: IndexOptions, store: Store, embedder: Embedder | None, found: Found, begun: float
) -> IndexReport:
    there = store.files()
    if there and not found.files:
        raise IndexFolderError(
            f"{options.folder} holds no video any more, and {options.out} has {len(there)}: is it not mounted? To "
            "empty the index, delete its folder"
        )
    removed = sorted(path for path in there if found.vanished(path))
    store.drop(removed)
    known = {} if options.retry_broken else store.broken()
    broken = {file: known[file] for file in found.files if file in known}
    wanted = [file for file in found.files if there.get(file.path) != file and file not in broken]
    if removed:
        _log.info("%d files are gone, and their segments with them", len(removed))
    writing = Writing(store, {file.path for file in wanted if file.path in there})
    if wanted:
        embedder = embedder or _load(options, options.checkpoint or store.settings.checkpoint)
        with closing(_embed_all(options, store.settings, embedder, wanted)) as made:
            _write_all(wanted, made, writing)
    broken |= writing.broken
    store.drop([file.path for file in broken if file.path in there])
    store.write_broken(broken)
    store.tidy(options.ann)
    changed = sorted(path for path in writing.written if path in there)
    return IndexReport(
        added=sorted(set(writing.written) - set(changed)),
        changed=changed,
        removed=removed,
        unchanged=len(found.files) - len(wanted) - len(broken) + len(writing.broken),
        broken=[*(Problem(file.path, why) for file, why in broken.items()), *found.problems],
        others=found.others,
        files=len(store.files()),
        segments=store.table.count_rows(),
        seconds=time.perf_counter() - begun,
        ann=store.has_ann,
    )


def _write_all(files: Sequence[VideoFile], made: Iterator[Made], writing: Writing) -> None:
    """Writes rows as they come."""
    bar = tqdm(total=sum(file.size for file in files), desc="indexing", unit="B", unit_scale=True, file=sys.stderr)
    segments = 0
    with bar:
        for one in made:
            writing.take(one)
            segments += len(one.rows)
            if one.last:
                bar.update(one.file.size)
            bar.set_postfix_str(f"{len(writing.written)} of {len(files)} files written, {segments} segments", False)
        writing.commit()


def _embed_all(
    options: IndexOptions, settings: IndexSettings, embedder: Embedder, files: Sequence[VideoFile]
) -> Generator[Made, None, None]:
    """The rows of all files, those of one in their order."""
    reading = Reading(
        options.folder.resolve(),
        settings.frames,
        settings.sampling,
        Segments(settings.segment_seconds, settings.overlap),
        settings.scenes,
        options.decode_timeout,
        options.memory,
        embedder.transform.preprocess.fit,
    )
    if options.ray is not None:
        model = Model(embedder.source, options.device, settings)
        yield from embed_on_cluster(files, reading, model, options.batch_size, options.ray)
        return
    for some in in_batches(decode_all(files, reading, options.workers), options.batch_size):
        yield from make_rows(some, settings, embedder)


def _load(options: IndexOptions, source: str) -> Embedder:
    """The model; beside a cluster, which has its own, only what says how it reads videos."""
    return Embedder.from_pretrained(source, options.device if options.ray is None else "cpu")


def _check(options: IndexOptions, store: Store, embedder: Embedder | None) -> None:
    """Raises IndexFolderError: an index was made otherwise."""
    if embedder is not None:
        check_model(store, embedder.source, embedder.fingerprint)
    else:
        source = options.checkpoint or store.settings.checkpoint
        check_model(store, source, fingerprint(find_folder(source)))
    for name in ("tokens", "segment_seconds", "overlap", "scenes"):
        given, made = getattr(options, name), getattr(store.settings, name)
        if given is not None and given != made:
            raise IndexFolderError(
                f"{options.out} was made with {_option(name, made)}; got {_option(name, given)}. Leave it out, or make "
                "a new index in another folder"
            )
    root = str(options.folder.resolve())
    if root != store.settings.root:
        if not options.moved:
            raise IndexFolderError(
                f"{options.out} is the index of {store.settings.root}; got {root}. If that is the same folder in "
                "another place, say --moved; else give another --out"
            )
        store.move(root)


def _option(name: str, value: object) -> str:
    """As it is given on a command line."""
    words = name.replace("_", "-")
    return f"--{'' if value else 'no-'}{words}" if isinstance(value, bool) else f"--{words} {value}"


def _new_settings(options: IndexOptions, embedder: Embedder) -> IndexSettings:
    default = Segments()
    segments = Segments(
        default.seconds if options.segment_seconds is None else options.segment_seconds,
        default.overlap if options.overlap is None else options.overlap,
    )
    tokens = options.tokens or ("float16" if embedder.has_tokens else "none")
    if tokens != "none" and not embedder.has_tokens:
        raise ValueError(
            "this model pools its tokens by attention: single ones are not in the space of texts; give --tokens none"
        )
    return IndexSettings(
        root=str(options.folder.resolve()),
        checkpoint=embedder.source,
        fingerprint=embedder.fingerprint,
        width=embedder.width,
        **asdict(embedder.layout),
        sampling=embedder.sampling,
        segment_seconds=segments.seconds,
        overlap=segments.overlap,
        tokens=tokens,
        fusion_width=None if tokens == "none" else embedder.fusion_width,
        scenes=bool(options.scenes),
    )


def check_model(store: Store, source: str, theirs: str) -> None:
    """Raises IndexFolderError for another model than the one that made an index.

    Args:
        source, theirs: where the model comes from, and its fingerprint.
    """
    settings = store.settings
    if theirs != settings.fingerprint:
        raise IndexFolderError(
            f"{store.folder} was made by another model: expected the one of {settings.checkpoint} as it was then "
            f"({settings.fingerprint[:12]}); got {source} ({theirs[:12]}), whose vectors cannot be compared with "
            "those. Give that model as --checkpoint, or make a new index in another folder"
        )
