"""What the defaults of a recipe become: one row a recipe and model, what the papers of a chosen tuning and head train
with, and what the record of the data set changes of it.

Options that nothing names have the defaults of the recipe's dataclass. ANY is the row of all other models; a model that
has one of its own keeps it, whatever papers say of CLIP.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from tempme_vl.command_line import first_look, named_value
from tempme_vl.registries import DATASETS, HEADS, TUNINGS
from tempme_vl.tuning import Lora, find_tuning

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
_TINY_TESTA: dict[str, Any] = {
    **{name: value for name, value in _SCRATCH.items() if name not in (*SETTING, "clip_position_std")},
    "method": "testa",
}
_MINI_TESTA: dict[str, Any] = {  # 32 frames, in two minutes of a core
    **_TINY_TESTA,
    "epochs": 6,
    "batch_size": 24,
    "lr": 2e-3,
    "lr_new": 2e-3,
    # a copy that lags by hundreds of steps has learnt nothing when such a run ends
    "contrast_options": ("queue=24", "momentum=0.98", "distill=0"),
    "precision": "fp32",
}
_TESTA: dict[str, Any] = {  # what the configurations of 32 frames in TESTA's code share, for 8 GPUs
    "pretrained": "none",
    "method": "testa",
    "vocabulary": "bert-base-uncased",
    "num_frames": 32,
    "epochs": 10,  # on ActivityNet 20 for retrieval
    "batch_size": 32,
    "weight_decay": 0.05,
    "decay": "all",
    "beta2": 0.999,
    "warmup": 0.0,
    "clip_grad": 0.0,
    "augment": "none",
    "sampling": "uniform",
    "grad_checkpointing": True,  # ours, for memory
}
_PEFT: dict[str, Any] = {"tuning": "lora", **Lora().published()}  # the paper's main table, whatever the model
_WHOLE: dict[str, Any] = {"deepspeed_config": Path("zero0"), "precision": "fp32"}  # what BertAdam needs
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
    # momentum copies need float32 weights, which TESTA's mixed precision keeps
    "testa:tiny": {**_TINY_TESTA, "contrast_options": ("queue=48",), "precision": "fp32"},
    "testa:mini": _MINI_TESTA,
    "testa:b16": {**_TESTA, "lr": 1e-5, "lr_new": 1e-5, "precision": "fp32"},
}
_PRETRAINING: dict[str, Any] = {"method": "none", "temporal_scaling": True, "precision": "fp32"}
PRESETS: dict[str, dict[str, dict[str, Any]]] = {
    "retrieval": _RETRIEVAL,
    "pretraining": {
        ANY: {},
        "testa:tiny": {
            **_TINY_TESTA,
            **_PRETRAINING,
            "contrast_options": ("queue=48",),
            "epochs": 2,
            "max_words": 12,
            "warmup_steps": 20,
        },
        "testa:b16": {  # of 8 GPUs with 12 pairs each
            **_TESTA,
            **_PRETRAINING,
            "contrast_options": ("queue=57600",),
            "num_frames": 8,
            "epochs": 20,
            "batch_size": 96,
            "lr": 5e-6,
            "lr_new": 5e-6,
            "schedule": "by_epoch",
            "warmup_steps": 5000,
            "lr_floor": 0.1,
            "augment": "crop_augment",
            "sampling": "headtail",
        },
    },
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
        "testa:tiny": _TINY_TESTA,
        "testa:mini": _MINI_TESTA,
        "testa:b16": {**_TESTA, "lr": 2e-5, "lr_new": 2e-5, "head": "decoder", "max_words": 35, "answer_words": 10},
    },
    "videollm": {
        ANY: _HOST,
        "tiny:VideoLlava": _TINY_HOST,
        "tiny:Qwen2_5_VL": {**_TINY_HOST, "r": None, "merge_layers": None, "merge_frames": (2, 2)},
    },
}


def preset(recipe: str, options: type[Any], model: str, dataset: str, arguments: Sequence[str]) -> dict[str, Any]:
    """The defaults of a model, a tuning, a head and a data set; of merging none where the command line has a limit for
    it, or says where it is to be.

    Args:
        options: the recipe's dataclass.
    """
    rows, record = PRESETS[recipe], DATASETS[dataset]
    row = rows[model] if model in rows else {**rows[ANY], **_papers(recipe, arguments)}
    found = {**row, "data_root": record.root, **record.options}
    given = first_look(arguments, ("budget", "tokens", "where"))
    of_row = given.budget is None and given.tokens is None and given.where in (None, "auto")
    dropped = () if of_row else SETTING
    known = {field.name for field in fields(options)} - {*dropped}
    return {name: value for name, value in found.items() if name in known}


def _papers(recipe: str, arguments: Sequence[str]) -> dict[str, Any]:
    """What the papers of the tuning and of the head that a command line names have trained retrieval with. The recipe
    "peft" keeps to its own tuning with any head."""
    if recipe not in ("retrieval", "peft"):
        return {}
    given = first_look(arguments, ("tuning", "freeze", "head"), ("tuning-options",))
    found: dict[str, Any] = {}
    if given.head in HEADS and recipe == "retrieval":
        found |= HEADS[given.head].published
    name = given.tuning or given.freeze
    if name in TUNINGS:  # what is wrong with its options is said when all are read
        own = dict(named_value(option) for option in given.tuning_options if "=" in option)
        try:
            found |= find_tuning(name, own).published()
        except ValueError:
            found |= find_tuning(name).published()
    return {**found, **(_WHOLE if found.get("optimizer") == "bertadam" else {})}
