"""Parameter-efficient fine-tuning of CLIP with TempMe: the setting of the paper's main table (section 4).

LoRA of rank 8 on the queries, keys and values of all blocks, and the clip positions: 507,648 weights of ViT-B/32 train
(491,520 with --method none). Exports are plain weights, LoRA merged into them. The loop is that of full_ft_msrvtt.py.

A first try, on any machine (adapts the demo's frame-wise model, which `make demo` trains, to joined clips):
    deepspeed recipes/peft_msrvtt.py --pretrained runs/motion-none/best

MSRVTT-1kA, ViT-B/32, on 8 A100 (not yet measured; the paper reports R@1 46.1 for this setting):
    deepspeed --num_gpus 8 recipes/peft_msrvtt.py --data-root /data/msrvtt
"""

from __future__ import annotations

from functools import partial
from typing import Any

from full_ft_msrvtt import main
from full_ft_msrvtt import parse as parse_retrieval

from tempme_vl.command import run

PAPER: dict[str, Any] = {
    "tuning": "lora",
    "lr_new": 6e-4,
    "optimizer": "adamw_tempme",
    "schedule": "cosine_from_zero",
    "decay": "all",
    "beta2": 0.999,
    "weight_decay": 0.2,
    "epochs": 5,
}

parse = partial(parse_retrieval, recipe=PAPER, suffix="-lora")

if __name__ == "__main__":
    run(main, parse)
