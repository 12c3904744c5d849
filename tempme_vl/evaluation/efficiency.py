"""What merging saves, computed: costs and tokens of schedules beside the paper's, and the cost of UMT's fusion.

No model is needed; `tempme_vl.evaluation.measure` takes times and memory.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from tempme_vl.backbones.base import TowerShape
from tempme_vl.merging import METHODS, Encoder, has_setting, make_schedule
from tempme_vl.reports import format_columns
from tempme_vl.scheduling import tower_gflops
from tempme_vl.text import BertShape

LAYERS = 12
BACKBONES = {
    "B/32": TowerShape(image_size=224, patch_size=32, width=768, heads=12, embed_dim=512, quick_gelu=True),
    "B/16": TowerShape(image_size=224, patch_size=16, width=768, heads=12, embed_dim=512, quick_gelu=True),
    "UMT B/16": TowerShape(
        image_size=224, patch_size=16, width=768, heads=12, embed_dim=512, norm_pre=False, num_prefix=0, joint=True
    ),
    "UMT4Clip B/16": TowerShape(
        image_size=224, patch_size=16, width=768, heads=12, embed_dim=512, norm_pre=False, num_prefix=0
    ),
}
# labels that are no methods: the method, and its options
LABELS: dict[str, tuple[str, dict[str, Any]]] = {
    "tempme as in CLIP": (
        "tempme",
        {"r": 10, "merge_layers": (8, 9, 10), "merge_frames": (2, 2, 3), "cross_percent": 40, "intra_percent": 20},
    ),
}
_LONG = ("none", "tome", "tempme", "temporal_only")  # in the paper at 64 frames
# GFLOPs; TempMe (ICLR 2025), tables of MSRVTT retrieval, ablation, long videos and UMT
PAPER_GFLOPS = {
    ("B/32", 12, "none"): 53.0,
    ("B/32", 12, "tome"): 40.2,
    ("B/32", 12, "tempme"): 34.8,
    ("B/32", 12, "temporal_only"): 54.3,
    ("B/32", 12, "reduction_only"): 34.7,
    ("B/32", 12, "evit"): 37.2,
    ("B/32", 12, "diffrate"): 36.8,
    ("B/16", 12, "diffrate"): 138.5,
    ("B/32", 12, "sta"): 35.7,
    ("B/16", 12, "none"): 211.3,
    ("B/16", 12, "tome"): 144.4,
    ("B/16", 12, "tempme"): 121.4,
    ("B/32", 64, "none"): 276.7,
    ("B/32", 64, "tome"): 208.5,
    ("B/32", 64, "tempme"): 180.3,
    ("UMT B/16", 12, "none"): 304.3,
    ("UMT4Clip B/16", 12, "none"): 210.1,
    ("UMT4Clip B/16", 12, "tempme"): 111.5,
}
PAPER_TOKENS = {("B/32", 12, "tempme"): 97, ("B/16", 12, "tempme"): 127}
# settings that were found in no text or code, by the mark that `NOTES` explains
UNVERIFIED = {
    **{("B/32", 12, method): "f" for method in ("reduction_only", "diffrate", "sta", "testa")},
    **{(backbone, 64, method): "*" for backbone in ("B/32", "B/16") for method in ("tempme", "temporal_only")},
    **{("UMT4Clip B/16", 12, method): "+" for method in ("tempme", "tempme as in CLIP")},
}
NOTES = """\
GFLOPs are multiply-accumulates in 1e9, counted as the paper counts them (MergeSchedule.gflops).
f the paper gives GFLOPs without the setting, which is a fit or one reading (docs/methods.md).
* the paper's setting for 64 frames is unverified: clips joined 4-4-4 is a plausible guess.
The paper's 64-frame column is 2-4% lower by every way of counting; counting the patch embedding of only 12 frames
would explain it (unverified).
+ the paper gives UMT4Clip's GFLOPs without the schedule: r 11, layers 7 8 9, 40/10 percent is a fit, not the paper's
setting; beside it the setting of CLIP B/16 (r 10, layers 8 9 10, 40/20 percent).
UMT B/16 sees all frames jointly, UMT4Clip each frame alone."""


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


def settings() -> Iterator[tuple[str, int, str]]:
    """(backbone, frames, method or label) of every row: of CLIP all methods that have a setting for it."""
    for backbone in ("B/32", "B/16"):
        shape = BACKBONES[backbone]
        encoder = Encoder(LAYERS, 12, shape.tokens, shape.num_prefix)
        yield from ((backbone, 12, method) for method in METHODS if has_setting(method, encoder, ()))
        yield from ((backbone, 64, method) for method in _LONG)
    yield "UMT B/16", 12, "none"
    yield from (("UMT4Clip B/16", 12, method) for method in ("none", "tempme", "tempme as in CLIP"))


def cost_table() -> list[CostRow]:
    """Rows of all `settings`, without running a model."""
    return [cost_row(*setting) for setting in settings()]


def cost_row(backbone: str, frames: int, label: str, **options: Any) -> CostRow:
    """One row of `cost_table`.

    Args:
        backbone: a name in `BACKBONES`.
        frames: that the method has a setting for, if it gets no options.
        label: a name in `tempme_vl.METHODS` or `LABELS`.
        options: of the method, in place of its own.
    """
    method, usual = LABELS.get(label, (label, {}))
    shape, options, key = BACKBONES[backbone], {**usual, **options}, (backbone, frames, label)
    schedule = make_schedule(method, LAYERS, frames, shape.tokens, shape.num_prefix, shape.joint, **options)
    return CostRow(
        *key,
        input_tokens=frames * shape.tokens,
        output_tokens=schedule.output_tokens,
        gflops=tower_gflops(schedule, shape),
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
            "method": f"{row.method} {UNVERIFIED.get((row.backbone, row.frames, row.method), '')}".rstrip(),
            "tokens in": str(row.input_tokens),
            "out": str(row.output_tokens),
            "paper out": _shown(row.paper_tokens, "d"),
            "GFLOPs": f"{row.gflops:.2f}",
            "paper": _shown(row.paper_gflops, ".1f"),
            "deviation %": _shown(row.deviation, "+.2f"),
        }
        for row in rows
    ]
    return f"{format_columns(lines)}\n\n{NOTES}"


def fusion_macs(tokens: int, words: int = 32, shape: BertShape | None = None, cached: bool = False) -> int:
    """Multiply-accumulates of UMT's fusion layers for one pair of a video and a caption.

    Counted: linear layers (queries, keys, values and outputs of self- and cross-attention, MLP) and the products of
    attention (scores, weighted values). Left out: biases, norms, softmax, GELU and the matching head. The text layers
    below run once a caption, not once a pair.

    Args:
        tokens: M, of the video.
        words: L, padding included.
        shape: default BERT-base as in UMT-B: fusion layers 9 to 11.
        cached: the video's keys and values are at hand (`BertFusion.keys_values`), as for all its captions but one.
    """
    shape = shape or BertShape.named("bert-base")
    width = shape.width
    text = words * (4 * width**2 + 2 * width * shape.mlp_width) + 2 * words**2 * width
    cross = 2 * words * width**2 + 2 * words * tokens * width
    keys_values = 0 if cached else 2 * tokens * shape.cross_width * width
    return (shape.layers - shape.fusion_layer) * (text + cross + keys_values)


@dataclass(frozen=True)
class FusionRow:
    """Cost of re-ranking one pair: multiply-accumulates in all, and without the video's keys and values."""

    backbone: str
    method: str
    tokens: int
    macs: int
    cached_macs: int

    @property
    def saved(self) -> float:
        """Percent that keys and values cached by video save, if a video has many captions."""
        return 100 * (1 - self.cached_macs / self.macs)


def fusion_table() -> list[FusionRow]:
    """The pairs' cost for the tokens of UMT's rows of `cost_table`, 32 words a caption."""
    return [
        FusionRow(
            row.backbone,
            row.method,
            row.output_tokens,
            fusion_macs(row.output_tokens),
            fusion_macs(row.output_tokens, cached=True),
        )
        for row in cost_table()
        if row.backbone.startswith("UMT")
    ]


def format_fusion(rows: Sequence[FusionRow]) -> str:
    """A plain-text table of `fusion_table`."""
    lines = [
        {
            "backbone": row.backbone,
            "method": row.method,
            "tokens": str(row.tokens),
            "GMAC a pair": f"{row.macs / 1e9:.2f}",
            "keys cached": f"{row.cached_macs / 1e9:.2f}",
            "saved %": f"{row.saved:.0f}",
        }
        for row in rows
    ]
    return (
        "Fusion of one video with one caption of 32 words: linear layers and attention products (fusion_macs), with\n"
        f"the video's keys and values computed for the pair, or cached by video.\n{format_columns(lines)}"
    )


def _shown(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)
