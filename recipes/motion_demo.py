"""The demo: per-frame mean pooling, ToMe and TempMe trained alike on the embedded data set, and their table.

    python recipes/motion_demo.py                       # 2 ranks; 6 minutes on 2 CPU cores
    python recipes/motion_demo.py --seed 1 --ranks 1

Expected: per-frame encoding finds the axis of a motion but not its direction (R@1 near 50), TempMe finds both.
"""

from tempme_vl.command import run
from tempme_vl.recipes.demo import DEMO

if __name__ == "__main__":
    run(DEMO)
