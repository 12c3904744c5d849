"""What merging saves, beside the paper's numbers.

GFLOPs, tokens and trainable weights of all methods and tunings, each with how sure its setting is, and the cost of
UMT's fusion, computed (some ten seconds); --json FILE writes the same as objects under "rows":
    python eval/efficiency.py

Times and peak memory of the forward pass on this machine, beside open_clip's own tower:
    python eval/efficiency.py --measure --model open_clip:ViT-B-16-quickgelu --threads 1

All methods with a published setting, beside their GFLOPs, one video and eight at a time:
    python eval/efficiency.py --measure --rows all --model open_clip:ViT-B-16-quickgelu --batch 1 8 --repeats 3 \\
        --no-memory --threads 2 --json wall_clock.json

One step of full fine-tuning with and without merging; on a CPU, then in bf16 on a GPU:
    python eval/efficiency.py --measure --train --batch 2 --repeats 5
    python eval/efficiency.py --measure --train --batch 32 --dtype bfloat16 --model open_clip:ViT-B-16-quickgelu

UMT with frames joint, apart, and apart with TempMe; L/16 has no published schedule, the one here is an example:
    python eval/efficiency.py --measure --model umt:b16 --repeats 5
    python eval/efficiency.py --measure --train --model umt:b16 --batch 2 --repeats 5
    python eval/efficiency.py --measure --train --model umt:l16 --repeats 3 --r 8 --merge-layers 14 16 18 \\
        --merge-frames 2 2 3 --cross-percent 40 --intra-percent 10
"""

from tempme_vl.command import run
from tempme_vl.evaluation.options import EFFICIENCY

if __name__ == "__main__":
    run(EFFICIENCY)  # tempme_vl/evaluation/efficiency_command.py
