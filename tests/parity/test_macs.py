"""What schedules cost and leave, beside the figures that the papers' rows come to by another counter.

The rows of methods that merge; its counter leaves out biases, activations and matching, so that 0.3% are allowed.
"""

from __future__ import annotations

import re
from typing import Any

import pytest
from parity.cases import find

from tempme_vl import MergeSchedule, make_schedule

ROWS = [row for case in find("compressors", "macs*") for row in case.config["cases"]]
METHODS = {"LoRA": "none", "ToMe": "tome", "TempMe": "tempme"}
OURS = [row for row in ROWS if row["name"].split("/")[0].split()[0] in METHODS]


def schedule_of(row: dict[str, Any]) -> MergeSchedule:
    words = re.match(r"(\w+).* B/(\d+)", row["name"])
    assert words is not None
    return make_schedule(METHODS[words[1]], 12, 12, (224 // int(words[2])) ** 2 + 1)


@pytest.mark.parametrize("row", OURS, ids=lambda row: f"macs-{row['name']}")
def test_costs_and_tokens(row: dict[str, Any]) -> None:
    schedule = schedule_of(row)
    assert schedule.gflops() == pytest.approx(row["gflops"], rel=3e-3)
    assert schedule.gflops() == pytest.approx(row["paper"], rel=3e-3)
    tokens = row.get("tokens", 12 * row.get("tokens_per_frame", 0))
    assert tokens in (0, schedule.output_tokens)
