"""A retrieval split (videos and their captions), a validation part held out of it, and finding files on disk."""

from __future__ import annotations

import logging
import os
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

from tempme_vl.data.dataset import Place
from tempme_vl.data.files import AnnotationError, check_regular, errors_at, repeated
from tempme_vl.messages import few

_log = logging.getLogger(__name__)
_Noted = TypeVar("_Noted", bound=Any)  # RetrievalSplit or QASplit

VIDEO_EXTENSIONS = (
    ".mp4", ".avi", ".webm", ".mkv", ".mov", ".m4v", ".mpg", ".mpeg", ".wmv", ".3gp", ".3gpp", ".3g2", ".mts",
    ".m2ts", ".ts", ".qt", ".asf", ".divx", ".flv", ".ogv", ".gif",
)  # fmt: skip


@dataclass(frozen=True)
class Video:
    """A video file or a part of one; `start` and `end` in seconds, None for its beginning and end."""

    video_id: str
    path: Path
    start: float | None = None
    end: float | None = None


@dataclass(frozen=True)
class RetrievalSplit:
    """Videos with their captions, e.g. "msrvtt/train_9k".

    `captions[i]` are the captions of `videos[i]`; `max_words` and `num_frames` are the data set's usual limits. `note`
    is what a report must say beside scores on this split, such as that its videos were trained on; empty if nothing.
    ValueError for unequal lengths, videos without captions, empty captions or two videos with one id.
    """

    name: str
    videos: tuple[Video, ...]
    captions: tuple[tuple[str, ...], ...]
    max_words: int = 32
    num_frames: int = 12
    note: str = ""

    def __post_init__(self) -> None:
        if len(self.videos) != len(self.captions):
            raise ValueError(f"{self.name}: {len(self.videos)} videos but captions of {len(self.captions)}")
        if not self.videos:
            raise ValueError(f"{self.name}: no videos")
        both = zip(self.videos, self.captions, strict=True)
        bad = [video.video_id for video, texts in both if not texts or not all(map(str.strip, texts))]
        if bad:
            raise ValueError(f"{self.name}: {len(bad)} videos have no caption or an empty one: {few(bad)}")
        if twice := repeated([video.video_id for video in self.videos]):
            raise ValueError(f"{self.name}: {len(twice)} video ids occur more than once: {few(twice)}")

    @property
    def num_captions(self) -> int:
        return sum(map(len, self.captions))

    @property
    def pairs(self) -> list[tuple[int, int]]:
        """(video index, index among its captions) of every caption, in order."""
        return [(video, caption) for video, texts in enumerate(self.captions) for caption in range(len(texts))]


def holdout_validation(split: RetrievalSplit, num_videos: int, seed: int) -> tuple[RetrievalSplit, RetrievalSplit]:
    """Takes `num_videos` random whole videos out of a training split, for choosing checkpoints.

    Returns (train, val), both in the order of `split`. Train keeps all captions of its videos. Val keeps one caption
    per video, as the 1k test has: video by video the caption that fewest other held-out videos have too and that is not
    taken yet, so that captions are unique wherever the annotations allow it.
    """
    total = len(split.videos)
    if not 0 < num_videos < total:
        raise ValueError(f"{split.name} has {total} videos; expected to hold out 1 to {total - 1}, got {num_videos}")
    import numpy as np  # which lists of options can do without

    held_out = set(np.random.default_rng(seed).choice(total, num_videos, replace=False).tolist())
    owners = Counter(text for i in held_out for text in set(split.captions[i]))
    chosen: dict[int, str] = {}
    taken: set[str] = set()
    # Videos with the fewest captions first: they have the least choice.
    for i in sorted(held_out, key=lambda i: (len(set(split.captions[i])), i)):
        chosen[i] = min(split.captions[i], key=lambda text: (text in taken, owners[text]))
        taken.add(chosen[i])
    kept = [i for i in range(total) if i not in held_out]
    suffix = f"{num_videos} held out, seed {seed}"
    train = replace(
        split,
        name=f"{split.name} without {suffix}",
        videos=tuple(split.videos[i] for i in kept),
        captions=tuple(split.captions[i] for i in kept),
    )
    val = replace(
        split,
        name=f"{split.name}, {suffix}",
        videos=tuple(split.videos[i] for i in sorted(held_out)),
        captions=tuple((chosen[i],) for i in sorted(held_out)),
    )
    return train, val


