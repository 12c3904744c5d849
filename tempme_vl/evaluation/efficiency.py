"""What merging and tuning cost, computed: GFLOPs, tokens and weights beside the papers', and the cost of UMT's fusion.

No model is run; `tempme_vl.evaluation.measure` takes times and memory.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import torch

from tempme_vl.backbones.open_clip_blocks import visual_backbone
from tempme_vl.backbones.open_clip_models import build_clip, model_config
from tempme_vl.evaluation.papers import BACKBONES, LAYERS, RAP, Setting, Status, settings
from tempme_vl.frontend import VisualFrontend
from tempme_vl.merging import MergeSchedule, make_schedule, merge_layers
from tempme_vl.reports import format_columns
from tempme_vl.scheduling import tower_gflops
from tempme_vl.tasks.retrieval import RetrievalModel, create_retrieval_model
from tempme_vl.text import BertShape
from tempme_vl.text.clip import CLIPTextEncoder
from tempme_vl.tuning import Tuning

_CLIP = {"B/32": "ViT-B-32-quickgelu", "B/16": "ViT-B-16-quickgelu"}
_UMT = {"UMT B/16": "joint", "UMT4Clip B/16": "per_frame"}
_WORDS = tuple(map(str, range(30522)))  # as many as BERT's vocabulary has
_HERE = "as run here"


@dataclass(frozen=True)
class CostRow:
    """What a method and a tuning cost for one video in the visual tower, computed; `paper_*` as the paper has it.

    Attributes:
        method, tuning: names in `METHODS` and `TUNINGS`; `variant` tells rows of the same two apart.
        input_tokens: of the frames.
        tokens: of a video that leave the encoder, and the learnt ones beside them as papers count those.
        gflops: in 1e9 multiply-accumulates, as `tempme_vl.costs` counts; of a tuning, its authors' code ("as run here":
            this package's, where that computes less). None for a row that nobody can compute.
        trainable_params: of the retrieval model, both towers; None where no code says what trains.
        paper_params: in 1e6.
        status, note: see `Figure`.
    """

    method: str
    tuning: str
    variant: str
    backbone: str
    frames: int
    input_tokens: int
    tokens: int | None
    gflops: float | None
    trainable_params: int | None
    paper_gflops: float | None
    paper_tokens: int | None
    paper_params: float | None
    status: Status
    note: str

    @property
    def deviation(self) -> float | None:
        """Percent by which `gflops` exceeds the paper's."""
        if self.gflops is None or self.paper_gflops is None:
            return None
        return 100 * (self.gflops / self.paper_gflops - 1)


def cost_table() -> list[CostRow]:
    """All rows of `settings`, each that this package runs at less cost a second time, and RAP's."""
    rows = []
    for setting in settings():
        rows.append(cost_row(setting))
        here = replace(setting, here=True)
        if _gflops(here) != _gflops(setting):
            rows.append(cost_row(here))
    rap = Setting("B/16", figure=RAP)
    return [*rows, replace(cost_row(rap), tuning="rap", tokens=None, gflops=None, trainable_params=None)]


def cost_row(setting: Setting) -> CostRow:
    """One row of `cost_table`.

    Raises:
        ValueError: a method without a setting for the encoder, or options that it does not have.
    """
    tuning, figure, schedule = setting.tuning, setting.figure, _schedule(setting)
    learnt = 0 if setting.here else tuning.learnt_tokens(setting.frames)
    return CostRow(
        setting.method,
        tuning.name,
        ", ".join(filter(None, (setting.variant, _HERE if setting.here else ""))),
        setting.backbone,
        setting.frames,
        input_tokens=schedule.input_tokens,
        tokens=schedule.output_tokens + learnt,
        gflops=_gflops(setting),
        trainable_params=trainable(setting.backbone, setting.tuning, schedule),
        paper_gflops=None if setting.here else figure.gflops,
        paper_tokens=None if setting.here else figure.tokens,
        paper_params=figure.params,
        status="certain" if setting.here else figure.status,
        note="" if setting.here else figure.note,
    )


def _schedule(setting: Setting) -> MergeSchedule:
    shape = BACKBONES[setting.backbone]
    return make_schedule(
        setting.method, LAYERS, setting.frames, shape.tokens, shape.num_prefix, shape.joint, **setting.options
    )


