"""What the papers' tables say: a figure for each row of method, tuning, tower and frames, and how sure its setting is.

TempMe (ICLR 2025), its tables of MSRVTT retrieval, speed, ablation, long videos and UMT, which also have the other
papers' methods. Costs and weights beside them are computed (`tempme_vl.evaluation.efficiency`).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from tempme_vl.backbones.base import TowerShape
from tempme_vl.merging import METHODS, Encoder, has_setting
from tempme_vl.tuning import TUNINGS, CLIP4Clip, Full, Lora, Tuning
from tempme_vl.tuning.adapter import Adapter
from tempme_vl.tuning.dgl import Dgl
from tempme_vl.tuning.dora import Dora
from tempme_vl.tuning.mv_adapter import MvAdapter
from tempme_vl.tuning.plevu import Plevu
from tempme_vl.tuning.prompt import Prompt
from tempme_vl.tuning.testa_clip import TestaClip
from tempme_vl.tuning.vop import Vop, VopFrameAndContext

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
Status = Literal["certain", "fitted", "unverified"]


@dataclass(frozen=True)
class Figure:
    """What a paper says of a row, None where it says nothing.

    Attributes:
        gflops: in 1e9, as `tempme_vl.costs` counts.
        tokens: of a video that leave the encoder, learnt ones included.
        params: weights that train, in 1e6.
        status: certain: the setting is the paper's or its code's, and the cost agrees; fitted: the setting was chosen
            so that the cost agrees; unverified: neither.
        note: what else there is to know.
    """

    gflops: float | None = None
    tokens: int | None = None
    params: float | None = None
    status: Status = "certain"
    note: str = ""


@dataclass(frozen=True)
class Setting:
    """What a row is of.

    Attributes:
        backbone: in `BACKBONES`.
        variant: what tells it from others of the same method and tuning.
        options: of the method, in place of its published ones.
        here: whether the tuning is counted as this package runs it, and not as its authors' code does.
    """

    backbone: str
    frames: int = 12
    method: str = "none"
    tuning: Tuning = field(default_factory=Lora)
    variant: str = ""
    options: Mapping[str, Any] = field(default_factory=dict)
    here: bool = False
    figure: Figure = Figure(status="unverified")


_FROM_COST = "GFLOPs without the setting: {} (docs/methods.md)"
_LONG = (
    "the paper's 64-frame column is 2-4% lower by every way of counting; counting the patch embedding of only 12 "
    "frames would explain it (unverified)"
)
_JOINED = f"clips joined 4-4-4 is a plausible guess; {_LONG}"
LONG = {"none", "tome", "tempme", "temporal_only"}  # those in the table with 64 frames
# methods with LoRA, as TempMe's tables have them; of other encoders that a method has a setting for, nothing is said
METHOD_FIGURES: dict[tuple[str, int, str], Figure] = {
    ("B/32", 12, "tome"): Figure(40.2, params=0.49),
    ("B/32", 12, "tempme"): Figure(34.8, 97, 0.50),
    ("B/32", 12, "temporal_only"): Figure(54.3, params=0.50),
    ("B/32", 12, "reduction_only"): Figure(34.7, None, 0.49, "fitted", _FROM_COST.format("one reading")),
    ("B/32", 12, "evit"): Figure(37.2, params=0.49),
    ("B/32", 12, "diffrate"): Figure(36.8, None, 0.49, "fitted", _FROM_COST.format("a fit, not unique")),
    ("B/32", 12, "sta"): Figure(35.7, None, 0.49, "fitted", _FROM_COST.format("a fit, not unique")),
    ("B/32", 12, "testa"): Figure(None, None, None, "fitted", _FROM_COST.format("a fit, not unique")),
    ("B/32", 12, "centerclip"): Figure(),
    ("B/16", 12, "tome"): Figure(144.4, 924, 0.49),
    ("B/16", 12, "tempme"): Figure(121.4, 127, 0.50),
    ("B/16", 12, "temporal_only"): Figure(),
    ("B/16", 12, "evit"): Figure(),
    ("B/16", 12, "diffrate"): Figure(138.5, 588, 0.49),
    ("B/16", 12, "centerclip"): Figure(),
    ("B/32", 64, "none"): Figure(276.7, None, None, "unverified", _LONG),
    ("B/32", 64, "tome"): Figure(208.5, None, None, "unverified", _LONG),
    ("B/32", 64, "tempme"): Figure(180.3, None, None, "unverified", _JOINED),
    ("B/32", 64, "temporal_only"): Figure(None, None, None, "unverified", _JOINED),
    ("B/16", 64, "none"): Figure(),
    ("B/16", 64, "tome"): Figure(),
    ("B/16", 64, "tempme"): Figure(None, None, None, "unverified", _JOINED),
    ("B/16", 64, "temporal_only"): Figure(None, None, None, "unverified", _JOINED),
}

_LAYOUT = "the number follows from weights and GFLOPs; where it stands in a block is in no public code"
_F_C = "its cost alone: no public code, and 14.10 M weights are more than its text gives"
_MV = "the paper says more than 210 GFLOPs; 32 frames and 64 words have 3,552,000 weights"
_TESTA = "attention over time in the blocks that merge frames: a fit, not unique"
# tunings without merging: what tells a row from others, and the figures of B/32 and B/16
_TUNINGS: tuple[tuple[Tuning, str, Figure, Figure], ...] = (
    (Full(), "", Figure(), Figure()),
    (CLIP4Clip(), "", Figure(53.0, None, 123.54), Figure(211.3)),
    (Lora(), "", Figure(53.0, None, 0.49), Figure(211.3, 2364, 0.49)),
    (Dora(), "", Figure(), Figure()),
    (
        Prompt(),
        "",
        Figure(58.2, None, 0.08, "fitted", _LAYOUT),
        Figure(216.8, 2369, 0.08, "fitted", _LAYOUT),
    ),
    (
        Adapter(),
        "",
        Figure(53.1, None, 0.26, "fitted", _LAYOUT),
        Figure(211.7, 2364, 0.26, "fitted", _LAYOUT),
    ),
    (Plevu(), "", Figure(params=6.35), Figure()),
    (Vop(), "basic", Figure(), Figure()),
    (Vop(4, 4, 0), "basic, 4 + 4 prompts", Figure(), Figure()),
    (
        VopFrameAndContext(),
        "F+C",
        Figure(58.0, None, 14.10, "fitted", _F_C),
        Figure(246.2, 2368, 14.10, "fitted", _F_C),
    ),
    (Dgl(), "linear", Figure(67.4, None, 0.83), Figure(251.2, 2416, 0.83)),
    (Dgl("transformer"), "transformer", Figure(), Figure()),
    (MvAdapter(), "", Figure(), Figure(None, None, 3.6, "certain", _MV)),
)
_UMT = (
    "the paper gives GFLOPs without the schedule: r 11, layers 7 8 9, 40/10 percent is a fit, not the paper's setting"
)
_OTHERS = (
    Setting("B/16", 12, "tome", CLIP4Clip(), figure=Figure(144.4)),
    Setting("B/16", 12, "tempme", CLIP4Clip(), figure=Figure(121.4)),
    Setting("B/32", 12, "testa", TestaClip(), figure=Figure(40.6, None, 0.59, "fitted", _TESTA)),
    Setting("UMT B/16", 12, "none", Full(), figure=Figure(304.3, note="all frames jointly")),
    Setting("UMT4Clip B/16", 12, "none", Full(), figure=Figure(210.1, note="each frame alone")),
    Setting("UMT4Clip B/16", 12, "tempme", Full(), figure=Figure(111.5, None, None, "fitted", _UMT)),
    Setting(
        "UMT4Clip B/16",
        12,
        "tempme",
        Full(),
        "as in CLIP",
        {"r": 10, "merge_layers": (8, 9, 10), "merge_frames": (2, 2, 3), "cross_percent": 40, "intra_percent": 20},
        figure=Figure(None, None, None, "unverified", "the setting of CLIP B/16, beside the one that is a fit"),
    ),
)
# a row of the table that nobody can compute
RAP = Figure(None, None, 1.06, "unverified", "RAP has no public code; the paper says more than 210 GFLOPs")


def settings() -> Iterator[Setting]:
    """All rows: the papers', and those of methods and tunings that other packages have added."""
    known = {TestaClip.name, *(tuning.name for tuning, *_ in _TUNINGS)}
    for number, backbone in enumerate(("B/32", "B/16")):
        shape = BACKBONES[backbone]
        for tuning, variant, *figures in _TUNINGS:
            yield Setting(backbone, 12, "none", tuning, variant, figure=figures[number])
        yield from (Setting(backbone, 12, "none", TUNINGS[name]()) for name in TUNINGS if name not in known)
        for frames, left_out in ((12, {"none"}), (64, METHODS.keys() - LONG)):
            encoder = Encoder(LAYERS, frames, shape.tokens, shape.num_prefix)
            for method in METHODS:
                if method not in left_out and has_setting(method, encoder, ()):
                    figure = METHOD_FIGURES.get((backbone, frames, method), Setting.figure)
                    yield Setting(backbone, frames, method, figure=figure)
        yield from (row for row in _OTHERS if row.backbone == backbone)
    yield from (row for row in _OTHERS if row.backbone.startswith("UMT"))