def resolve_split(where: str, wanted: str, there: Iterable[str]) -> str | None:
    """The split of `there` that is meant by `wanted`: itself, or else its only synonym, which is logged; None for none.

    train is also called training; val valid, validation, validate or dev; test testing. Case does not matter.
    ValueError where several could be meant.
    """
    there = list(there)
    if wanted in there:
        return wanted
    same = next((names for names in _SYNONYMS if wanted.lower() in names), (wanted.lower(),))
    fitting = [name for name in there if name.lower() in same]
    if len(fitting) > 1:
        raise ValueError(f"{where}: the split {wanted!r} could be any of {', '.join(fitting)}; name one of them")
    if not fitting:
        return None
    _log.warning("%s: the split %r is called %r here; taking that", where, wanted, fitting[0])
    return fitting[0]


_SYNONYMS = (("train", "training"), ("val", "valid", "validation", "validate", "dev"), ("test", "testing"))


def known_split(dataset: str, wanted: str, known: Iterable[str]) -> str:
    """The name of a data set's split, as `resolve_split`. ValueError that lists the known ones."""
    known = list(known)
    split = resolve_split(dataset, wanted, known)
    if split is None:
        raise ValueError(f"{dataset} has no split {wanted!r}; known: {', '.join(known)}")
    return split


def trained_on(train: Iterable[Video], videos: Iterable[Video]) -> str:
    """What a report must say beside scores on `videos` of which some are training videos too; empty if none is."""
    seen, asked = ({(video.path, video.start, video.end) for video in part} for part in (train, videos))
    shared = len(seen & asked)
    return f"{shared} of these {len(asked)} videos were trained on: no scores on unseen videos" if shared else ""


def noted(split: _Noted, note: str) -> _Noted:
    """A split with this note, which is logged; the split itself for an empty one."""
    if not note:
        return split
    _log.warning("%s: %s", split.name, note)
    return replace(split, note=note)


def missing_videos(split: RetrievalSplit) -> list[Video]:
    """The videos whose file does not exist, in order."""
    return [video for video in split.videos if not video.path.is_file()]


def find_annotations(root: str | Path, names: Sequence[str], folders: Sequence[str] = ()) -> list[Path]:
    """The annotation files `names`, directly in `root`, in root/annotations or in one of `folders`.

    ValueError that lists the files expected and those found, when any is missing; AnnotationError where one is there
    and no regular file.
    """
    root = Path(root)
    places = [root / folder for folder in ("", "annotations", *folders)]
    # lexists: a link that leads nowhere, or a folder of that name, is there, and wrong
    found = [next((place / name for place in places if os.path.lexists(place / name)), None) for name in names]
    for path in filter(None, found):
        check_regular(path)
    missing = [name for name, path in zip(names, found, strict=True) if path is None]
    if missing:
        content = "there is no such folder"
        if root.is_dir():
            there = sorted(entry.name + ("/" if entry.is_dir() else "") for entry in root.iterdir())
            content = f"found there: {few(there, 20) or 'nothing'}"
        raise ValueError(
            f"{root}: expected {', '.join(names)} in it (or in {', '.join(p.name + '/' for p in places[1:])}); "
            f"missing {', '.join(missing)}; {content}"
        )
    return [path for path in found if path is not None]


