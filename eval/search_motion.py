"""Search over rendered clips whose content is known: is the right one found, and is it found in the right place?

    python eval/search_motion.py --checkpoint runs/demo/tempme-seed0/best               # a few minutes on a CPU
    python eval/search_motion.py --checkpoint runs/demo/tempme-seed0/best --clips 200

The clips show an object that moves left, right, up or down, so that a caption and the same one with another direction
have the same single frames. A hit is right if the clip was made with the caption's color, shape and direction.

The place is right by the pointing game (Zhang et al., "Top-down neural attention by excitation backprop", 2016): of a
clip and its caption, the highest point of the heat map over all frames lies on the object. Here a point is a patch, it
lies on the object if one pixel does, and there is no tolerance around it; of several patches that are equally high the
share counts. As one object is easy to tell from nothing, the game is also played with clips of two that appear in turn.
"""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

import tempme_vl.search
from tempme_vl.command import at_least, run
from tempme_vl.command_line import Command
from tempme_vl.data.motion import BACKGROUNDS, DIRECTIONS, MoveVideo, OrderVideo, draw_motion, render_motion
from tempme_vl.data.rendered import FPS, NUM_FRAMES
from tempme_vl.reports import finish, format_columns
from tempme_vl.search import Hit, Location, SearchIndex

FORMS = ("none", "int8", "float16")
MOST = 1_000_000  # tokens: all
_SEEN = 30  # of 255: by how much a pixel of the object differs from the background at least


@dataclass(frozen=True)
class Options:
    """Right hits, right places and bytes of an index of rendered clips."""

    checkpoint: Path
    """Of a model trained on the embedded data set motion."""
    clips: int = 2000
    seed: int = 21
    """Of the clips; the demo's have 0."""
    places: int = 600
    """Clips in which the object is looked for, and as many with two objects."""
    output: Path = Path("runs/search-motion")
    """Clips and indexes are written here, and used again."""
    json: Path | None = None
    """Also write all numbers to this file."""


def main(options: Options) -> None:
    at_least(1, clips=options.clips, places=options.places)
    videos, folder = clips_of(options)
    pairs, pair_folder = pairs_of(options)
    shown: dict[str, MoveVideo] = {f"video{number}.mp4": video for number, video in enumerate(videos)}
    captions = sorted({video.captions()[0] for video in videos})
    rows: list[dict[str, Any]] = []
    for form in FORMS:
        out = options.output / f"index-{form}"
        begun = time.perf_counter()
        report = tempme_vl.search.build(folder, out, options.checkpoint, tokens=form)
        row: dict[str, Any] = {"tokens": form, "segments": report.segments, "seconds": time.perf_counter() - begun}
        row["bytes a clip"] = sum(file.stat().st_size for file in out.rglob("*") if file.is_file()) / report.segments
        index = tempme_vl.search.open(out)
        row |= found(index, "none", captions, shown)
        if form != "none":
            row |= {f"by tokens: {name}": value for name, value in found(index, "maxsim", captions, shown).items()}
            row |= pointed(index, videos[: options.places])
            tempme_vl.search.build(pair_folder, options.output / f"pairs-{form}", options.checkpoint, tokens=form)
            row |= told_apart(tempme_vl.search.open(options.output / f"pairs-{form}"), pairs)
        rows.append(row)
    about = f"{options.clips} clips of seed {options.seed}, {len(captions)} captions, {options.checkpoint}"
    names = list(dict.fromkeys(name for row in rows for name in row))
    text = format_columns([{"": name, **{row["tokens"]: _shown(row.get(name)) for row in rows}} for name in names[1:]])
    finish(f"{about}\n\n{text}", {"about": about, "rows": rows}, options.json)


def clips_of(options: Options) -> tuple[list[MoveVideo], Path]:
    """What the clips show, in the order of their numbers, and their folder."""
    none = {"num_test": 0, "num_order_train": 0, "num_order_val": 0, "num_order_test": 0}
    root = render_motion(options.output / "clips", seed=options.seed, num_train=options.clips, **none)
    drawn = draw_motion(options.seed, options.clips, *none.values())
    videos = [video for _, video in drawn if isinstance(video, MoveVideo)]
    said = json.loads((root / "MSRVTT_data.json").read_text())["sentences"]
    assert [sentence["caption"] for sentence in said] == [video.captions()[0] for video in videos]
    return videos, root / "videos"


