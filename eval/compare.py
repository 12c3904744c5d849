"""Merging methods and ways of tuning side by side, trained alike: R-Sum against GFLOPs, tokens and measured time.

On the embedded data set (30 minutes on 2 CPU cores; interrupted, it goes on where it was):
    python eval/compare.py --methods none tome tempme --seeds 0 1 2

The page docs/comparison.md, made anew:
    python eval/compare.py --page docs/comparison.md
"""

from tempme_vl.command import run
from tempme_vl.evaluation.options import COMPARE

if __name__ == "__main__":
    run(COMPARE)  # tempme_vl/evaluation/compare_command.py
