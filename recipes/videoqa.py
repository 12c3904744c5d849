"""Question answering about videos with TempMe: a classifier, a decoder or a language model on the merged tokens.

A first try, on any machine (renders its own small data set; 8 minutes on 2 CPU cores):
    deepspeed --num_accelerators 2 recipes/videoqa.py

MSRVTT-QA as UMT has it, B/16 with its frames apart and TempMe, on 8 A100 (not yet measured; the paper reports 44.6):
    deepspeed --num_gpus 8 recipes/videoqa.py --data-root /data/msrvtt --model umt:b16 --head decoder \
        --pretrained b16_25m.pth --deepspeed-config recipes/ds/zero2.json

ActivityNet-QA as TESTA has it, 32 frames (not yet measured):
    deepspeed --num_gpus 8 recipes/videoqa.py --dataset activitynet_qa --data-root /data/activitynet --model testa:b16 \
        --pretrained TESTA_model_base_pretrain.pth --deepspeed-config recipes/ds/zero2.json

A classifier over the 1,500 most frequent training answers on CLIP (not yet measured):
    deepspeed --num_gpus 8 recipes/videoqa.py --data-root /data/msrvtt --model open_clip:ViT-B-16-quickgelu \
        --pretrained openai --head classifier

A language model of transformers that reads the merged tokens, with LoRA (not yet measured):
    deepspeed --num_gpus 8 recipes/videoqa.py --data-root /data/msrvtt --model open_clip:ViT-B-16-quickgelu \
        --pretrained openai --head llm --llm /models/llama --lora-rank 16 --deepspeed-config recipes/ds/zero2.json

Your own questions (one JSON object a line: file, question, answer or answers, optional options, start, end, split):
    deepspeed recipes/videoqa.py --dataset jsonl --annotations questions.jsonl --video-root videos/
"""

from tempme_vl.command import run
from tempme_vl.recipes.options.videoqa import VIDEOQA

if __name__ == "__main__":
    run(VIDEOQA)  # the recipe: tempme_vl/recipes/videoqa.py; its loop: tempme_vl/recipes/loop.py
