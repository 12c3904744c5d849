"""What the defaults of a recipe become: on the embedded data set, from scratch, for UMT, and where little trains."""

from __future__ import annotations

from pathlib import Path
from typing import Any

DEEPSPEED = Path(__file__).resolve().parents[2] / "recipes" / "ds"  # DeepSpeed's files
MOTION_ROOT = Path("runs/motion-data")

# What differs from a recipe's defaults. The data set that we rendered ourselves needs no guard around its decoder.
MOTION: dict[str, Any] = {
    "data_root": MOTION_ROOT,
    "frame_cache": str(MOTION_ROOT / "frames"),
    "decode_timeout": None,
    "max_words": 12,
}
FROM_SCRATCH: dict[str, Any] = {
    "model": "open_clip:tiny",
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
UMT: dict[str, Any] = {  # what UMT's published settings share, for 8 GPUs
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
PEFT: dict[str, Any] = {  # the paper's main table
    "tuning": "lora",
    "lr_new": 6e-4,
    "optimizer": "adamw_tempme",
    "schedule": "cosine_from_zero",
    "decay": "all",
    "beta2": 0.999,
    "weight_decay": 0.2,
    "epochs": 5,
}
