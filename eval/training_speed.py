"""Seconds and memory of a step of full fine-tuning as recipes do it: DeepSpeed, fused AdamW, random clips and weights.

Every configuration is a process of its own, one after the other; without and with merging stand beside each other.

python eval/training_speed.py --batch-size 4 --threads 2
python eval/training_speed.py --batch-size 4 --threads 2 --precision fp32 --chunks 1 2 4

On a CPU, glibc keeps pieces below 32 MB that are freed. For the memory that a step needs, not for its time:
MALLOC_MMAP_THRESHOLD_=65536 python eval/training_speed.py ...
"""

from __future__ import annotations

import itertools
import statistics
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch.utils.data import Dataset

from tempme_vl.command import at_least, run
from tempme_vl.command_line import Command
from tempme_vl.evaluation.fresh import in_fresh_process
from tempme_vl.evaluation.measure import memory_now, reset_peak, synchronize
from tempme_vl.recipes.build import optimizer
from tempme_vl.recipes.options.retrieval import Options as RecipeOptions
from tempme_vl.reports import finish, format_columns
from tempme_vl.tasks.retrieval import create_retrieval_model
from tempme_vl.training import distributed
from tempme_vl.training.engine import Trainer

WORDS = 32


@dataclass(frozen=True)
class Options:
    """Time and memory of training steps of text-video retrieval, with and without merging."""

    model: str = "open_clip:ViT-B-32-quickgelu"
    frames: int = 12
    batch_size: int = 4
    methods: tuple[str, ...] = ("none", "tempme")
    precision: tuple[Literal["fp32", "bf16"], ...] = ("fp32", "bf16")
    chunks: tuple[int, ...] = (1,)
    """Gradient caching: pieces of the batch that are encoded one after the other."""
    deepspeed_config: Path = Path("zero0")
    grad_checkpointing: bool = False
    """Recompute blocks in the backward pass."""
    steps: int = 3
    """Steps that count; one more before them warms up."""
    threads: int | None = None
    """CPU threads; default: torch's choice."""
    json: Path | None = None
    """Also write all numbers to this file."""


@dataclass(frozen=True)
class Case:
    method: str
    precision: Literal["fp32", "bf16"]
    chunks: int


@dataclass(frozen=True)
class Row:
    """One configuration.

    Attributes:
        seconds, cpu: of a step, the median; of all its threads together.
        memory: MiB, the highest of the process above what it had before the model was built.
    """

    case: Case
    seconds: float
    cpu: float
    memory: float


class Clips(Dataset[dict[str, Any]]):
    """So many random clips with a caption each."""

    def __init__(self, count: int, frames: int, size: int):
        self.count, self.shape = count, (frames, 3, size, size)

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, key: tuple[int, int]) -> dict[str, Any]:
        _, index = key
        draw = torch.Generator().manual_seed(index)
        return {
            "video": torch.randint(256, self.shape, generator=draw, dtype=torch.uint8),
            "frame_mask": torch.ones(self.shape[0]),
            "text_ids": torch.randint(1, 1000, (WORDS,), generator=draw),
            "text_mask": torch.ones(WORDS, dtype=torch.int64),
            "video_id": index,
            "text_id": index,
            "valid": 1,
            "name": f"clip-{index}",
        }


def main(options: Options) -> None:
    at_least(1, frames=options.frames, batch_size=options.batch_size, threads=options.threads, steps=options.steps)
    at_least(1, chunks=min(options.chunks, default=0))
    cases = [
        Case(method, precision, chunks)
        for precision, chunks, method in itertools.product(options.precision, options.chunks, options.methods)
    ]
    rows: list[Row] = []
    for case in cases:
        rows.append(in_fresh_process(measured, options, case))
        print(rows_shown(rows[-1:]), flush=True)
    setting = (
        f"{options.model}, {options.batch_size} clips of {options.frames} frames, {options.deepspeed_config}"
        f"{', recomputing blocks' if options.grad_checkpointing else ''}; torch {torch.__version__}"
    )
    finish(
        f"\n{setting}\n{rows_shown(rows)}", {"setting": setting, "rows": [asdict(row) for row in rows]}, options.json
    )


def measured(options: Options, case: Case) -> Row:
    """Of the process that this runs in."""
    device = distributed.initialize()
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    before = memory_now(device)[0]
    torch.manual_seed(0)
    model = create_retrieval_model(options.model, None, case.method, options.frames, "clip4clip").to(device)
    model.frontend.set_grad_checkpointing(options.grad_checkpointing)
    count, size = options.batch_size * (1 + options.steps), model.frontend.shape.image_size
    with tempfile.TemporaryDirectory() as folder:
        settings = replace(
            RecipeOptions(),
            output=Path(folder) / "run",
            deepspeed_config=options.deepspeed_config,
            batch_size=options.batch_size,
            chunks=case.chunks,
            precision=case.precision,
            epochs=1,
            workers=0,
            save_every=count,
        )
        made = optimizer(settings, model, model.is_new_parameter)
        trainer = Trainer(model, made, Clips(count, options.frames, size), settings)
        reset_peak(device)  # weights are converted while the engine is built: that peak is not meant
        seconds, cpu = [], []
        for batch in itertools.islice(trainer.batches(), 1 + options.steps):
            start, start_cpu = time.perf_counter(), time.process_time()
            trainer.update(batch, model.loss)
            synchronize(device)
            seconds.append(time.perf_counter() - start)
            cpu.append(time.process_time() - start_cpu)
        memory = (memory_now(device)[1] - before) / 2**20
    return Row(case, statistics.median(seconds[1:]), statistics.median(cpu[1:]), memory)


def rows_shown(rows: Sequence[Row]) -> str:
    """A plain-text table; ratios to the first method of the same precision and chunks, and to the first row."""
    first = {(row.case.precision, row.case.chunks): row for row in reversed(rows)}
    lines = []
    for row in rows:
        base = first[row.case.precision, row.case.chunks]
        lines.append(
            {
                "method": row.case.method,
                "precision": row.case.precision,
                "chunks": str(row.case.chunks),
                "s a step": f"{row.seconds:.3g}",
                f"of {base.case.method}": f"{row.seconds / base.seconds:.3f}",
                "of the first row": f"{row.seconds / rows[0].seconds:.3f}",
                "CPU s": f"{row.cpu:.3g}",
                "MiB": f"{row.memory:.0f}",
                f"of {base.case.method} ": f"{row.memory / max(base.memory, 1e-9):.3f}",
            }
        )
    return format_columns(lines)


if __name__ == "__main__":
    run(Command("", Options, main))