def find_either(root: str | Path, names: Sequence[str], folders: Sequence[str] = ()) -> Path:
    """The first of `names` that is found, as `find_annotations`; ValueError where none is."""
    errors = []
    for name in names:
        try:
            return find_annotations(root, [name], folders)[0]
        except AnnotationError:
            raise
        except ValueError as error:
            errors.append(str(error))
    raise ValueError("; or ".join(errors))


def locate_videos(
    ids: Iterable[str], root: str | Path, video_root: str | Path | None, folders: Sequence[str] = ()
) -> list[Path]:
    """The video file of each id: the file below the video folder named like it, with any or no extension.

    The video folder is `video_root`, or else the first that exists of root/videos, root/video and `folders`. An id
    without a file gets the path where it would be expected (see `missing_videos`): reading annotations needs no
    videos. ValueError when `video_root` is no folder, or when two different files fit one id.
    """
    if video_root is not None and not Path(video_root).is_dir():
        raise ValueError(f"video_root {video_root} is not a folder")
    places = [Path(video_root)] if video_root is not None else [Path(root) / f for f in ("videos", "video", *folders)]
    place = next((place for place in places if place.is_dir()), places[0])
    files: dict[str, list[Path]] = {}
    for file in files_below(place):
        files.setdefault(video_stem(file.name), []).append(file)
    paths = []
    for video_id in ids:
        fitting = files.get(video_id, [place / f"{video_id}.mp4"])
        # a link to a file, or the same file below two links, is one file
        if len(fitting) > 1 and len({os.path.realpath(path) for path in fitting}) > 1:
            raise ValueError(f"several files fit the video {video_id}: {few(fitting)}; keep one, or set video_root")
        paths.append(fitting[0])
    return paths


def files_below(place: Path) -> Iterator[Path]:
    """All files below a folder, links to folders followed, every folder once; in a fixed order."""
    seen = set()
    for folder, folders, names in os.walk(place, followlinks=True, onerror=_unreadable):
        status = os.stat(folder)
        if (status.st_dev, status.st_ino) in seen:  # a link back to where we have been
            folders.clear()
            continue
        seen.add((status.st_dev, status.st_ino))
        folders.sort()
        yield from (Path(folder) / name for name in sorted(names))


def videos_below(folder: Path) -> list[Video]:
    """The videos in a folder and below it, by their paths in it.

    Raises:
        ValueError: there are none.
    """
    paths = [path for path in files_below(folder) if path.name.lower().endswith(VIDEO_EXTENSIONS)]
    if not paths:
        raise ValueError(f"{folder}: no videos ({', '.join(VIDEO_EXTENSIONS)}) in this folder or below it")
    return [Video(str(path.relative_to(folder)), path) for path in paths]


def _unreadable(error: OSError) -> None:
    if isinstance(error, FileNotFoundError):  # no video folder yet
        return
    _log.warning("%s: %s; no videos are looked for there", error.filename, error.strerror)


def video_stem(name: str) -> str:
    """A file name without its video extensions: "x.avi.mp4" -> "x", but "00.23.28.886" stays whole."""
    while name.lower().endswith(VIDEO_EXTENSIONS):
        name = name[: name.rindex(".")]
    return name


def make_split(
    name: str,
    source: Path,
    captions: dict[str, list[str]],
    place: Place,
    folders: Sequence[str] = (),
    times: dict[str, tuple[float, float]] | None = None,
) -> RetrievalSplit:
    """A split from captions by video id, in their order; `times` are start and end by id.

    `folders`: where videos usually lie below the data root, see `locate_videos`.

    AnnotationError names the file `source`; ValueError as `locate_videos`.
    """
    paths = locate_videos(captions, place.root, place.video_root, folders)
    videos = tuple(Video(i, path, *(times[i] if times else ())) for i, path in zip(captions, paths, strict=True))
    texts = tuple(tuple(text.strip() for text in captions[i]) for i in captions)
    with errors_at(str(source)):
        return RetrievalSplit(name, videos, texts)
