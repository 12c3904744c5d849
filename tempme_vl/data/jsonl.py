"""Anybody's own clips: one JSON object a line."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tempme_vl.data.files import read_text
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
    path = Path(annotations)
    clips: dict[tuple[str, float | None, float | None], tuple[str, list[str]]] = {}
    names: set[str] = set()
    for number, entry in jsonl_entries(path):
        try:
            names.add(str(entry.get("split")))
            if split is not None and entry.get("split") != split:
                continue
            key = (_text(entry, "file"), _seconds(entry, "start"), _seconds(entry, "end"))
            if key[2] is not None and key[2] <= (key[1] or 0.0):
                raise ValueError(f"end must be greater than start; got start={key[1]}, end={key[2]}")
            video_id = str(entry.get("id", key[0] if key[1:] == (None, None) else f"{key[0]}@{key[1]}-{key[2]}"))
            known_id, texts = clips.setdefault(key, (video_id, []))
            if known_id != video_id:
                raise ValueError(f"this clip had the id {known_id!r} before, and now {video_id!r}")
            texts.extend(_captions(entry))
        except ValueError as error:
            raise ValueError(f"{path}, line {number}: {error}") from error
    if not clips:
        found = f"; splits found: {', '.join(sorted(names))}" if split is not None and names else ""
        raise ValueError(f"{path}: no clips" + (f" with split {split!r}" if split is not None else "") + found)
    root = Path(video_root)
    return RetrievalSplit(
        name=f"{path.stem}/{split or 'all'}",
        clips=tuple(Clip(video_id, root / file, start, end) for (file, start, end), (video_id, _) in clips.items()),
        captions=tuple(tuple(texts) for _, texts in clips.values()),
        max_words=max_words,
        num_frames=num_frames,
    )


def jsonl_splits(annotations: str | Path) -> set[str]:
    """The values of "split" that occur in a JSON-lines file; ValueError as in `jsonl_entries`."""
    return {entry["split"] for _, entry in jsonl_entries(Path(annotations)) if isinstance(entry.get("split"), str)}


def jsonl_entries(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """The objects of a JSON-lines file with the numbers of their lines; ValueError names the file and the line."""
    # not splitlines: JSON may hold line separators of Unicode as they are
    for number, line in enumerate(read_text(path).split("\n"), start=1):
        if not line.strip():
            continue
        try:
            entry = json.loads(line)
        except ValueError as error:
            raise ValueError(f"{path}, line {number}: {error}") from error
        if not isinstance(entry, dict):
            raise ValueError(f"{path}, line {number}: expected a JSON object; got {line[:60]!r}")
        yield number, entry


def _text(entry: dict[str, Any], key: str) -> str:
    value = entry.get(key)
    if not isinstance(value, str) or not value.strip():
        raise ValueError(f"{key!r} must be a text that is not empty; got {value!r}")
    return value


def _captions(entry: dict[str, Any]) -> list[str]:
    if ("caption" in entry) == ("captions" in entry):
        raise ValueError("expected either 'caption' or 'captions'")
    if "caption" in entry:
        return [_text(entry, "caption").strip()]
    values = entry["captions"]
    if not isinstance(values, list) or not values or not all(isinstance(v, str) and v.strip() for v in values):
        raise ValueError(f"'captions' must be a list of texts that are not empty; got {values!r}")
    return [value.strip() for value in values]


def _seconds(entry: dict[str, Any], key: str) -> float | None:
    value = entry.get(key)
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float) or value < 0:
        raise ValueError(f"{key!r} must be a number of seconds, 0 or more; got {value!r}")
    return float(value)
