"""Full fine-tuning of CLIP or UMT with TempMe, or of TESTA, for text-video retrieval.

A first try, on any machine (renders its own small data set; 2 minutes on 2 CPU cores):
    deepspeed recipes/full_ft_msrvtt.py

MSRVTT-1kA, ViT-B/16, on 8 A100 (not yet measured; the paper reports R-Sum 210.2 for this setting on 4 GPUs):
    deepspeed --num_gpus 8 recipes/full_ft_msrvtt.py --data-root /data/msrvtt \
        --model open_clip:ViT-B-16-quickgelu --pretrained openai --deepspeed-config recipes/ds/zero2.json

The same on two nodes (hostfile: one line "worker-1 slots=8" a node; the data under the same path on both):
    deepspeed --hostfile hosts --num_nodes 2 --num_gpus 8 recipes/full_ft_msrvtt.py --data-root /data/msrvtt ...

UMT B/16 with its frames apart (UMT4Clip) and TempMe, from a public UMT checkpoint (not yet measured; paper: 209.2):
    deepspeed --num_gpus 8 recipes/full_ft_msrvtt.py --data-root /data/msrvtt --model umt:b16 --mode per_frame \
        --pretrained b16_25m.pth --lr 1e-5 --warmup 0.1 --deepspeed-config recipes/ds/zero2.json

TESTA with 32 frames, from a public file of BLIP or TESTA (not yet measured):
    deepspeed --num_gpus 8 recipes/full_ft_msrvtt.py --dataset didemo --data-root /data/didemo --model testa:b16 \
        --pretrained TESTA_model_base_pretrain.pth --deepspeed-config recipes/ds/zero2.json

TempMe's own weights, or CLIP4Clip's, evaluated as they are; and a second stage on another data set:
    deepspeed recipes/full_ft_msrvtt.py --data-root /data/msrvtt --pretrained best.pth --epochs 0
    deepspeed recipes/full_ft_msrvtt.py --dataset didemo --data-root /data/didemo --pretrained runs/msrvtt-tempme/best

Your own videos (one JSON object a line: file, caption or captions, optional start, end, split):
    deepspeed recipes/full_ft_msrvtt.py --dataset jsonl --annotations videos.jsonl --video-root videos/
"""

from tempme_vl.command import run
from tempme_vl.recipes.options.retrieval import RETRIEVAL

if __name__ == "__main__":
    run(RETRIEVAL)  # the recipe: tempme_vl/recipes/retrieval.py; its loop: tempme_vl/recipes/loop.py
