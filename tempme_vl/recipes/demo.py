"""The demo: three models trained alike on the embedded data set, and their table."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path

from tempme_vl.command_line import Command, Example
from tempme_vl.processes import launcher

METHODS = {"none": "per-frame mean pooling", "tome": "ToMe", "tempme": "TempMe"}


@dataclass(frozen=True)
class Options:
    """Train three models alike on the embedded data set "motion" and print their table.

    Per-frame mean pooling, ToMe and TempMe: 6 minutes on 2 CPU cores.
    """

    output: Path = Path("runs/demo")
    """Each model's run folder goes below it; runs that are there already are started anew."""
    seed: int = 0
    """Of all three."""
    ranks: int = max(1, min(2, len(os.sched_getaffinity(0))))
    """Processes started by the deepspeed launcher; by default one a core, two at most."""


def main(options: Options) -> None:
    start, reports = time.perf_counter(), {}
    for method in METHODS:
        folder = options.output / f"{method}-seed{options.seed}"
        shutil.rmtree(folder, ignore_errors=True)
        command = [*launcher(options.ranks), "--module", "tempme_vl.cli", "train", "retrieval", "--method", method]
        command += ["--output", str(folder), "--seed", str(options.seed), "--data-root", "runs/motion-data"]
        done = subprocess.run([*command, "--dataset", "motion"])
        if done.returncode:  # the run has said why
            raise ValueError(f"training {METHODS[method]} ended with exit code {done.returncode}")
        reports[method] = json.loads((folder / "report.json").read_text())
    print(format_demo(reports))
    print(f"\n{time.perf_counter() - start:.0f} s in all, seed {options.seed}, {options.ranks} ranks")


def format_demo(reports: dict[str, dict]) -> str:
    """A Markdown table of the runs' reports."""
    one = next(iter(reports.values()))
    lines = [
        f"{one['split']}: {one['videos']} videos; best epoch chosen on {one['selected_on']}",
        "",
        "| method | t2v R@1 | R@5 | R@10 | R-Sum | v2t R@1 | R@5 | R@10 | R-Sum | tokens | GFLOPs | train s |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for method, report in reports.items():
        scores = [report[way][key] for way in ("t2v", "v2t") for key in ("r1", "r5", "r10", "rsum")]
        cells = [METHODS[method], *(f"{score:.1f}" for score in scores)]
        cells += [f"{report['output_tokens']} of {report['input_tokens']}", f"{report['gflops']:.4f}"]
        lines.append("| " + " | ".join([*cells, f"{report['train_seconds']:.0f}"]) + " |")
    return "\n".join(lines)


DEMO = Command("demo", Options, main, (Example("another seed, in one process", "--seed 1 --ranks 1"),))
