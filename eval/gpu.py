"""Everything that a GPU has to say, in one command of at most twelve minutes: correctness, times, memory.

One H100 of 80 GB; docs/benchmarks.md has a table of what comes out:
    python eval/gpu.py --output runs/gpu

The same on a CPU, with tiny models, to see that every part runs:
    python eval/gpu.py --output runs/gpu-small --small

OUTPUT/gpu.json is written anew after each part, so that nothing is lost with those behind it; OUTPUT/infer.csv and
train.csv have the columns of timm's benchmarks, a sample being a video. Weights and input are random: only times,
memory and agreement mean something.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from tempme_vl.command import at_least, run
from tempme_vl.command_line import Command
from tempme_vl.evaluation.gpu_report import format_report, timm_rows, write_csv
from tempme_vl.evaluation.measure import device_name
from tempme_vl.evaluation.parts import Part, run_part, told
from tempme_vl.evaluation.regressions import compare, measured_of, stored
from tempme_vl.reports import provenance, show, write_json

HERE = Path(__file__).parent
TINY = "--frames 8 --r 1 --merge-layers 2 3 4 --merge-frames 2 2 2 --cross-percent 30 --intra-percent 10 --repeats 2"
B16, B32 = "open_clip:ViT-B-16-quickgelu", "open_clip:ViT-B-32-quickgelu"
EXTRA = ("whole",)
LARGE_BATCH = "--measure --no-costs --dtype bfloat16 --repeats 8"


@dataclass(frozen=True)
class Options:
    """Run all measurements of a GPU and keep one JSON file; a part that fails ends the command with an error, last."""

    output: Path
    """Folder of gpu.json, a log and a report a part, and the CSV files."""
    small: bool = False
    """Tiny models, three minutes of one CPU core: to see that every part runs."""
    parts: tuple[str, ...] = ()
    """Some of the parts alone. Default: all but `whole`, which compiles whole encoders and may take minutes more."""
    minutes: float = 12.0
    """Parts that have not begun by then do not."""
    against: Path | None = None
    """A gpu.json: it is an error if rows became slower since, beside their first row."""
    spread: float = 0.1
    """What a ratio may grow by meanwhile, as a share of it."""


def main(options: Options) -> None:
    at_least(0, minutes=options.minutes, spread=options.spread)
    if not options.small and not torch.cuda.is_available():
        raise ValueError("torch finds no GPU; --small runs the same parts with tiny models on a CPU")
    before = None if options.against is None else stored(options.against)
    parts = small_parts() if options.small else gpu_parts()
    if unknown := set(options.parts) - {part.name for part in parts}:
        names = ", ".join(part.name for part in parts)
        raise ValueError(f"--parts {' '.join(sorted(unknown))}: expected some of {names}")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    report: dict[str, Any] = {**provenance(), "device": device_name(device), "small": options.small, "parts": {}}
    end = time.perf_counter() + 60 * options.minutes
    options.output.mkdir(parents=True, exist_ok=True)
    for part in parts:
        if part.name in options.parts or not (options.parts or part.name in EXTRA):
            report["parts"][part.name] = run_part(part, options.output, end - time.perf_counter())
            told(part.name, report["parts"][part.name])
            write_json(options.output / "gpu.json", report)
    show(format_report(report))
    for kind in ("infer", "train"):
        write_csv(options.output / f"{kind}.csv", timm_rows(report, kind))
    if wrong := [name for name, done in report["parts"].items() if done["status"] != "done"]:
        raise ValueError(f"{len(wrong)} of {len(report['parts'])} parts did not end well: {', '.join(wrong)}")
    if before is not None:
        show(compare(before, list(measured_of(report)), options.spread))


def gpu_parts() -> list[Part]:
    """With the batches that fit 80 GB and that docs/benchmarks.md has."""
    rows = "--rows open_clip none tome tempme --no-memory"
    return [
        part("exact", "fast_paths", "", 150),
        part(
            "forward-b16", "efficiency", f"{LARGE_BATCH} {rows} --model {B16} --batch 64 --share --ways compiled", 120
        ),
        part(
            "forward-b32", "efficiency", f"{LARGE_BATCH} {rows} --model {B32} --batch 128 --share --ways compiled", 100
        ),
        part("train-b16", "efficiency", f"{LARGE_BATCH} --train --rows none tempme --model {B16} --batch 48", 80),
        part("umt", "efficiency", f"{LARGE_BATCH} --model umt:b16 --batch 32 --no-memory --share", 50),
        part("train-umt", "efficiency", f"{LARGE_BATCH} --train --model umt:b16 --batch 32", 110),
        part("video-llava", "videollm_speed", "--device cuda --llm-layers 32 --new-tokens 8 --repeats 5", 100),
        part("qwen", "qwen_speed", "--device cuda --llm-layers 28 --new-tokens 8 --repeats 4", 120),
        part("one-video", "efficiency", f"{LARGE_BATCH} {rows} --model {B16} --batch 1 --ways graph", 50),
        part("train-b32", "efficiency", f"{LARGE_BATCH} --train --rows none tempme --model {B32} --batch 96", 80),
        part(
            "attention", "efficiency", f"{LARGE_BATCH} {rows} --model {B16} --batch 64 --ways plain efficient flash", 60
        ),
        part("heads", "head_speed", "", 40),
        part("whole", "efficiency", f"{LARGE_BATCH} {rows} --model {B16} --batch 64 --ways whole", 240),
    ]


def small_parts() -> list[Part]:
    """The same with tiny models; what needs a GPU's kernels runs in Triton's interpreter, or not at all."""
    tiny, rows = f"--measure --no-costs {TINY}", "--rows open_clip none tome tempme --no-memory"
    qwen = "--width tiny --blocks 4 --llm-layers 1 --frames 16 --frame 112 112 --new-tokens 2 --repeats 1"
    llava = "--model tiny --r 1 --merge-layers 2 3 4 --new-tokens 2 --repeats 1"
    return [
        part("exact", "fast_paths", "--small", 600, TRITON_INTERPRET="1"),
        part("forward", "efficiency", f"{tiny} {rows} --model open_clip:tiny --share --ways plain flash", 200),
        part("train", "efficiency", f"{tiny} --train --rows none tempme --model open_clip:tiny --batch 2", 200),
        part("umt", "efficiency", f"{tiny} --model umt:tiny --no-memory --share", 200),
        part("train-umt", "efficiency", f"{tiny} --train --no-memory --model umt:tiny --batch 2", 200),
        part("video-llava", "videollm_speed", llava, 200),
        part("qwen", "qwen_speed", qwen, 200),
        part("heads", "head_speed", "--tokens 12 3 --videos 2 --captions 3 --width 8 --repeats 2", 200),
    ]


def part(name: str, script: str, arguments: str, seconds: float, **environment: str) -> Part:
    """One of the scripts beside this one."""
    command: Sequence[str] = (sys.executable, str(HERE / f"{script}.py"), *arguments.split())
    return Part(name, command, seconds, environment)


if __name__ == "__main__":
    run(Command("", Options, main))
