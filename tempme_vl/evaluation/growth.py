"""How cost grows with frames, videos and encoders, with and without merging: computed for all, measured for some.

Letters: F frames, N tokens of a frame.
"""

from __future__ import annotations

import csv
import gc
import io
import time
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace

from tempme_vl.evaluation.measure import Workload, memory_now, open_clip_tower, reset_peak, synchronize, tower_and_step
from tempme_vl.evaluation.plot import Panel, Point
from tempme_vl.evaluation.saved import kept_bytes
from tempme_vl.scheduling import schedule_for

MIB = 2**20


@dataclass(frozen=True)
class Growth:
    """One encoder on so many videos of so many frames.

    Attributes:
        input_tokens, tokens: of a video, in front of the first block and behind the last.
        compared: the most similarities that one match of one video computes, each of 4 bytes where they are computed
            all at once: the product of both sides, which grows with the square of a clip's tokens.
        gflops: of a video, in 1e9 multiply-accumulates.
        seconds, cpu_seconds: of a forward pass without gradients, on the clock, and of all threads; these and the
            following are None where they are computed alone.
        above_weights: bytes at the peak of that, weights and input left out.
        kept: bytes that a forward pass keeps for its backward pass, weights and input left out.
    """

    model: str
    method: str
    frames: int
    batch: int
    input_tokens: int
    tokens: int
    compared: int
    gflops: float
    seconds: float | None = None
    cpu_seconds: float | None = None
    above_weights: int | None = None
    kept: int | None = None


def computed(work: Workload, method: str) -> Growth:
    """What is known without running it."""
    layers, shape = open_clip_tower(work.model)
    schedule = schedule_for(method, layers, shape, work.frames, **work.options.get(method, {}))
    counts, compared, tokens, prefix, clips = work.frames, 0, schedule.tokens, schedule.prefix, schedule.clips
    for plan in schedule.plan:
        join = plan.join or 1
        tokens, prefix, clips = tokens * join, prefix * join, clips // join
        for pairs in (plan.before, plan.after):
            sides = (tokens - prefix) // 2, (tokens - prefix + 1) // 2
            compared = max(compared, clips * sides[0] * sides[1] if pairs else 0)
            tokens -= pairs
    name, gflops = work.model.partition(":")[2], work.gflops(method)
    inputs = counts * schedule.tokens
    return Growth(name, method, work.frames, work.batch, inputs, schedule.output_tokens, compared, gflops)


def measured(work: Workload, method: str) -> Growth:
    """The same with what a forward pass takes. Call it in a fresh process: freed memory may stay there."""
    tower, step, video = tower_and_step(work, method)
    gc.collect()
    before = memory_now(work.device)[0]
    reset_peak(work.device)
    start, cpu = time.perf_counter(), time.process_time()
    step()
    synchronize(work.device)
    seconds, cpu = time.perf_counter() - start, time.process_time() - cpu
    above = memory_now(work.device)[1] - before
    return replace(
        computed(work, method),
        seconds=seconds,
        cpu_seconds=cpu,
        above_weights=above,
        kept=kept_bytes(tower.train(), video),
    )


def to_csv(rows: Iterable[Growth]) -> str:
    """One line a row; what was not measured is empty."""
    text = io.StringIO()
    lines = [asdict(row) for row in rows]
    writer = csv.DictWriter(text, list(Growth.__dataclass_fields__), lineterminator="\n")
    writer.writeheader()
    writer.writerows(
        {key: round(value, 3) if isinstance(value, float) else value for key, value in line.items()} for line in lines
    )
    return text.getvalue()


def panels(rows: Sequence[Growth]) -> list[Panel]:
    """MiB above weights of what was measured: by frames of one video, and by videos of 12 frames."""
    found = [row for row in rows if row.above_weights is not None and row.kept is not None]
    by_frames = [row for row in found if row.batch == 1]
    by_videos = [row for row in found if row.frames == 12]
    return [
        Panel(across, [point for row in chosen for point in _points(row, x(row))])
        for across, chosen, x in (
            ("frames of one video", by_frames, lambda row: row.frames),
            ("videos of 12 frames", by_videos, lambda row: row.batch),
        )
        if chosen
    ]


def _points(row: Growth, x: int) -> list[Point]:
    assert row.above_weights is not None and row.kept is not None
    name = f"{row.model.removesuffix('-quickgelu').removeprefix('ViT-')}, {row.method}"
    return [
        Point(f"{name}: peak of encoding", x, row.above_weights / MIB),
        Point(f"{name}: kept for gradients", x, row.kept / MIB),
    ]
