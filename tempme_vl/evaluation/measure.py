"""What merging saves, measured: times and peak memory of a forward pass or a training step, rows side by side.

Rows take turns, so that whatever else the machine does meets all of them.
"""

from __future__ import annotations

import gc
import platform
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tempme_vl.backbones.base import TowerShape
from tempme_vl.backbones.open_clip_blocks import visual_backbone
from tempme_vl.backbones.open_clip_models import build_visual, model_config
from tempme_vl.evaluation.share import merging_share
from tempme_vl.evaluation.ways import row_and_way
from tempme_vl.families import split_name
from tempme_vl.frontend import VisualFrontend, create_frontend
from tempme_vl.merging import METHODS, Encoder, has_setting
from tempme_vl.reports import format_columns
from tempme_vl.scheduling import schedule_for, tower_gflops
from tempme_vl.tasks.retrieval import create_retrieval_model

# how UMT's rows are measured: the method and the options of its tower
UMT_ROWS: dict[str, tuple[str, dict[str, Any]]] = {
    "joint": ("none", {"mode": "joint"}),
    "per_frame": ("none", {"mode": "per_frame"}),
    "per_frame+tempme": ("tempme", {"mode": "per_frame"}),
}
_WORDS = tuple(map(str, range(30522)))  # as many as BERT's vocabulary has


@dataclass(frozen=True)
class Workload:
    """What is measured: the forward pass of the visual tower, or a step of full fine-tuning, on random input.

    Attributes:
        model: "open_clip:NAME" or "umt:NAME"; random weights.
        frames, batch: F frames of each of B videos.
        train: forward, backward and AdamW of the retrieval model with its text tower; CLIP with input embeddings
            frozen as in CLIP4Clip, UMT whole, with its matching loss. Else the visual tower alone, without gradients.
        dtype: a forward pass has weights of this type; training has float32 weights and autocasts.
        options: schedule options by method, for shapes that the paper has no setting for.
    """

    model: str
    device: torch.device
    frames: int = 12
    batch: int = 1
    train: bool = False
    dtype: torch.dtype = torch.float32
    options: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)

    @property
    def rows(self) -> tuple[str, ...]:
        """The names that `build_steps` knows: of UMT's frames, or of open_clip's tower and merging methods."""
        if self.family == "umt":
            return tuple(UMT_ROWS)
        return tuple(METHODS) if self.train else ("open_clip", *METHODS)

    @property
    def usual(self) -> tuple[str, ...]:
        """Those that are measured where nobody says which."""
        return tuple(row for row in self.rows if row in ("open_clip", "none", "tome", "tempme", *UMT_ROWS))

    @property
    def settled(self) -> tuple[str, ...]:
        """Those whose paper, or whose options, say how much to merge."""
        if self.family == "umt":
            return self.rows
        layers, shape = open_clip_tower(self.model)
        encoder = Encoder(layers, self.frames, shape.tokens, shape.num_prefix)
        return tuple(
            row for row in self.rows if row == "open_clip" or has_setting(row, encoder, self.options.get(row, ()))
        )

    def gflops(self, row: str) -> float:
        """Cost of one video in the visual tower (`MergeSchedule.gflops`)."""
        method, options = self.arguments(row_and_way(row)[0])
        with torch.device("meta"):
            if self.family == "umt":
                return create_frontend(self.model, None, method, self.frames, **options).gflops()
        layers, shape = open_clip_tower(self.model)
        return tower_gflops(schedule_for(method, layers, shape, self.frames, **options), shape)

    def merges(self, row: str) -> bool:
        """Whether a row's forward pass merges tokens step by step, so that the steps can be timed: as it is, not
        compiled or recorded."""
        return not self.train and row in self.rows and self.arguments(row)[0] != "none"

    @property
    def image_size(self) -> int:
        """Pixels along a side of a frame."""
        if self.family != "umt":
            return open_clip_tower(self.model)[1].image_size
        with torch.device("meta"):
            return create_frontend(self.model, None, "none", self.frames).shape.image_size

    @property
    def family(self) -> str:
        """ "open_clip" or "umt"."""
        return split_name(self.model)[0]

    def arguments(self, row: str) -> tuple[str, dict[str, Any]]:
        """A row's merging method, and the options of its tower and schedule."""
        method, options = UMT_ROWS.get(row, ("none" if row == "open_clip" else row, {}))
        return method, {**options, **self.options.get(method, {})}


