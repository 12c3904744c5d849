"""Time of a tower without and with merging in the runtimes of a CPU (torch, compiled, onnxruntime, OpenVINO).

Each way runs in a process of its own, since threads of one runtime that wait for work slow down the next one; there its
two towers take turns.

python eval/export_speed.py --model open_clip:ViT-B-32-quickgelu --threads 2 --repeats 21
"""

from __future__ import annotations

import statistics
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from tempme_vl import VisualFrontend, create_frontend
from tempme_vl.command import at_least, run
from tempme_vl.command_line import Command
from tempme_vl.evaluation.fresh import in_fresh_process
from tempme_vl.evaluation.measure import paired_times
from tempme_vl.export.onnx import Arrays, load_onnx, to_onnx, write_onnx
from tempme_vl.export.openvino import load_openvino, write_openvino
from tempme_vl.export.sides import VideoSide
from tempme_vl.reports import format_columns, show

Way = Literal["torch", "compiled", "torch-bf16", "compiled-bf16", "onnxruntime", "openvino", "openvino-bf16"]
METHODS = ("none", "tempme")


@dataclass(frozen=True)
class Options:
    """Time a tower's forward pass with `tempme` over that with `none`, beside the ratio of their GFLOPs."""

    model: str = "open_clip:ViT-B-32-quickgelu"
    frames: int = 12
    batch: int = 1
    threads: int = 1
    repeats: int = 9
    ways: tuple[Way, ...] = ("torch", "torch-bf16", "onnxruntime", "openvino", "openvino-bf16")
    """compiled: torch.compile. bf16: computed in bfloat16, which makes other matches."""


@dataclass(frozen=True)
class Timed:
    """A way's two methods: seconds in turn, and pooled embeddings (B, E) of the same input, float32."""

    seconds: Mapping[str, list[float]]
    pooled: Mapping[str, Tensor]


def main(options: Options) -> None:
    at_least(1, frames=options.frames, batch=options.batch, threads=options.threads, repeats=options.repeats)
    torch.set_num_threads(options.threads)
    gflops = {method: _frontend(options, method).gflops() for method in METHODS}
    with tempfile.TemporaryDirectory() as folder:
        in_fresh_process(_write, options, Path(folder))
        timed = {way: in_fresh_process(_timed, options, way, Path(folder)) for way in ("torch", *options.ways)}
    lines = [_line(way, timed[way], timed["torch"]) for way in timed]
    show(f"GFLOPs, tempme / none: {gflops['tempme'] / gflops['none']:.3f}\n{format_columns(lines)}")


def _frontend(options: Options, method: str) -> VisualFrontend:
    torch.manual_seed(0)  # the same weights in all processes
    return create_frontend(options.model, method=method, num_frames=options.frames).eval()


def _write(options: Options, folder: Path) -> None:
    """Files of both towers for both runtimes."""
    for method in METHODS:
        graph = to_onnx(VideoSide(_frontend(options, method)).eval(), options.batch)
        write_onnx(graph, "{}", folder / f"{method}.onnx")
        write_openvino(graph, "{}", folder / f"{method}.xml")


def _timed(options: Options, way: Way, folder: Path) -> Timed:
    (pixels,) = VideoSide(_frontend(options, "none")).example(options.batch, seed=0)
    with torch.no_grad():
        steps = {method: _step(options, way, method, folder, pixels) for method in METHODS}
        pooled = {method: step().float() for method, step in steps.items()}
        return Timed(paired_times(steps, options.repeats, torch.device("cpu")), pooled)


def _step(options: Options, way: Way, method: str, folder: Path, pixels: Tensor) -> Callable[[], Tensor]:
    """What encodes the pixels."""
    runtime, _, precision = way.partition("-")
    if runtime == "onnxruntime":
        return partial(_pooled, load_onnx(folder / f"{method}.onnx", options.threads), {"pixels": pixels.numpy()})
    if runtime == "openvino":
        loaded = load_openvino(folder / f"{method}.xml", options.threads, "bf16" if precision else "f32")
        return partial(_pooled, loaded, {"pixels": pixels.numpy()})
    dtype = torch.bfloat16 if precision else torch.float32
    frontend = _frontend(options, method).to(dtype)
    encode = torch.compile(frontend) if runtime == "compiled" else frontend
    return lambda: encode(pixels.to(dtype)).pooled


def _pooled(load: Callable[[Arrays], Arrays], inputs: Arrays) -> Tensor:
    return torch.from_numpy(load(inputs)["pooled"])


def _line(way: str, timed: Timed, torch_float32: Timed) -> dict[str, str]:
    none, tempme = (timed.seconds[method] for method in METHODS)
    found = sorted(own / base for own, base in zip(tempme, none, strict=True))
    low, high = (found[round(share * (len(found) - 1))] for share in (0.25, 0.75))
    line = {"": way} | {f"{method}, ms": f"{1e3 * statistics.median(timed.seconds[method]):.0f}" for method in METHODS}
    line["tempme / none"] = f"{statistics.median(found):.3f} ({low:.3f} to {high:.3f})"
    for method in METHODS:
        exact = torch_float32.pooled[method]
        line[f"{method}, off by"] = f"{((timed.pooled[method] - exact).abs().max() / exact.abs().max()).item():.1e}"
    return line


if __name__ == "__main__":
    run(Command("", Options, main))
