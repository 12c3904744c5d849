"""Search over rendered clips whose content is known: is the right one found, and is it found in the right place?

    python eval/search_motion.py --checkpoint runs/demo/tempme-seed0/best               # a few minutes on a CPU
    python eval/search_motion.py --checkpoint runs/demo/tempme-seed0/best --clips 200

The clips show an object that moves left, right, up or down, so that a caption and the same one with another direction
have the same single frames. A hit is right if the clip was made with the caption's color, shape and direction.
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
from tempme_vl.data.motion import BACKGROUNDS, MoveVideo, draw_motion, render_motion
from tempme_vl.data.rendered import FPS, NUM_FRAMES
from tempme_vl.reports import finish, format_columns
from tempme_vl.search import Hit, SearchIndex

FORMS = ("none", "int8", "float16")
_SEEN = 30  # of 255: by how much a pixel of the object differs from the background at least


@dataclass(frozen=True)
class Options:
    """Right hits, right places and bytes of an index of rendered clips."""

    checkpoint: Path
    """Of a model trained on the embedded data set motion."""
    clips: int = 2000
    seed: int = 21
    """Of the clips; the demo's have 0."""
    output: Path = Path("runs/search-motion")
    """Clips and indexes are written here, and used again."""
    json: Path | None = None
    """Also write all numbers to this file."""


def main(options: Options) -> None:
    at_least(1, clips=options.clips)
    videos, folder = clips_of(options)
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
            row |= pointed(index, captions, shown)
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


def pointed(index: SearchIndex, captions: Sequence[str], shown: dict[str, MoveVideo]) -> dict[str, float]:
    """Of each caption's first hit, percent: of the patches of the best token that lie on the object (a quarter of their
    pixels), and the pointing game, whether any does; beside each the same of all tokens, which is chance."""
    patches, points = [], []
    for caption in captions:
        (hit,) = index.search(caption, k=1)
        where = index.locate(caption, hit, top=1_000_000)
        on = on_object(shown[hit.path], hit, where.times, where.patches.shape[-1])
        shares = [float(on[held].mean()) for held in where.patches]
        patches.append((shares[0], float(on.mean())))
        points.append((shares[0] > 0, float(np.mean([share > 0 for share in shares]))))
    found = 100 * np.stack([np.mean(patches, axis=0), np.mean(points, axis=0)])
    names = ("patches on the object", "by chance", "best token on the object", "token by chance")
    return dict(zip(names, found.flatten().tolist(), strict=True))


def on_object(video: MoveVideo, hit: Hit, times: np.ndarray, grid: int) -> np.ndarray:
    """(F, G, G) bool: which patches of the frames of these times lie on the object."""
    numbers = np.clip(np.rint((times - hit.start) * FPS).astype(int), 0, NUM_FRAMES - 1)
    frames = video.frames()[numbers].astype(int)
    seen = (np.abs(frames - BACKGROUNDS[video.background]) > _SEEN).any(axis=-1)
    side = seen.shape[-1] // grid
    return seen.reshape(len(frames), grid, side, grid, side).mean(axis=(2, 4)) >= 0.25


def _shown(value: Any) -> str:
    return "" if value is None else f"{value:.1f}" if isinstance(value, float) else str(value)


if __name__ == "__main__":
    run(Command("", Options, main))
