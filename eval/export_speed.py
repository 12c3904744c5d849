"""Time of a tower without and with merging: in torch, compiled, in onnxruntime and in OpenVINO; random weights.

python eval/export_speed.py --model open_clip:ViT-B-32-quickgelu --threads 1 --repeats 9
"""

from __future__ import annotations

import statistics
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

from tempme_vl import create_frontend
from tempme_vl.command import at_least, run
from tempme_vl.command_line import Command
from tempme_vl.evaluation.measure import paired_times
from tempme_vl.export.onnx import load_onnx, to_onnx, write_onnx
from tempme_vl.export.openvino import load_openvino, write_openvino
from tempme_vl.export.sides import VideoSide
from tempme_vl.reports import format_columns, show


@dataclass(frozen=True)
class Options:
    """Time a tower's forward pass with `tempme` over that with `none`, beside the ratio of their GFLOPs."""

    model: str = "open_clip:ViT-B-32-quickgelu"
    frames: int = 12
    batch: int = 1
    threads: int = 1
    repeats: int = 9
    compile: bool = False
    """Also torch.compile."""


def main(options: Options) -> None:
    at_least(1, frames=options.frames, batch=options.batch, threads=options.threads, repeats=options.repeats)
    torch.set_num_threads(options.threads)
    steps: dict[str, Callable[[], object]] = {}
    gflops = {}
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        for method in ("none", "tempme"):
            frontend = create_frontend(options.model, method=method, num_frames=options.frames).eval()
            side, gflops[method] = VideoSide(frontend).eval(), frontend.gflops()
            (pixels,) = side.example(options.batch, seed=0)
            file, inputs = Path(folder) / f"{method}.onnx", {"pixels": pixels.numpy()}
            with torch.inference_mode(False):
                graph = to_onnx(side, options.batch)
            write_onnx(graph, "{}", file)
            write_openvino(graph, "{}", file.with_suffix(".xml"))
            steps[f"torch, {method}"] = partial(frontend, pixels)
            if options.compile:
                steps[f"torch.compile, {method}"] = partial(torch.compile(frontend), pixels)
            steps[f"onnxruntime, {method}"] = partial(load_onnx(file, options.threads), inputs)
            steps[f"OpenVINO, {method}"] = partial(load_openvino(file.with_suffix(".xml"), options.threads), inputs)
        times = paired_times(steps, options.repeats, torch.device("cpu"))

    def ratio(name: str, other: str) -> str:
        found = sorted(own / base for own, base in zip(times[name], times[other], strict=True))
        low, high = (found[round(share * (len(found) - 1))] for share in (0.25, 0.75))
        return f"{statistics.median(found):.2f} ({low:.2f} to {high:.2f})"

    lines = [
        {
            "": name,
            "time / torch, none": ratio(name, "torch, none"),
            "/ none": ratio(name, f"{name.split(',')[0]}, none"),
        }
        for name in times
    ]
    show(f"GFLOPs, tempme / none: {gflops['tempme'] / gflops['none']:.3f}\n{format_columns(lines)}")


if __name__ == "__main__":
    run(Command("", Options, main))
