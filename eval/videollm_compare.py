"""Compression methods side by side on one video-language model, without training: accuracy at equal tokens and time.

On what recipes/videollm_lora.py exported, the embedded data set's questions (interrupted, it goes on where it was):
    python recipes/videollm_lora.py --method none --output runs/motion-videollm-none
    python eval/videollm_compare.py --host runs/motion-videollm-none/best

A few methods at one budget:
    python eval/videollm_compare.py --host FOLDER --methods tempme@tower tempme@behind evs fastvid --retention 0.25
"""

from tempme_vl.command import run
from tempme_vl.evaluation.options import VIDEOLLM_COMPARE

if __name__ == "__main__":
    run(VIDEOLLM_COMPARE)  # tempme_vl/evaluation/videollm/command.py
