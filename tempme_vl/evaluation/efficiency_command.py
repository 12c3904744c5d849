"""What merging saves, computed and measured (`tempme-vl efficiency`, eval/efficiency.py)."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import torch

from tempme_vl.command import at_least
from tempme_vl.evaluation.efficiency import cost_table, format_costs, format_fusion, fusion_table
from tempme_vl.evaluation.fresh import in_fresh_process
from tempme_vl.evaluation.measure import (
    Workload,
    build_steps,
    device_name,
    format_measured,
    measured_rows,
    paired_times,
    peak_memory,
    share_of_merging,
)
from tempme_vl.evaluation.options import EfficiencyOptions
from tempme_vl.evaluation.regressions import compare, stored
from tempme_vl.evaluation.ways import name_of
from tempme_vl.reports import provenance, show, write_json


def main(options: EfficiencyOptions) -> None:
    at_least(1, frames=options.frames, repeats=options.repeats, threads=options.threads)
    for batch in options.batch:
        at_least(1, batch=batch)
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    at_least(0, spread=options.spread)
    if not options.measure and (options.against is not None or not options.costs):
        raise ValueError("--against and --no-costs are about what is measured; add --measure")
    before = None if options.against is None else stored(options.against)
    report: dict[str, Any] = computed_tables() if options.costs else {}
    if options.measure:
        report["measured"] = [measure(options, batch) for batch in options.batch]
    if options.json is not None:
        write_json(options.json, {**report, **provenance()})
    if before is not None:
        show(compare(before, report["measured"], options.spread))


def computed_tables() -> dict[str, Any]:
    """Prints the tables of what is computed; returns the same as JSON data."""
    costs = cost_table()
    fusion = fusion_table(costs)
    show(f"{format_costs(costs)}\n\n{format_fusion(fusion)}")
    return {
        "rows": [{**asdict(row), "deviation_percent": row.deviation} for row in costs],
        "fusion": [{**asdict(row), "saved_percent": row.saved} for row in fusion],
    }


def measure(options: EfficiencyOptions, batch: int) -> dict[str, Any]:
    """Measures, prints the table and says what it holds for; returns the same as JSON data."""
    work = workload(options, batch)
    names = work.settled if "all" in options.rows else options.rows or work.usual
    if unknown := set(names) - set(work.rows):
        raise ValueError(
            f"--rows {' '.join(sorted(unknown))}: not of {'training ' if options.train else ''}{options.model}; "
            f"expected some of {', '.join(work.rows)}"
        )
    names = tuple(name_of(row, way) for row in names for way in (None, *options.ways))
    # memory first: on a GPU this process would take its share
    memory = {name: in_fresh_process(peak_memory, work, name) for name in names if options.memory}
    times = paired_times(build_steps(work, names), options.repeats, work.device)
    merging = {name: share_of_merging(work, name) for name in names if options.share and work.merges(name)}
    rows = measured_rows(times, {name: work.gflops(name) for name in names}, memory, merging)
    setting = {
        "model": options.model,
        "frames": options.frames,
        "image_size": work.image_size,
        "batch": batch,
        "what": what(work),
        "schedule": ", ".join(f"{key} {value}" for key, value in work.options["tempme"].items()) or "default",
        "dtype": f"{options.dtype} autocast" if options.train and options.dtype != "float32" else options.dtype,
        "device": device_name(work.device),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "turns": options.repeats,
    }
    memory_kind = "max_memory_allocated" if work.device.type == "cuda" else "resident set size"
    of_memory = f"; peak memory ({memory_kind}) of each row in a process of its own" if options.memory else ""
    show(
        f"\nMeasured on this machine, and true of it alone: {', '.join(f'{k} {v}' for k, v in setting.items())}\n"
        f"Medians of times and of paired ratios, beside the GFLOPs of one video in the visual tower{of_memory}.\n"
        f"{format_measured(rows)}"
    )
    return {"setting": setting, "rows": [asdict(row) for row in rows]}


def what(work: Workload) -> str:
    if not work.train:
        return "forward of the visual tower"
    trained = "visual and text tower, VTC and VTM" if work.family == "umt" else "input embeddings frozen"
    return f"full fine-tuning step, {trained}"


def workload(options: EfficiencyOptions, batch: int) -> Workload:
    names = ("r", "merge_layers", "merge_frames", "cross_percent", "intra_percent")
    given = {name: getattr(options, name) for name in names if getattr(options, name) is not None}
    return Workload(
        options.model,
        torch.device("cuda" if torch.cuda.is_available() else "cpu"),
        options.frames,
        batch,
        options.train,
        getattr(torch, options.dtype),
        {"tempme": given, "tome": {name: given[name] for name in given if name == "r"}},
    )
