"""Pre-training of TESTA on pictures and videos with texts: contrast, matching and captions.

A first try, on any machine (renders its own small data set; 250 steps of some seconds each on a CPU core):
    deepspeed recipes/pretrain.py

TESTA's setting, from BLIP, on 8 GPUs (not yet measured):
    deepspeed --num_gpus 8 recipes/pretrain.py --annotations pairs/ --video-root /data --model testa:b16 \
        --pretrained model_base_capfilt_large.pth --deepspeed-config recipes/ds/zero2.json

pairs/ holds JSON files, each a list of {"path": "a.mp4", "caption": "a dog runs"}; a picture is a still video.
What comes out is a retrieval model, and starts the other recipes:
    python eval/retrieval.py --checkpoint runs/motion-pretraining/best --dataset motion
    deepspeed recipes/full_ft_msrvtt.py --model testa:tiny --pretrained runs/motion-pretraining/best
    deepspeed recipes/videoqa.py --model testa:tiny --head decoder --pretrained runs/motion-pretraining/best
"""

from tempme_vl.command import run
from tempme_vl.recipes.options.pretraining import PRETRAINING

if __name__ == "__main__":
    run(PRETRAINING)  # the recipe: tempme_vl/recipes/pretraining.py; its loop: tempme_vl/recipes/loop.py
