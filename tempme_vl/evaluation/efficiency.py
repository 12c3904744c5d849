"""What merging saves: costs and tokens computed from schedules beside the paper's, and times and memory measured.

The table needs no model. Measurements run each row in turn, so that whatever else the machine does meets all rows.
"""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from tempme_vl.backbones import split_name
from tempme_vl.backbones.base import TowerShape
from tempme_vl.backbones.open_clip import build_visual, model_config, visual_backbone
from tempme_vl.frontend import VisualFrontend, make_schedule
from tempme_vl.tasks.retrieval import create_retrieval_model, freeze_as_clip4clip, retrieval_loss

LAYERS = 12
BACKBONES = {
    "B/32": TowerShape(image_size=224, patch_size=32, width=768, heads=12, embed_dim=512, quick_gelu=True),
    "B/16": TowerShape(image_size=224, patch_size=16, width=768, heads=12, embed_dim=512, quick_gelu=True),
}
METHODS: dict[str, tuple[str, dict[str, Any]]] = {
    "none": ("none", {}),
    "tome": ("tome", {}),
    "tempme": ("tempme", {}),
    # clips are joined and nothing is merged: the paper's ablation of temporal modelling
    "temporal only": ("tempme", {"r": 0, "cross_percent": 0, "intra_percent": 0}),
}
# (backbone, frames, method) -> GFLOPs; TempMe (ICLR 2025), tables of MSRVTT retrieval, ablation and long videos
PAPER_GFLOPS = {
    ("B/32", 12, "none"): 53.0,
    ("B/32", 12, "tome"): 40.2,
    ("B/32", 12, "tempme"): 34.8,
    ("B/32", 12, "temporal only"): 54.3,
    ("B/16", 12, "none"): 211.3,
    ("B/16", 12, "tome"): 144.4,
    ("B/16", 12, "tempme"): 121.4,
    ("B/32", 64, "none"): 276.7,
    ("B/32", 64, "tome"): 208.5,
    ("B/32", 64, "tempme"): 180.3,
}
PAPER_TOKENS = {("B/32", 12, "tempme"): 97, ("B/16", 12, "tempme"): 127}
# joins of 64 frames are plausible, but were found in no text or code
UNVERIFIED = {(backbone, 64, method) for backbone in BACKBONES for method in ("tempme", "temporal only")}
NOTES = """\
GFLOPs are multiply-accumulates in 1e9, counted as the paper counts them (MergeSchedule.gflops).
* the paper's setting for 64 frames is unverified: clips joined 4-4-4 is a plausible guess.
The paper's 64-frame column is 2-4% lower by every way of counting; counting the patch embedding of only 12 frames
would explain it (unverified)."""


@dataclass(frozen=True)
class CostRow:
    """Cost of the visual tower for one video, computed; `paper_*` where the paper gives a number.

    `gflops` in 1e9 multiply-accumulates; `verified` is False where the paper's setting was guessed.
    """

    backbone: str
    frames: int
    method: str
    input_tokens: int
    output_tokens: int
    gflops: float
    paper_gflops: float | None
    paper_tokens: int | None
    verified: bool

    @property
    def deviation(self) -> float | None:
        """Percent by which `gflops` exceeds the paper's."""
        return None if self.paper_gflops is None else 100 * (self.gflops / self.paper_gflops - 1)


def cost_table(backbones: Sequence[str] = tuple(BACKBONES), frames: Sequence[int] = (12, 64)) -> list[CostRow]:
    """Rows of every method for the paper's settings, without running a model.

    Args:
        backbones: names in `BACKBONES`.
        frames: 12 or 64, the numbers that the paper has settings for.

    Raises:
        ValueError: another number of frames.
    """
    return [cost_row(backbone, count, method) for backbone in backbones for count in frames for method in METHODS]


def cost_row(backbone: str, frames: int, label: str) -> CostRow:
    """One row of `cost_table`; `label` is a name in `METHODS`."""
    shape, (method, options), key = BACKBONES[backbone], METHODS[label], (backbone, frames, label)
    schedule = make_schedule(method, LAYERS, frames, shape.tokens, **options)
    return CostRow(
        *key,
        input_tokens=frames * shape.tokens,
        output_tokens=schedule.output_tokens,
        gflops=schedule.gflops(shape.width, shape.heads, shape.mlp_ratio, shape.embed_dim, shape.image_size),
        paper_gflops=PAPER_GFLOPS.get(key),
        paper_tokens=PAPER_TOKENS.get(key),
        verified=key not in UNVERIFIED,
    )


def format_costs(rows: Sequence[CostRow]) -> str:
    """A plain-text table with a mark at unverified settings, and its notes."""
    lines = [
        {
            "backbone": row.backbone,
            "frames": str(row.frames),
            "method": row.method + ("" if row.verified else " *"),
            "tokens in": str(row.input_tokens),
            "out": str(row.output_tokens),
            "paper out": _shown(row.paper_tokens, "d"),
            "GFLOPs": f"{row.gflops:.2f}",
            "paper": _shown(row.paper_gflops, ".1f"),
            "deviation %": _shown(row.deviation, "+.2f"),
        }
        for row in rows
    ]
    return f"{_columns(lines)}\n\n{NOTES}"