def _gflops(setting: Setting) -> float:
    schedule, shape = _schedule(setting), BACKBONES[setting.backbone]
    return tower_gflops(schedule, shape) + setting.tuning.cost(schedule, shape, not setting.here) / 1e9


def trainable(backbone: str, tuning: Tuning, schedule: MergeSchedule) -> int | None:
    """Weights that train, of both towers and the logit scale: what the tuning's own code leaves to train of a model,
    counted without any memory for it, and what the method has learnt.

    Returns:
        None for a tuning that is its cost alone.
    """
    with torch.device("meta"):
        steps = merge_layers(schedule, BACKBONES[backbone].width)
    modules = [step for layer in steps for step in (layer.before_attention, layer.after_attention, layer.after_mlp)]
    learnt = sum(weight.numel() for step in modules for weight in step.parameters())
    tuned = _tuned(backbone, tuning, schedule.frames)
    return None if tuned is None else tuned + learnt


@cache
def _tuned(backbone: str, tuning: Tuning, frames: int) -> int | None:
    """Of a model without merging."""
    if not tuning.runs:
        return None
    with torch.device("meta"):
        if backbone in _UMT:
            model: Any = create_retrieval_model(
                "umt:b16", None, "none", frames, tuning, vocabulary=_WORDS, mode=_UMT[backbone]
            )
        else:
            clip, shape = build_clip(model_config(_CLIP[backbone])), BACKBONES[backbone]
            schedule = make_schedule("none", LAYERS, frames, shape.tokens, shape.num_prefix)
            model = RetrievalModel(VisualFrontend(visual_backbone(clip.visual), schedule), CLIPTextEncoder(clip), {})
            model.tune(tuning)
    return sum(weight.numel() for weight in model.parameters() if weight.requires_grad)


NOTES = """\
GFLOPs of the visual tower for one video are multiply-accumulates in 1e9, counted as TempMe's tables count them
(tempme_vl.costs), LoRA merged. Of a tuning, those of its authors' code; "as run here" is this package's, where that
computes less: prompts that a block drops again are keys and values of its attention and skip its MLP, and keys and
values are shared. Tokens are those of a video that leave the encoder, learnt ones that all frames share once.
certain: the setting is the paper's or its code's, and the cost agrees; fitted: the setting was chosen so that the cost
agrees; unverified: neither."""


def format_costs(rows: Sequence[CostRow]) -> str:
    """A plain-text table with numbered notes."""
    notes = list(dict.fromkeys(row.note for row in rows if row.note))
    lines = [
        {
            "backbone": row.backbone,
            "frames": str(row.frames),
            "method": row.method,
            "tuning": f"{row.tuning} ({row.variant})" if row.variant else row.tuning,
            "tokens": _shown(row.tokens, "d"),
            "paper's": _shown(row.paper_tokens, "d"),
            "GFLOPs": _shown(row.gflops, ".2f"),
            "the paper's": _shown(row.paper_gflops, ".1f"),
            "off by %": _shown(row.deviation, "+.2f"),
            "trainable": _shown(row.trainable_params, ",d"),
            "paper's, M": _shown(row.paper_params, ".2f"),
            "status": row.status,
            "note": str(1 + notes.index(row.note)) if row.note else "",
        }
        for row in rows
    ]
    numbered = [f"{number} {note}" for number, note in enumerate(notes, 1)]
    return "\n".join([format_columns(lines), "", NOTES, *numbered])


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
    variant: str
    tokens: int
    macs: int
    cached_macs: int

    @property
    def saved(self) -> float:
        """Percent that keys and values cached by video save, if a video has many captions."""
        return 100 * (1 - self.cached_macs / self.macs)


def fusion_table(rows: Sequence[CostRow]) -> list[FusionRow]:
    """The pairs' cost for the tokens of UMT's rows of `cost_table`, 32 words a caption."""
    return [
        FusionRow(
            row.backbone,
            row.method,
            row.variant,
            row.tokens,
            fusion_macs(row.tokens),
            fusion_macs(row.tokens, cached=True),
        )
        for row in rows
        if row.backbone.startswith("UMT") and row.tokens is not None
    ]


def format_fusion(rows: Sequence[FusionRow]) -> str:
    """A plain-text table of `fusion_table`."""
    lines = [
        {
            "backbone": row.backbone,
            "method": f"{row.method} ({row.variant})" if row.variant else row.method,
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