@cache
def open_clip_tower(model: str) -> tuple[int, TowerShape]:
    """Blocks and shape of the visual tower of "open_clip:NAME", without memory for its weights."""
    with torch.device("meta"):
        backbone = visual_backbone(build_visual(model_config(split_name(model)[1])))
    return len(backbone.blocks), backbone.shape


def build_steps(work: Workload, rows: Sequence[str]) -> dict[str, Callable[[], object]]:
    """Functions that do the work once, by row.

    Training rows share weights, gradients and the optimiser's state, so that they take the memory of one model.

    Args:
        rows: names of `work.rows`: "open_clip" for its own visual tower on the frames as a batch of images, a merging
            method, or UMT's frames joint and apart; each perhaps in a way of `tempme_vl.evaluation.ways`, as
            "tempme, compiled".

    Raises:
        ValueError: see `tempme_vl.create_frontend` and `tempme_vl.backbones.open_clip.model_config`.
    """
    return _train_steps(work, rows) if work.train else {row: tower_and_step(work, row)[1] for row in rows}


def tower_and_step(work: Workload, name: str) -> tuple[nn.Module, Callable[[], object], Tensor]:
    """A row's tower, its forward pass without gradients, and the input of that."""
    row, way = row_and_way(name)
    tower, side = _visual_tower(work, row)
    tower.to(work.device, work.dtype).eval()
    video = torch.randn(work.batch, work.frames, 3, side, side, device=work.device, dtype=work.dtype)
    frames = video.flatten(0, 1) if row == "open_clip" else video
    way.prepare(tower)
    return tower, way.around(torch.no_grad()(lambda: tower(frames))), frames


def share_of_merging(work: Workload, row: str) -> float:
    """How much of the forward pass of a row's tower is matching and merging (`merging_share`)."""
    tower, step, _ = tower_and_step(work, row)
    return merging_share(tower, step, work.device)


def _visual_tower(work: Workload, row: str) -> tuple[nn.Module, int]:
    """The tower, and the side of its images in pixels."""
    method, options = work.arguments(row)
    if work.family == "umt":
        frontend = create_frontend(work.model, None, method, work.frames, **options)
        return frontend, frontend.shape.image_size
    config = model_config(split_name(work.model)[1])
    visual, side = build_visual(config), config["vision_cfg"]["image_size"]
    if row == "open_clip":
        return visual, side
    backbone = visual_backbone(visual)
    schedule = schedule_for(method, len(backbone.blocks), backbone.shape, work.frames, **options)
    return VisualFrontend(backbone, schedule), side


def _train_steps(work: Workload, rows: Sequence[str]) -> dict[str, Callable[[], object]]:
    models: dict[str, nn.Module] = {}
    shared: dict[str, Any] = {}
    around = {}
    for name in rows:
        row, way = row_and_way(name)
        method, options = work.arguments(row)
        vocabulary = _WORDS if work.family == "umt" else None
        tuning = "full" if work.family == "umt" else "clip4clip"
        model = create_retrieval_model(work.model, None, method, work.frames, tuning, vocabulary=vocabulary, **options)
        model.to(work.device).train()
        model.load_state_dict(shared, strict=False, assign=True)  # not strict: only TempMe has clip positions
        shared = {**model.state_dict(keep_vars=True), **shared}
        models[name], around[name] = model, way.around
        way.prepare(model.frontend)
    trained = dict.fromkeys(p for model in models.values() for p in model.parameters() if p.requires_grad)
    optimizer = torch.optim.AdamW(list(trained), lr=1e-7, fused=True)  # as recipes do
    batch = _train_batch(work, model.frontend.shape.image_size)
    lower = work.dtype != torch.float32

    def step(model: Any) -> None:
        optimizer.zero_grad()
        with torch.autocast(work.device.type, work.dtype, enabled=lower):
            features = model(batch)
        model.loss(features, batch).backward()
        optimizer.step()

    return {name: around[name](partial(step, model)) for name, model in models.items()}


def _train_batch(work: Workload, side: int) -> dict[str, Tensor]:
    number = torch.arange(work.batch)
    batch = {
        "video": torch.randn(work.batch, work.frames, 3, side, side),
        "frame_mask": torch.ones(work.batch, work.frames),
        "text_ids": torch.randint(1, 1000, (work.batch, 32)),
        "text_mask": torch.ones(work.batch, 32, dtype=torch.int64),
        "video_id": number,
        "text_id": number,
        "valid": torch.ones_like(number),
    }
    return {name: tensor.to(work.device) for name, tensor in batch.items()}


