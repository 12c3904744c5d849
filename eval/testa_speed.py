"""Memory and time of TESTA's encoder with its aggregation and without, of a forward pass and of a training step.

Random weights and input, batch 1. Every number is of a process of its own, one after the other, with and without in
turn; B/16 with 32 and 96 frames, half an hour on a free CPU core:
    python eval/testa_speed.py --threads 1
    python eval/testa_speed.py --threads 1 --frames 32 --steps forward

glibc keeps pieces below 32 MB that are freed, so that the peak of a process can be half above what it needs. For memory
let it give all of them back, which takes some time:
    MALLOC_MMAP_THRESHOLD_=65536 python eval/testa_speed.py --threads 1

A step is forward, backward and AdamW of the visual tower alone. Where activations do not fit: --grad-checkpointing.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import torch

from tempme_vl import VisualFrontend, create_frontend
from tempme_vl.command import at_least, run
from tempme_vl.command_line import Command
from tempme_vl.evaluation.fresh import in_fresh_process
from tempme_vl.evaluation.measure import device_name, memory_now, reset_peak
from tempme_vl.reports import finish, format_columns

METHODS = ("none", "testa")
CPU = torch.device("cpu")


@dataclass(frozen=True)
class Options:
    """Peak memory and seconds of TESTA's visual tower on the CPU, with and without aggregation."""

    model: str = "testa:b16"
    """testa:b16, with the paper's numbers for 32 and 96 frames, or testa:tiny."""
    frames: tuple[int, ...] = (32, 96)
    steps: tuple[Literal["forward", "training"], ...] = ("forward", "training")
    grad_checkpointing: bool = False
    """Recompute blocks in the backward pass."""
    repeats: int = 1
    """Times that each is measured; the least counts."""
    threads: int | None = None
    """CPU threads; default: torch's choice."""
    json: Path | None = None
    """Also write all numbers to this file."""


@dataclass(frozen=True)
class Row:
    """One configuration.

    Attributes:
        memory: MiB, the highest of the process above what it had with weights and input; of training with gradients and
            AdamW's state in it.
        cpu, wall: seconds; of one thread the first hardly depends on what else the machine does.
    """

    frames: int
    step: str
    method: str
    tokens: int
    gflops: float
    memory: float
    cpu: float
    wall: float


def main(options: Options) -> None:
    at_least(1, repeats=options.repeats, threads=options.threads, frames=min(options.frames, default=0))
    rows: list[Row] = []
    for frames in options.frames:
        for step in options.steps:
            found: dict[str, list[Row]] = {method: [] for method in METHODS}
            for method in METHODS * options.repeats:
                try:
                    found[method].append(in_fresh_process(measured, options, frames, step, method))
                except BrokenProcessPool as error:
                    raise ValueError(
                        f"the process of {frames} frames, {step}, {method!r} was ended, perhaps for its memory: "
                        "try --grad-checkpointing, fewer --frames or --steps forward"
                    ) from error
            rows += [min(some, key=lambda row: row.cpu) for some in found.values()]
            print(rows_shown(rows[-2:]), flush=True)
    setting = (
        f"{options.model}, batch 1, float32{', recomputing blocks' if options.grad_checkpointing else ''}; "
        f"{device_name(CPU)}, {options.threads or torch.get_num_threads()} threads, "
        f"torch {torch.__version__}"
    )
    report = {"setting": setting, "rows": [asdict(row) for row in rows]}
    finish(f"\n{setting}\n{rows_shown(rows)}", report, options.json)


def measured(options: Options, frames: int, step: str, method: str) -> Row:
    """Of the process that this runs in."""
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    frontend = create_frontend(options.model, None, method, frames)
    size = frontend.shape.image_size
    video = torch.randn(1, frames, 3, size, size)
    before = memory_now(CPU)[0]
    reset_peak(CPU)
    wall, cpu = time.perf_counter(), time.process_time()
    if step == "forward":
        with torch.inference_mode():
            frontend(video)
    else:
        frontend.set_grad_checkpointing(options.grad_checkpointing)
        train(frontend, video)
    seconds = time.process_time() - cpu, time.perf_counter() - wall
    tokens, memory = frontend.schedule.output_tokens, (memory_now(CPU)[1] - before) / 2**20
    return Row(frames, step, method, tokens, frontend.gflops(), memory, *seconds)


def train(frontend: VisualFrontend, video: torch.Tensor) -> None:
    """One step towards another embedding."""
    optimizer = torch.optim.AdamW(frontend.parameters(), lr=1e-5, fused=True)  # as recipes do
    frontend.train()(video).pooled.square().sum().backward()
    optimizer.step()


def rows_shown(rows: Sequence[Row]) -> str:
    """A plain-text table; ratios to the row without aggregation, which stands in front of the other."""
    return format_columns(
        [
            {
                "frames": str(row.frames),
                "step": row.step,
                "aggregation": "on" if row.method == "testa" else "off",
                "tokens": str(row.tokens),
                "GFLOPs": f"{row.gflops:.4g}",
                "of off": f"{row.gflops / off.gflops:.3f}",
                "MiB": f"{row.memory:.0f}",
                "of off ": f"{row.memory / max(off.memory, 1e-9):.3f}",
                "CPU s": f"{row.cpu:.3g}",
                "of off  ": f"{row.cpu / off.cpu:.3f}",
                "wall s": f"{row.wall:.3g}",
            }
            for off, row in zip([row for row in rows[::2] for _ in METHODS], rows, strict=True)
        ]
    )


if __name__ == "__main__":
    run(Command("", Options, main))