@dataclass(frozen=True)
class Workload:
    """What is measured: the forward pass of the visual tower, or a step of full fine-tuning, on random input.

    Attributes:
        model: "open_clip:NAME" or "open_clip:tiny"; random weights.
        frames, batch: F frames of each of B videos.
        train: forward, backward and AdamW of the retrieval model with its text tower, input embeddings frozen as
            in CLIP4Clip; else the visual tower alone, without gradients.
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
        """The names that `build_step` knows; all are compared with the first."""
        return ("none", "tome", "tempme") if self.train else ("open_clip", "none", "tome", "tempme")


def build_step(work: Workload, row: str) -> Callable[[], object]:
    """A function that does the work once.

    Args:
        row: "open_clip" for its own visual tower on the frames as a batch of images, or a merging method.

    Raises:
        ValueError: see `tempme_vl.make_schedule` and `tempme_vl.backbones.open_clip.model_config`.
    """
    if work.train:
        return _train_step(work, row)
    tower = _visual_tower(work, row).to(work.device, work.dtype).eval()
    side = model_config(split_name(work.model)[1])["vision_cfg"]["image_size"]
    video = torch.randn(work.batch, work.frames, 3, side, side, device=work.device, dtype=work.dtype)
    frames = video.flatten(0, 1) if row == "open_clip" else video
    return torch.no_grad()(lambda: tower(frames))


def _visual_tower(work: Workload, row: str) -> nn.Module:
    visual = build_visual(model_config(split_name(work.model)[1]))
    if row == "open_clip":
        return visual
    backbone = visual_backbone(visual)
    options = work.options.get(row, {})
    return VisualFrontend(
        backbone, make_schedule(row, len(backbone.blocks), work.frames, backbone.shape.tokens, **options)
    )


def _train_step(work: Workload, row: str) -> Callable[[], object]:
    model = create_retrieval_model(work.model, None, row, work.frames, **work.options.get(row, {}))
    freeze_as_clip4clip(model)
    model.to(work.device).train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-7)
    words, side, number = min(32, model.text.context_length), model.frontend.shape.image_size, torch.arange(work.batch)
    batch = {
        "video": torch.randn(work.batch, work.frames, 3, side, side),
        "frame_mask": torch.ones(work.batch, work.frames),
        "text_ids": torch.randint(1, 1000, (work.batch, words)),
        "text_mask": torch.ones(work.batch, words, dtype=torch.int64),
        "video_id": number,
        "text_id": number,
        "valid": torch.ones_like(number),
    }
    batch = {name: tensor.to(work.device) for name, tensor in batch.items()}
    lower = work.dtype != torch.float32

    def step() -> None:
        optimizer.zero_grad()
        with torch.autocast(work.device.type, work.dtype, enabled=lower):
            features = model(batch)
        retrieval_loss(features, batch).backward()
        optimizer.step()

    return step


def paired_times(
    steps: Mapping[str, Callable[[], object]], repeats: int, device: torch.device
) -> dict[str, list[float]]:
    """Seconds of each step, taken in turn (A B C A B C ...) after one round that does not count."""
    times: dict[str, list[float]] = {name: [] for name in steps}
    for turn in range(1 + repeats):
        for name, step in steps.items():
            _synchronize(device)
            start = time.perf_counter()
            step()
            _synchronize(device)
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
    before = _memory(work.device)[0]
    step = build_step(work, row)
    gc.collect()
    _reset_peak(work.device)  # weights are converted while the model is built: that peak is not meant
    step()
    step()  # by now the optimiser has its state
    _synchronize(work.device)
    return Peak(_memory(work.device)[1], before)


def _memory(device: torch.device) -> tuple[int, int]:
    """Bytes in use now, and at the peak."""
    if device.type == "cuda":
        return torch.cuda.memory_allocated(device), torch.cuda.max_memory_allocated(device)
    # not getrusage: a new program inherits ru_maxrss from the process that started it
    status = Path("/proc/self/status")
    if not status.is_file():
        raise ValueError("the memory of a CPU run is read from /proc, which only Linux has")
    sizes = dict(line.split(":", 1) for line in status.read_text().splitlines())
    return int(sizes["VmRSS"].split()[0]) * 1024, int(sizes["VmHWM"].split()[0]) * 1024


def _reset_peak(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    else:
        Path("/proc/self/clear_refs").write_text("5")  # proc(5): sets VmHWM to the present size


@dataclass(frozen=True)
class MeasuredRow:
    """Medians of one row: seconds a step, and its time over that of the same turn's reference row."""

    name: str
    seconds: float
    ratio: float
    memory: Peak


def measured_rows(times: Mapping[str, Sequence[float]], memory: Mapping[str, Peak]) -> list[MeasuredRow]:
    """Medians; the first row is the reference of the paired ratios."""
    reference = next(iter(times.values()))
    return [
        MeasuredRow(
            name,
            statistics.median(row),
            statistics.median(own / base for own, base in zip(row, reference, strict=True)),
            memory[name],
        )
        for name, row in times.items()
    ]


def format_measured(rows: Sequence[MeasuredRow]) -> str:
    """A plain-text table; ratios are relative to the first row."""
    return _columns(
        [
            {
                "row": row.name,
                "ms a step": f"{1e3 * row.seconds:.1f}",
                f"time / {rows[0].name}": f"{row.ratio:.3f}",
                "peak MiB": f"{row.memory.peak / 2**20:.0f}",
                "of it before the model": f"{row.memory.before / 2**20:.0f}",
            }
            for row in rows
        ]
    )


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _shown(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


def _columns(lines: Sequence[Mapping[str, str]]) -> str:
    width = {name: max(len(name), *(len(line[name]) for line in lines)) for name in lines[0]}
    shown = [dict(zip(width, width, strict=True)), *lines]
    return "\n".join("  ".join(line[name].rjust(width[name]) for name in width) for line in shown)
