"""How time, memory and tokens grow with frames, videos and encoders, with and without merging; random weights.

Computed for all sizes, and measured for those below --measured GFLOPs, each in a process of its own:
    python eval/growth.py --csv growth.csv --plot docs/growth.svg --threads 1
    python eval/growth.py --measured 100000 --dtype bfloat16 --csv growth.csv --plot growth.svg      # on a GPU
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch

from tempme_vl.command import at_least, run
from tempme_vl.command_line import Command
from tempme_vl.evaluation.fresh import in_fresh_process
from tempme_vl.evaluation.growth import MIB, Growth, computed, measured, panels, to_csv
from tempme_vl.evaluation.measure import Workload, device_name
from tempme_vl.evaluation.plot import draw
from tempme_vl.reports import finish, format_columns, show, write_whole

SIZES = tuple(f"ViT-{name}-quickgelu" for name in ("B-32", "B-16", "L-14", "L-14-336"))


@dataclass(frozen=True)
class Options:
    """Cost of encoders by frames and by videos at a time, each without merging and with TempMe."""

    models: tuple[str, ...] = SIZES
    """Of open_clip."""
    frames: tuple[int, ...] = (4, 12, 16, 64, 256)
    batch: tuple[int, ...] = (1, 4, 16, 64)
    """Videos at a time, where there are 12 frames; else one."""
    methods: tuple[str, ...] = ("none", "tempme")
    measured: float = 300.0
    """Sizes of at most so many GFLOPs are run; 0 computes alone."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    threads: int | None = None
    """CPU threads; default: torch's choice."""
    csv: Path | None = None
    """Write all rows to this file."""
    plot: Path | None = None
    """Draw the memory of what was measured."""
    json: Path | None = None
    """Also write all rows to this file."""


def main(options: Options) -> None:
    at_least(1, frames=min(options.frames, default=0), batch=min(options.batch, default=0), threads=options.threads)
    at_least(0, measured=options.measured)
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    rows = []
    for work, method in points(options):
        row = computed(work, method)
        if work.batch * row.gflops <= options.measured:
            row = in_fresh_process(measured, work, method)
        rows.append(row)
        show(" ".join(f"{name} {value}" for name, value in line(row).items()))
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    setting = f"{device_name(device)}, {options.dtype}, {torch.get_num_threads()} threads, torch {torch.__version__}"
    report: dict[str, Any] = {"setting": setting, "rows": [asdict(row) for row in rows]}
    finish(f"\n{setting}\n{format_columns([line(row) for row in rows])}", report, options.json)
    if options.csv is not None:
        write_whole(options.csv, to_csv(rows).encode())
    if options.plot is not None:
        if not (drawn := panels(rows)):
            raise ValueError("--plot: nothing was measured; give --measured a larger number")
        write_whole(options.plot, draw("MiB above weights", drawn).encode())


def points(options: Options) -> Iterator[tuple[Workload, str]]:
    """Each size with each method."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    for model in options.models:
        work = Workload(f"open_clip:{model}", device, dtype=getattr(torch, options.dtype))
        for frames in options.frames:
            for batch in options.batch if frames == 12 else options.batch[:1]:
                for method in options.methods:
                    yield replace(work, frames=frames, batch=batch), method


def line(row: Growth) -> dict[str, str]:
    return {
        "model": row.model,
        "frames": str(row.frames),
        "videos": str(row.batch),
        "method": row.method,
        "tokens": str(row.tokens),
        "GFLOPs": f"{row.gflops:.4g}",
        "similarities, MiB": f"{row.batch * row.compared * 4 / MIB:.1f}",
        "CPU s": "-" if row.cpu_seconds is None else f"{row.cpu_seconds:.2f}",
        "s": "-" if row.seconds is None else f"{row.seconds:.2f}",
        "peak above weights, MiB": "-" if row.above_weights is None else f"{row.above_weights / MIB:.0f}",
        "kept, MiB": "-" if row.kept is None else f"{row.kept / MIB:.0f}",
    }


if __name__ == "__main__":
    run(Command("", Options, main))
