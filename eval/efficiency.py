"""What merging saves, beside the paper's numbers.

GFLOPs and tokens of all methods, and the cost of UMT's fusion, computed (a second or two):
    python eval/efficiency.py

Times and peak memory of the forward pass on this machine, beside open_clip's own tower:
    python eval/efficiency.py --measure --model open_clip:ViT-B-16-quickgelu --threads 1

One step of full fine-tuning with and without merging; on a CPU, then in bf16 on a GPU:
    python eval/efficiency.py --measure --train --batch 2 --repeats 5
    python eval/efficiency.py --measure --train --batch 32 --dtype bfloat16 --model open_clip:ViT-B-16-quickgelu

UMT with frames joint, apart, and apart with TempMe; L/16 has no published schedule, the one here is an example:
    python eval/efficiency.py --measure --model umt:b16 --repeats 5
    python eval/efficiency.py --measure --train --model umt:b16 --batch 2 --repeats 5
    python eval/efficiency.py --measure --train --model umt:l16 --repeats 3 --r 8 --merge-layers 14 16 18 \\
        --merge-frames 2 2 3 --cross-percent 40 --intra-percent 10
"""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from tempme_vl.command import at_least, run
from tempme_vl.evaluation.efficiency import cost_table, format_costs, format_fusion, fusion_table
from tempme_vl.evaluation.measure import (
    Peak,
    Workload,
    build_steps,
    device_name,
    format_measured,
    measured_rows,
    paired_times,
    peak_memory,
)
from tempme_vl.reports import provenance, show, write_json

ROWS = Literal["open_clip", "none", "tome", "tempme", "joint", "clip", "clip+tempme"]


@dataclass(frozen=True)
class Options:
    """GFLOPs and tokens of merging methods beside the paper's; with --measure, times and memory of this machine."""

    json: Path | None = None
    """Also write all numbers to this file."""
    measure: bool = False
    """Time the rows in turn, on a GPU if there is one, with random weights and input."""
    train: bool = False
    """Measure one full-fine-tuning step (forward, backward, AdamW) of the retrieval model, not the tower's forward."""
    rows: tuple[ROWS, ...] = ()
    """The rows to measure, the first being the reference; default: all that the model has (open_clip's tower does not
    train alone; UMT has joint, clip and clip+tempme)."""
    model: str = "open_clip:ViT-B-32-quickgelu"
    """open_clip:NAME, open_clip:tiny, or umt:b16, umt:l16, umt:tiny."""
    frames: int = 12
    batch: int = 1
    """Videos."""
    repeats: int = 15
    """Turns that count; one more before them warms up."""
    threads: int | None = None
    """CPU threads; default: torch's choice."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Of the weights in a forward pass; training keeps float32 weights and autocasts."""
    r: int | None = None
    """Pairs merged a frame in each early block (TempMe, ToMe). These five default to the paper's for B/32, B/16, and
    for UMT B/16 to a fit, not the paper's setting."""
    merge_layers: tuple[int, ...] | None = None
    """Blocks that join clips."""
    merge_frames: tuple[int, ...] | None = None
    """Neighbouring clips joined in each of them."""
    cross_percent: int | None = None
    """Percent of tokens merged across clips there."""
    intra_percent: int | None = None
    """Percent of tokens merged inside the clips from there on."""
    peak_of: str | None = None
    """Set by the command when it calls itself: only print this row's memory, as a process's peak never goes back."""


def main(options: Options) -> None:
    at_least(1, frames=options.frames, batch=options.batch, repeats=options.repeats, threads=options.threads)
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    if options.peak_of is not None:
        print(json.dumps(asdict(peak_memory(workload(options), options.peak_of))))
        return
    costs, fusion = cost_table(), fusion_table()
    show(f"{format_costs(costs)}\n\n{format_fusion(fusion)}")
    report: dict[str, Any] = {
        "costs": [{**asdict(row), "deviation_percent": row.deviation} for row in costs],
        "fusion": [{**asdict(row), "saved_percent": row.saved} for row in fusion],
    }
    if options.measure:
        report["measured"] = measure(options)
    if options.json is not None:
        write_json(options.json, {**report, **provenance()})


def measure(options: Options) -> dict[str, Any]:
    """Measures, prints the table and says what it holds for; returns the same as JSON data."""
    work = workload(options)
    names = options.rows or work.rows
    if unknown := set(names) - set(work.rows):
        raise ValueError(
            f"--rows {' '.join(sorted(unknown))}: not of {'training ' if options.train else ''}{options.model}; "
            f"expected some of {', '.join(work.rows)}"
        )
    # memory first: on a GPU this process would take its share
    memory = {name: peak_in_fresh_process(name) for name in names}
    times = paired_times(build_steps(work, names), options.repeats, work.device)
    rows = measured_rows(times, memory)
    setting = {
        "model": options.model,
        "frames": options.frames,
        "batch": options.batch,
        "what": what(work),
        "schedule": ", ".join(f"{key} {value}" for key, value in work.options["tempme"].items()) or "default",
        "dtype": f"{options.dtype} autocast" if options.train and options.dtype != "float32" else options.dtype,
        "device": device_name(work.device),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "turns": options.repeats,
    }
    memory_kind = "max_memory_allocated" if work.device.type == "cuda" else "resident set size"
    show(
        f"\nMeasured on this machine, and true of it alone: {', '.join(f'{k} {v}' for k, v in setting.items())}\n"
        f"Medians of times and of paired ratios; peak memory ({memory_kind}) of each row in a process of its own.\n"
        f"{format_measured(rows)}"
    )
    return {"setting": setting, "rows": [asdict(row) for row in rows]}


def what(work: Workload) -> str:
    if not work.train:
        return "forward of the visual tower"
    trained = "visual and text tower, VTC and VTM" if work.family == "umt" else "input embeddings frozen"
    return f"full fine-tuning step, {trained}"


def workload(options: Options) -> Workload:
    names = ("r", "merge_layers", "merge_frames", "cross_percent", "intra_percent")
    given = {name: getattr(options, name) for name in names if getattr(options, name) is not None}
    return Workload(
        options.model,
        torch.device("cuda" if torch.cuda.is_available() else "cpu"),
        options.frames,
        options.batch,
        options.train,
        getattr(torch, options.dtype),
        {"tempme": given, "tome": {name: given[name] for name in given if name == "r"}},
    )


def peak_in_fresh_process(row: str) -> Peak:
    """Runs this command once more, for the memory of one row."""
    run = subprocess.run([sys.executable, *sys.argv, "--peak-of", row], stdout=subprocess.PIPE, text=True, check=True)
    return Peak(**json.loads(run.stdout.splitlines()[-1]))


if __name__ == "__main__":
    run(main, Options)
