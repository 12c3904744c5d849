"""A retrieval split (clips and their captions), a validation part held out of it, and finding files on disk."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

VIDEO_EXTENSIONS = (
    ".mp4", ".avi", ".webm", ".mkv", ".mov", ".m4v", ".mpg", ".mpeg", ".wmv", ".3gp", ".3gpp", ".3g2", ".mts",
    ".m2ts", ".ts", ".qt", ".asf", ".divx", ".flv", ".ogv", ".gif",
)  # fmt: skip


@dataclass(frozen=True)
class Clip:
    """A video file or a part of one; `start` and `end` in seconds, None for its beginning and end."""

    video_id: str
    path: Path
    start: float | None = None
    end: float | None = None


@dataclass(frozen=True)
class RetrievalSplit:
    """Clips with their captions, e.g. "msrvtt/train_9k".

    `captions[i]` are the captions of `clips[i]`; `max_words` and `num_frames` are the data set's usual limits.
    ValueError for unequal lengths, clips without captions, empty captions or two clips with one id.
    """

    name: str
    clips: tuple[Clip, ...]
    captions: tuple[tuple[str, ...], ...]
    max_words: int = 32
    num_frames: int = 12

    def __post_init__(self) -> None:
        if len(self.clips) != len(self.captions):
            raise ValueError(f"{self.name}: {len(self.clips)} clips but captions of {len(self.captions)}")
        if not self.clips:
            raise ValueError(f"{self.name}: no clips")
        both = zip(self.clips, self.captions, strict=True)
        bad = [clip.video_id for clip, texts in both if not texts or not all(map(str.strip, texts))]
        if bad:
            raise ValueError(f"{self.name}: {len(bad)} clips have no caption or an empty one: {_few(bad)}")
        twice = [name for name, count in Counter(clip.video_id for clip in self.clips).items() if count > 1]
        if twice:
            raise ValueError(f"{self.name}: {len(twice)} clip ids occur more than once: {_few(twice)}")

    @property
    def num_captions(self) -> int:
        return sum(map(len, self.captions))

    @property
    def pairs(self) -> list[tuple[int, int]]:
        """(clip index, index among its captions) of every caption, in order."""
        return [(clip, caption) for clip, texts in enumerate(self.captions) for caption in range(len(texts))]


def holdout_validation(split: RetrievalSplit, num_clips: int, seed: int) -> tuple[RetrievalSplit, RetrievalSplit]:
    """Takes `num_clips` random whole clips out of a training split, for choosing checkpoints.

    Returns (train, val), both in the order of `split`. Train keeps all captions of its clips. Val keeps one caption
    per clip, as the 1k test has: clip by clip the caption that fewest other held-out clips have too and that is not
    taken yet, so that captions are unique wherever the annotations allow it.
    """
    total = len(split.clips)
    if not 0 < num_clips < total:
        raise ValueError(f"{split.name} has {total} clips; expected to hold out 1 to {total - 1}, got {num_clips}")
    held_out = set(np.random.default_rng(seed).choice(total, num_clips, replace=False).tolist())
    owners = Counter(text for i in held_out for text in set(split.captions[i]))
    chosen: dict[int, str] = {}
    taken: set[str] = set()
    # Clips with the fewest captions first: they have the least choice.
    for i in sorted(held_out, key=lambda i: (len(set(split.captions[i])), i)):
        chosen[i] = min(split.captions[i], key=lambda text: (text in taken, owners[text]))
        taken.add(chosen[i])
    kept = [i for i in range(total) if i not in held_out]
    suffix = f"{num_clips} held out, seed {seed}"
    train = replace(
        split,
        name=f"{split.name} without {suffix}",
        clips=tuple(split.clips[i] for i in kept),
        captions=tuple(split.captions[i] for i in kept),
    )
    val = replace(
        split,
        name=f"{split.name}, {suffix}",
        clips=tuple(split.clips[i] for i in sorted(held_out)),
        captions=tuple((chosen[i],) for i in sorted(held_out)),
    )
    return train, val


def missing_videos(split: RetrievalSplit) -> list[Clip]:
    """The clips whose file does not exist, in order."""
    return [clip for clip in split.clips if not clip.path.is_file()]


def find_annotations(root: str | Path, names: Sequence[str], folders: Sequence[str] = ()) -> list[Path]:
    """The annotation files `names`, directly in `root`, in root/annotations or in one of `folders`.

    ValueError that lists the files expected and those found, when any is missing.
    """
    root = Path(root)
    places = [root / folder for folder in ("", "annotations", *folders)]
    found = [next((place / name for place in places if (place / name).is_file()), None) for name in names]
    missing = [name for name, path in zip(names, found, strict=True) if path is None]
    if missing:
        content = "there is no such folder"
        if root.is_dir():
            there = sorted(entry.name + ("/" if entry.is_dir() else "") for entry in root.iterdir())
            content = f"found there: {_few(there, 20) or 'nothing'}"
        raise ValueError(
            f"{root}: expected {', '.join(names)} in it (or in {', '.join(p.name + '/' for p in places[1:])}); "
            f"missing {', '.join(missing)}; {content}"
        )
    return [path for path in found if path is not None]


def locate_videos(
    ids: Iterable[str], root: str | Path, video_root: str | Path | None, folders: Sequence[str] = ()
) -> list[Path]:
    """The video file of each id: the file below the video folder named like it, with any or no extension.

    The video folder is `video_root`, or else the first that exists of root/videos, root/video and `folders`. An id
    without a file gets the path where it would be expected (see `missing_videos`): reading annotations needs no
    videos. ValueError when `video_root` is no folder, or when two files fit one id.
    """
    if video_root is not None and not Path(video_root).is_dir():
        raise ValueError(f"video_root {video_root} is not a folder")
    places = [Path(video_root)] if video_root is not None else [Path(root) / f for f in ("videos", "video", *folders)]
    place = next((place for place in places if place.is_dir()), places[0])
    files: dict[str, list[Path]] = {}
    for folder, _, names in os.walk(place):
        for name in names:
            files.setdefault(video_stem(name), []).append(Path(folder) / name)
    paths = []
    for video_id in ids:
        fitting = files.get(video_id, [place / f"{video_id}.mp4"])
        if len(fitting) > 1:
            raise ValueError(f"several files fit the clip {video_id}: {_few(fitting)}; keep one, or set video_root")
        paths.append(fitting[0])
    return paths


def video_stem(name: str) -> str:
    """A file name without its video extensions: "x.avi.mp4" -> "x", but "00.23.28.886" stays whole."""
    while name.lower().endswith(VIDEO_EXTENSIONS):
        name = name[: name.rindex(".")]
    return name


def make_split(
    name: str,
    captions: dict[str, list[str]],
    root: str | Path,
    video_root: str | Path | None,
    folders: Sequence[str] = (),
    times: dict[str, tuple[float, float]] | None = None,
    **limits: int,
) -> RetrievalSplit:
    """A split from captions by video id, in their order; `times` are start and end by id."""
    paths = locate_videos(captions, root, video_root, folders)
    clips = tuple(Clip(i, path, *(times[i] if times else ())) for i, path in zip(captions, paths, strict=True))
    texts = tuple(tuple(text.strip() for text in captions[i]) for i in captions)
    return RetrievalSplit(name, clips, texts, **limits)


def check_split_name(dataset: str, split: str, known: Iterable[str]) -> None:
    known = list(known)
    if split not in known:
        raise ValueError(f"{dataset} has no split {split!r}; known: {', '.join(known)}")


def _few(items: Sequence[object], limit: int = 5) -> str:
    return ", ".join(map(str, items[:limit])) + (f", ... ({len(items)})" if len(items) > limit else "")