def paired_times(
    steps: Mapping[str, Callable[[], object]], repeats: int, device: torch.device
) -> dict[str, list[float]]:
    """Seconds of each step, taken in turn (A B C A B C ...) after one round that does not count."""
    times: dict[str, list[float]] = {name: [] for name in steps}
    for turn in range(1 + repeats):
        for name, step in steps.items():
            synchronize(device)
            start = time.perf_counter()
            step()
            synchronize(device)
            if turn:
                times[name].append(time.perf_counter() - start)
    return times


@dataclass(frozen=True)
class Peak:
    """Memory in bytes at its highest, and before the model was built (Python and its libraries; 0 on a GPU)."""

    peak: int
    before: int


def peak_memory(work: Workload, row: str) -> Peak:
    """The most memory that two steps take, weights included. Call it in a fresh process: freed memory may stay there.

    On a GPU torch's max_memory_allocated; on a CPU the peak resident set size that Linux reports.

    Raises:
        ValueError: a CPU run without Linux's /proc.
    """
    before = memory_now(work.device)[0]
    step = build_steps(work, (row,))[row]
    gc.collect()
    reset_peak(work.device)  # weights are converted while the model is built: that peak is not meant
    step()
    step()  # by now the optimiser has its state
    synchronize(work.device)
    return Peak(memory_now(work.device)[1], before)


def memory_now(device: torch.device) -> tuple[int, int]:
    """Bytes in use now, and at the peak."""
    if device.type == "cuda":
        return torch.cuda.memory_allocated(device), torch.cuda.max_memory_allocated(device)
    # not getrusage: a new program inherits ru_maxrss from the process that started it
    status = Path("/proc/self/status")
    if not status.is_file():
        raise ValueError("the memory of a CPU run is read from /proc, which only Linux has")
    sizes = dict(line.split(":", 1) for line in status.read_text().splitlines())
    return int(sizes["VmRSS"].split()[0]) * 1024, int(sizes["VmHWM"].split()[0]) * 1024


def reset_peak(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    else:
        Path("/proc/self/clear_refs").write_text("5")  # proc(5): sets VmHWM to the present size


@dataclass(frozen=True)
class MeasuredRow:
    """Medians of one row: seconds a step, and its time over that of the same turn's reference row, beside what is
    computed: GFLOPs of one video in the visual tower. `memory` and `merging`, the share of the time that merging steps
    take, are None where they were not measured."""

    name: str
    seconds: float
    ratio: float
    gflops: float
    memory: Peak | None = None
    merging: float | None = None


def measured_rows(
    times: Mapping[str, Sequence[float]],
    gflops: Mapping[str, float],
    memory: Mapping[str, Peak],
    merging: Mapping[str, float] | None = None,
) -> list[MeasuredRow]:
    """Medians; the first row is the reference of the paired ratios."""
    reference = next(iter(times.values()))
    return [
        MeasuredRow(
            name,
            statistics.median(row),
            statistics.median(own / base for own, base in zip(row, reference, strict=True)),
            gflops[name],
            memory.get(name),
            (merging or {}).get(name),
        )
        for name, row in times.items()
    ]


def format_measured(rows: Sequence[MeasuredRow]) -> str:
    """A plain-text table; ratios are relative to the first row."""
    first, lines = rows[0], []
    for row in rows:
        line = {
            "row": row.name,
            "GFLOPs": f"{row.gflops:.4g}",
            f"GFLOPs / {first.name}": f"{row.gflops / first.gflops:.3f}",
            "ms a step": f"{1e3 * row.seconds:.1f}",
            f"time / {first.name}": f"{row.ratio:.3f}",
        }
        if row.memory is not None:
            line["peak MiB"] = f"{row.memory.peak / 2**20:.0f}"
            line["of it before the model"] = f"{row.memory.before / 2**20:.0f}"
        if any(other.merging is not None for other in rows):
            line["merging"] = "-" if row.merging is None else f"{row.merging:.3f}"
        lines.append(line)
    return format_columns(lines)


def synchronize(device: torch.device) -> None:
    """Waits for the work that a GPU has been given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def device_name(device: torch.device) -> str:
    """For a report: the GPU's name, or the CPU's architecture."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else f"cpu ({platform.machine()})"
