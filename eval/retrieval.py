"""Evaluates a retrieval checkpoint on one split.

What the first try of recipes/full_ft_msrvtt.py wrote (on the embedded data set):
    python eval/retrieval.py --checkpoint runs/motion-tempme/best --dataset motion

MSRVTT 1k-A, then with dual softmax (another setting: it sees all queries at once), on 8 GPUs:
    deepspeed --num_gpus 8 eval/retrieval.py --checkpoint runs/msrvtt-tempme/best --dataset msrvtt \
        --data-root /data/msrvtt --json report.json
    deepspeed --num_gpus 8 eval/retrieval.py --checkpoint runs/msrvtt-tempme/best --dataset msrvtt \
        --data-root /data/msrvtt --dual-softmax

Your own videos (one JSON object a line: file, caption or captions, optional start, end, split):
    python eval/retrieval.py --checkpoint DIR --dataset jsonl --annotations videos.jsonl --video-root videos/
"""

from tempme_vl.command import run
from tempme_vl.evaluation.options import EVAL_RETRIEVAL

if __name__ == "__main__":
    run(EVAL_RETRIEVAL)  # tempme_vl/evaluation/retrieval_command.py
