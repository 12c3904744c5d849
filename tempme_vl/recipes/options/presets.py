"""What the defaults of a recipe become: one row a recipe and model, and what the record of the data set
changes of it.

Options that a row does not name have the defaults of the recipe's dataclass. ANY is the row of all other models.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields
from typing import Any

from tempme_vl.command_line import first_look
from tempme_vl.registries import DATASETS

ANY = "any"
SETTING = ("r", "merge_layers", "merge_frames", "cross_percent", "intra_percent")  # what a budget chooses

_SCRATCH: dict[str, Any] = {  # tiny towers with random weights, in minutes
    "pretrained": "none",
    "num_frames": 8,
    "r": 1,
    "merge_layers": (2, 3, 4),
    "merge_frames": (2, 2, 2),
    "cross_percent": 30,
    "intra_percent": 10,
    "clip_position_std": 0.5,
    "epochs": 5,
    "batch_size": 48,
    "lr": 1e-3,
    "lr_new": 1e-3,
    "weight_decay": 0.05,
    "augment": "none",
    "sampling": "uniform",
    "frame_cache": "memory",
    "workers": 0,
}
_UMT: dict[str, Any] = {  # what UMT's published settings share, for 8 GPUs
    "pretrained": "none",
    "vocabulary": "bert-base-uncased",
    "batch_size": 256,
    "lr": 2e-5,
    "lr_new": 1e-4,  # ours: UMT has no clip positions
    "lr_floor": 0.01,
    "weight_decay": 0.02,
    "beta2": 0.999,
    "clip_grad": 0.0,
    "augment": "crop_flip",
    "sampling": "segment",
    "grad_checkpointing": True,
}
_PEFT: dict[str, Any] = {  # the paper's main table, whatever the model
    "tuning": "lora",
    "lr_new": 6e-4,
    "optimizer": "adamw_tempme",
    "schedule": "cosine_from_zero",
    "decay": "all",
    "beta2": 0.999,
    "weight_decay": 0.2,
    "epochs": 5,
}
_HOST: dict[str, Any] = {  # the rates of LLaVA's projector and of its LoRA
    "num_frames": 8,
    "epochs": 1,
    "lr": 2e-5,
    "lr_new": 2e-4,
    "warmup": 0.03,
    "weight_decay": 0.0,
    "beta2": 0.999,
    "augment": "none",
    "sampling": "uniform",
}
_TINY_HOST: dict[str, Any] = {
    **{name: value for name, value in _SCRATCH.items() if name != "pretrained"},
    "train_frontend": True,
    "image_size": 32,
    "eval_batch_size": 64,
    "answer_tokens": 8,
    "epochs": 3,
    "lr_new": 4e-3,
}
_RETRIEVAL: dict[str, dict[str, Any]] = {
    ANY: {"tuning": "clip4clip"},  # with the defaults, CLIP4Clip's published full fine-tuning
    "open_clip:tiny": _SCRATCH,
    "umt:tiny": _SCRATCH,
    "umt:b16": {**_UMT, "epochs": 10, "warmup": 0.0},
    "umt:l16": {**_UMT, "epochs": 7, "warmup": 1 / 7, "vocabulary": "bert-large-uncased"},
}
PRESETS: dict[str, dict[str, dict[str, Any]]] = {
    "retrieval": _RETRIEVAL,
    "peft": {model: {**row, **_PEFT} for model, row in _RETRIEVAL.items()},
    "videoqa": {
        ANY: {
            "vocabulary": "bert-base-uncased",
            "text_pretrained": "bert-base-uncased",
            "lr": 2e-5,
            "num_frames": 12,
            "epochs": 8,
        },
        "open_clip:tiny": _SCRATCH,
        "umt:tiny": _SCRATCH,
        "umt:b16": {**_UMT, "num_frames": 12, "epochs": 8, "head": "decoder", "warmup": 1 / 8},
        "umt:l16": {
            **_UMT,
            "num_frames": 12,
            "epochs": 8,
            "head": "decoder",
            "warmup": 1 / 8,
            "vocabulary": "bert-large-uncased",
        },
    },
    "videollm": {
        ANY: _HOST,
        "tiny:VideoLlava": _TINY_HOST,
        "tiny:Qwen2_5_VL": {**_TINY_HOST, "r": None, "merge_layers": None, "merge_frames": (2, 2)},
    },
}


def preset(recipe: str, options: type[Any], model: str, dataset: str, arguments: Sequence[str]) -> dict[str, Any]:
    """The defaults of a model and a data set; of merging none where the command line has a limit for it.

    Args:
        options: the recipe's dataclass.
    """
    rows, record = PRESETS[recipe], DATASETS[dataset]
    found = {**rows.get(model, rows[ANY]), "data_root": record.root, **record.options}
    limits = first_look(arguments, ("budget", "tokens"))
    dropped = () if limits.budget is None and limits.tokens is None else SETTING
    known = {field.name for field in fields(options)} - {*dropped}
    return {name: value for name, value in found.items() if name in known}
