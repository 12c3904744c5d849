"""A video-language model of transformers that reads few tokens of a video, fine-tuned to answer questions: LoRA on the
language model, its projector always trained as in LLaVA, the tower and TempMe's clip positions trained or frozen.

A first try, on any machine (a tiny random Video-LLaVA on a small data set that it renders itself):
    deepspeed --num_accelerators 2 recipes/videollm_lora.py

Video-LLaVA-7B with TempMe on MSRVTT-QA, on 8 A100 (not yet measured; the schedule is an example, no paper has one):
    deepspeed --num_gpus 8 recipes/videollm_lora.py --data-root /data/msrvtt --host LanguageBind/Video-LLaVA-7B-hf \
        --r 8 --merge-layers 16 18 20 --merge-frames 2 2 2 --cross-percent 30 --intra-percent 10 \
        --train-frontend --frame-cache /data/frames --grad-checkpointing --deepspeed-config recipes/ds/zero2.json

Qwen2.5-VL, which merges behind its tower (not yet measured):
    deepspeed --num_gpus 8 recipes/videollm_lora.py --data-root /data/msrvtt --host Qwen/Qwen2.5-VL-7B-Instruct \
        --merge-frames 2 2 --frame-cache /data/frames --grad-checkpointing --deepspeed-config recipes/ds/zero2.json

Your own questions (one JSON object a line: file, question, answer or answers, optional options, start, end, split):
    deepspeed recipes/videollm_lora.py --dataset jsonl --annotations questions.jsonl --video-root videos/ \
        --host tiny:Qwen2_5_VL

What was trained is in OUTPUT/best: tempme_vl.tasks.videollm.load_video_llm("OUTPUT/best") reads it.
"""

from tempme_vl.command import run
from tempme_vl.recipes.options.videollm import VIDEOLLM

if __name__ == "__main__":
    run(VIDEOLLM)  # the recipe: tempme_vl/recipes/videollm.py; its loop: tempme_vl/recipes/loop.py
