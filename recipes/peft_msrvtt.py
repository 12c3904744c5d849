"""Parameter-efficient fine-tuning of CLIP with TempMe: the setting of the paper's main table (section 4).

LoRA of rank 8 on the queries, keys and values of all blocks, and the clip positions: 507,648 weights of ViT-B/32 train
(491,520 with --method none). Exports are plain weights, LoRA merged into them.

A first try, on any machine (adapts the demo's frame-wise model, which `make demo` trains, to joined clips):
    deepspeed recipes/peft_msrvtt.py --pretrained runs/demo/none-seed0/best --lr-new 1e-2

MSRVTT-1kA, ViT-B/32, on 8 A100 (not yet measured; the paper reports R@1 46.1 for this setting):
    deepspeed --num_gpus 8 recipes/peft_msrvtt.py --data-root /data/msrvtt
"""

from tempme_vl.command import run
from tempme_vl.recipes.options.retrieval import PEFT

if __name__ == "__main__":
    run(PEFT)  # the recipe: tempme_vl/recipes/retrieval.py; its loop: tempme_vl/recipes/loop.py
