"""Anybody's own clips: one JSON object a line."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from tempme_vl.data.files import as_text, as_texts, errors_at, read_text
from tempme_vl.data.splits import Clip, RetrievalSplit


def read_jsonl(
    annotations: str | Path,
    video_root: str | Path,
    split: str | None = None,
    *,
    max_words: int = 32,
    num_frames: int = 12,
) -> RetrievalSplit:
    """Reads lines like `{"file": "a.mp4", "caption": "a dog runs", "split": "train"}`.

    Keys: `file` (relative to `video_root`), `caption` or `captions` (a list), and optionally `start`, `end`
    (seconds), `split`, `id`; others are ignored. Lines with the same file, start and end are one clip with several
    captions. `split` keeps the lines of that split; None keeps all.
    ValueError names the file and the line.
    """
    path, root = Path(annotations), Path(video_root)
    clips: dict[tuple[Path, float | None, float | None], tuple[Clip, list[str]]] = {}
    for place, entry in jsonl_entries(path, split):
        with errors_at(place):
            clip = clip_of(entry, root)
            clip = replace(clip, video_id=str(entry.get("id", clip.video_id)))
            known, texts = clips.setdefault((clip.path, clip.start, clip.end), (clip, []))
            if known.video_id != clip.video_id:
                raise ValueError(f"this clip had the id {known.video_id!r} before, and now {clip.video_id!r}")
            texts.extend(_captions(entry))
    return RetrievalSplit(
        name=f"{path.stem}/{split or 'all'}",
        clips=tuple(clip for clip, _ in clips.values()),
        captions=tuple(tuple(texts) for _, texts in clips.values()),
        max_words=max_words,
        num_frames=num_frames,
    )


def jsonl_splits(annotations: str | Path) -> set[str]:
    """The values of "split" that occur in a JSON-lines file; ValueError as in `jsonl_entries`."""
    return {entry["split"] for _, entry in jsonl_entries(Path(annotations)) if isinstance(entry.get("split"), str)}


def jsonl_entries(path: Path, split: str | None = None) -> Iterator[tuple[str, dict[str, Any]]]:
    """The objects of a JSON-lines file, each with its place to name in errors.

    `split` keeps the lines of that split; None keeps all. ValueError for a line that is no object, and where no line
    is kept; it lists the splits that there are.
    """
    names, kept = set(), 0
    # not splitlines: JSON may hold line separators of Unicode as they are
    for number, line in enumerate(read_text(path).split("\n"), start=1):
        if not line.strip():
            continue
        place = f"{path}, line {number}"
        with errors_at(place):
            entry = json.loads(line)
            if not isinstance(entry, dict):
                raise ValueError(f"expected a JSON object; got {line[:60]!r}")
        names.add(str(entry.get("split")))
        if split is None or entry.get("split") == split:
            kept += 1
            yield place, entry
    if not kept:
        found = f"; splits found: {', '.join(sorted(names))}" if split is not None and names else ""
        raise ValueError(f"{path}: no lines" + (f" with split {split!r}" if split is not None else "") + found)


def clip_of(entry: dict[str, Any], root: Path) -> Clip:
    """The file and part of it that a line speaks of; its id is the file's name, with the part if there is one."""
    file = as_text("file", entry.get("file"))
    start, end = (_seconds(key, entry.get(key)) for key in ("start", "end"))
    if end is not None and end <= (start or 0.0):
        raise ValueError(f"end must be greater than start; got start={start}, end={end}")
    return Clip(file if (start, end) == (None, None) else f"{file}@{start}-{end}", root / file, start, end)


def _captions(entry: dict[str, Any]) -> list[str]:
    if ("caption" in entry) == ("captions" in entry):
        raise ValueError("expected either 'caption' or 'captions'")
    if "caption" in entry:
        return [as_text("caption", entry["caption"]).strip()]
    return [text.strip() for text in as_texts("captions", entry["captions"])]


def _seconds(key: str, value: object) -> float | None:
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float) or value < 0:
        raise ValueError(f"{key!r} must be a number of seconds, 0 or more; got {value!r}")
    return float(value)