def found(index: SearchIndex, fine: Any, captions: Sequence[str], shown: dict[str, MoveVideo]) -> dict[str, float]:
    """Percent of captions whose first hit is right, and whose first hit has the right direction; and of the first ten
    hits that are right; milliseconds a query."""
    begun, first, direction, ten = time.perf_counter(), [], [], []
    for caption in captions:
        hits = [shown[hit.path] for hit in index.search(caption, k=10, fine=fine)]
        right = [video.captions()[0] == caption for video in hits]
        first.append(right[0])
        ten.append(np.mean(right))
        direction.append(hits[0].direction == caption.rsplit(" ", 1)[-1])
    milliseconds = 1000 * (time.perf_counter() - begun) / len(captions)
    return {
        "R@1": 100 * float(np.mean(first)),
        "right direction": 100 * float(np.mean(direction)),
        "right of 10": 100 * float(np.mean(ten)),
        "ms a query": milliseconds,
    }


def pairs_of(options: Options) -> tuple[list[OrderVideo], Path]:
    """The clips of two objects in the order of their numbers, and their folder."""
    count = {"num_test": 0, "num_order_train": options.places, "num_order_val": 0, "num_order_test": 0}
    root = render_motion(options.output / "pairs", seed=options.seed, num_train=1, **count)
    drawn = draw_motion(options.seed, 1, *count.values())  # the first is a clip of one object
    return [video for _, video in drawn if isinstance(video, OrderVideo)], root / "videos"


def pointed(index: SearchIndex, videos: Sequence[MoveVideo]) -> dict[str, float]:
    """Percent of clips whose caption's heat map is highest on the object, and of the best token's patches those that it
    covers by a quarter; beside each the same of all patches, which is chance."""
    games = []
    for number, video in enumerate(videos):
        where = index.locate(video.captions()[0], hit_of(number), top=MOST)
        share = on_object(video, where)
        mostly = share >= 0.25
        games.append((point(where, share > 0), (share > 0).mean(), mostly[where.patches[0]].mean(), mostly.mean()))
    names = ("pointing game", "by chance", "best token's patches on the object", "patches by chance")
    return dict(zip(names, (100 * np.mean(games, axis=0)).tolist(), strict=True))


def told_apart(index: SearchIndex, pairs: Sequence[OrderVideo]) -> dict[str, float]:
    """The pointing game with clips of two objects, each asked for as if it moved: percent of points on it, and on the
    other; beside them the share of patches that lie on one, which is chance."""
    games = []
    for number, video in enumerate(pairs):
        for asked, others in ((video.first, slice(NUM_FRAMES // 2, None)), (video.second, slice(NUM_FRAMES // 2))):
            text = f"a {asked.color} {asked.shape} moves {list(DIRECTIONS)[number % 4]}"
            where = index.locate(text, hit_of(number + 1), top=MOST)
            there, half = on_object(video, where) > 0, np.zeros(NUM_FRAMES, bool)
            half[others] = True
            other = there & half[frames_at(where)][:, None, None]
            own = there & ~other
            games.append((point(where, own), point(where, other), own.mean()))
    names = ("two objects: on the one asked for", "two objects: on the other", "two objects: by chance")
    return dict(zip(names, (100 * np.mean(games, axis=0)).tolist(), strict=True))


def point(where: Location, on: np.ndarray) -> float:
    """The share of the patches of the highest heat that lie on (F, G, G) bool."""
    heat = where.heat()
    return float(on[heat == heat.max()].mean())


def hit_of(number: int) -> Hit:
    """The only segment of a clip."""
    return Hit(f"video{number}.mp4", 0.0, 0.0, 0.0, 0.0, 0, 0.0, 0)


def frames_at(where: Location) -> np.ndarray:
    """(F,) which of a clip's frames were looked at."""
    return np.clip(np.rint(where.times * FPS).astype(int), 0, NUM_FRAMES - 1)


def on_object(video: MoveVideo | OrderVideo, where: Location) -> np.ndarray:
    """(F, G, G): how much of each patch of the frames that were looked at an object covers, 0 to 1."""
    grid = where.patches.shape[-1]
    frames = video.frames()[frames_at(where)].astype(int)
    seen = (np.abs(frames - BACKGROUNDS[video.background]) > _SEEN).any(axis=-1)
    side = seen.shape[-1] // grid
    return seen.reshape(len(frames), grid, side, grid, side).mean(axis=(2, 4))


def _shown(value: Any) -> str:
    return "" if value is None else f"{value:.1f}" if isinstance(value, float) else str(value)


if __name__ == "__main__":
    run(Command("", Options, main))
