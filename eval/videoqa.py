"""Accuracy of answers to questions about videos: of any model's predictions, or of a model of this package.

Predictions, without a GPU, a model or torch:
    python eval/videoqa.py --predictions predictions.json --annotations MSRVTT-QA/test_qa.json --json report.json

With the answer list of the training split, for the ceiling of a classifier over its 1,500 most frequent answers:
    python eval/videoqa.py --predictions predictions.csv --annotations msrvtt_qa/test.csv \
        --vocabulary answers.json --vocabulary-size 1500

A model, on one process or several (for a retrieval model, which answers zero-shot, --vocabulary is what it tries):
    deepspeed --num_gpus 8 eval/videoqa.py --checkpoint runs/msrvtt_qa-decoder-tempme/best --dataset msrvtt_qa \
        --data-root /data/msrvtt --save-predictions predictions.json

Predictions: a JSON object {question id: answer}; a JSON list or JSON lines of {"question_id": ..., "answer": ...} or,
with the ground truth beside it, of {"id": ..., "answer": truth, "pred": ...}; csv alike. Annotations: MSRVTT-QA (JSON
or csv), MSVD-QA, ActivityNet-QA (NAME_q.json with NAME_a.json beside it), or one's own .jsonl file (file, question,
answer or answers, optional options, id and split).
"""

from tempme_vl.command import run
from tempme_vl.evaluation.options import EVAL_VIDEOQA

if __name__ == "__main__":
    run(EVAL_VIDEOQA)  # tempme_vl/evaluation/videoqa_command.py
