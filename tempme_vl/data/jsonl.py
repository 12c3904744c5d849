"""Anybody's own videos: one JSON object a line."""

from __future__ import annotations

import logging
from collections import Counter
from dataclasses import replace
from pathlib import Path, PurePath
from typing import Any

from tempme_vl.data.dataset import SplitNames
from tempme_vl.data.files import AnnotationError, as_id, as_seconds, as_text, as_texts, errors_at, json_lines
from tempme_vl.data.splits import RetrievalSplit, Video, resolve_split
from tempme_vl.messages import shown

_log = logging.getLogger(__name__)


def read_caption_lines(
    annotations: str | Path,
    video_root: str | Path,
    split: str | None = None,
) -> RetrievalSplit:
    """Reads lines like `{"file": "a.mp4", "caption": "a dog runs", "split": "train"}`.

    Keys: `file` (relative to `video_root`), `caption` or `captions` (a list), and optionally `start`, `end`
    (seconds), `split`, `id`; others are ignored. Lines with the same file, start and end are one video with several
    captions. `split` keeps the lines of that split, by its name or a usual synonym; None keeps all.
    AnnotationError names the file and the line; for a split that no line has it lists those that there are.
    """
    path, root = Path(annotations), Path(video_root)
    videos: dict[tuple[Path, float | None, float | None], tuple[Video, list[str]]] = {}
    split, entries = jsonl_entries(path, split)
    for place, entry in entries:
        with errors_at(place):
            video = video_of(entry, root)
            if "id" in entry:
                video = replace(video, video_id=as_id(entry["id"]))
            known, texts = videos.setdefault((video.path, video.start, video.end), (video, []))
            if known.video_id != video.video_id:
                raise ValueError(f"this video had the id {known.video_id!r} before, and now {video.video_id!r}")
            texts.extend(_captions(entry))
    with errors_at(str(path)):
        return RetrievalSplit(
            name=f"{path.stem}/{split or 'all'}",
            videos=tuple(video for video, _ in videos.values()),
            captions=tuple(tuple(texts) for _, texts in videos.values()),
        )


def jsonl_splits(annotations: str | Path) -> set[str]:
    """The splits that the lines of a file have; empty where none has any. AnnotationError as `jsonl_entries`."""
    return {name for name in map(_split_of, json_lines(Path(annotations))) if name is not None}


def jsonl_entries(path: Path, split: str | None = None) -> tuple[str | None, list[tuple[str, dict[str, Any]]]]:
    """The objects of a JSON-lines file, each with its place to name in errors, and the file's name of `split`.

    `split` keeps the lines of that split, by its name or a usual synonym; None keeps all. Lines without a split are in
    none, which is logged.

    Raises:
        AnnotationError: a line that is no object or whose split is no text, a split that no line has (lists those that
            there are), no lines at all.
    """
    entries = list(json_lines(path))
    if not entries:
        raise AnnotationError(f"{path}: no lines")
    names = [_split_of(line) for line in entries]
    if split is None:
        return None, entries
    counts = Counter(names)
    with errors_at(str(path)):
        chosen = resolve_split(str(path), split, sorted(name for name in counts if name is not None))
    if chosen is None:
        found = ", ".join(sorted(map(str, counts)))
        raise AnnotationError(f"{path}: no lines with split {split!r}; splits found: {found}")
    if counts[None]:
        _log.warning("%s: %d of %d lines have no split and are left out", path, counts[None], len(entries))
    return chosen, [line for line, name in zip(entries, names, strict=True) if name == chosen]


def jsonl_names(annotations: str | Path, wanted: SplitNames) -> SplitNames:
    """The file's names of these splits.

    Only usual names may be missing, as they need not have been given: all of them where no line has a split ("train"
    is then None, all lines), and "test" (None). `val` None takes what validates if the file has it.

    Raises:
        AnnotationError: as `jsonl_entries`; lists the splits that there are where a name is none of them.
    """
    path = Path(annotations)
    there = sorted(jsonl_splits(path))

    def named(name: str) -> str | None:
        with errors_at(str(path)):
            return resolve_split(str(path), name, there)

    train, test = wanted.train or "train", wanted.test or "test"
    names = SplitNames(named(train), named(wanted.val or "val"), named(test), wanted.holdout)
    missing = [
        name
        for name, found, may_miss in (
            (train, names.train, not there and train == "train"),
            (wanted.val, names.val, wanted.val is None),
            (test, names.test, test == "test"),
        )
        if found is None and not may_miss
    ]
    if missing:
        found = ", ".join(there) or "none, no line has a split"
        raise AnnotationError(f"{path}: no lines with split {', '.join(map(repr, missing))}; splits found: {found}")
    return names


def video_of(entry: dict[str, Any], root: Path) -> Video:
    """The file and part of it that a line speaks of; its id is the file's name, with the part if there is one."""
    file = as_text("file", entry.get("file"))
    if ".." in PurePath(file).parts or file != file.strip():
        raise ValueError(f"'file' must be a path without '..' and without blanks around it; got {shown(file)}")
    start, end = (None if entry.get(key) is None else as_seconds(key, entry[key]) for key in ("start", "end"))
    if end is not None and end <= (start or 0.0):
        raise ValueError(f"end must be greater than start; got start={start}, end={end}")
    return Video(file if (start, end) == (None, None) else f"{file}@{start}-{end}", root / file, start, end)


def _captions(entry: dict[str, Any]) -> list[str]:
    if ("caption" in entry) == ("captions" in entry):
        raise ValueError("expected either 'caption' or 'captions'")
    if "caption" in entry:
        return [as_text("caption", entry["caption"]).strip()]
    return [text.strip() for text in as_texts("captions", entry["captions"])]


def _split_of(line: tuple[str, dict[str, Any]]) -> str | None:
    place, entry = line
    if entry.get("split") is None:
        return None
    with errors_at(place):
        return as_id(entry["split"])
