"""Pairs of pictures or videos with texts, as BLIP and TESTA are pre-trained on."""

from __future__ import annotations

from pathlib import Path, PurePath
from typing import Any

from tempme_vl.data.dataset import DataSet, Place, SplitNames, Texts
from tempme_vl.data.files import AnnotationError, as_id, as_text, each_object, errors_at, load_json
from tempme_vl.data.splits import RetrievalSplit, Video
from tempme_vl.messages import few, shown

KEYS = ("path", "image")  # TESTA's, for both, and BLIP's


def read_split(place: Place, split: str | None) -> RetrievalSplit:
    """Reads `[{"path": FILE, "caption": TEXT}, ...]` of a JSON file, or of all of a folder; "image" is "path", too.

    A file is a picture by its suffix (`tempme_vl.data.stills`), and else a video. Relative paths start at
    `video_root`, or else at the folder of the JSON file. Several texts of one file are all its captions.
    """
    assert place.annotations is not None
    source = Path(place.annotations)
    root = Path(place.video_root or (source if source.is_dir() else source.parent))
    said: dict[Path, tuple[Video, list[str]]] = {}
    for file in _files(source):
        for path, caption in each_object(str(file), load_json(file), _pair):
            said.setdefault(root / path, (Video(path, root / path), []))[1].append(caption)
    with errors_at(str(source)):
        return RetrievalSplit(
            "pairs/train",
            tuple(video for video, _ in said.values()),
            tuple(tuple(texts) for _, texts in said.values()),
        )


def _files(source: Path) -> list[Path]:
    if not source.is_dir():
        return [source]
    files = sorted(source.glob("*.json"))
    if not files:
        there = sorted(entry.name for entry in source.iterdir())
        raise AnnotationError(f"{source}: expected files NAME.json in this folder; found {few(there) or 'nothing'}")
    return files


def _pair(entry: dict[str, Any]) -> tuple[str, str]:
    named = [key for key in KEYS if key in entry]
    if len(named) != 1:
        raise ValueError(f"expected either {' or '.join(map(repr, KEYS))}; got {few(list(entry), 9)}")
    path = as_id(as_text(named[0], entry[named[0]]))
    if ".." in PurePath(path).parts:
        raise ValueError(f"{named[0]!r} must be a path without '..'; got {shown(path)}")
    return path, as_text("caption", entry.get("caption")).strip()


DATASET = DataSet(
    title="pairs for pre-training: pictures, videos or both",
    files="a JSON file, or a folder of such: a list of path (or image) and caption",
    captions=Texts(read_split, ("train",), SplitNames("train", None, "train")),
    num_frames=8,
    needs=("annotations",),
)
