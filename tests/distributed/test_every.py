"""Every method and every way of tuning with ZeRO-3 on two ranks: as on one without, saved, resumed and exported."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from distributed.every import STEPS, train_each
from training.processes import run
from tuning.models import made

from tempme_vl.merging import METHODS
from tempme_vl.tuning import TUNINGS

CASES = {
    "methods": [("clip4clip", method) for method in METHODS],  # which leaves the words alone, most of the weights
    "tunings": [(tuning, "none") for tuning in TUNINGS],
    "both": [(tuning, "tempme") for tuning in TUNINGS],
}


@pytest.mark.slow
@pytest.mark.parametrize("cases", CASES.values(), ids=CASES)
def test_two_ranks_with_parts_of_the_weights_are_one_with_all(cases: list[tuple[str, str]], tmp_path: Path) -> None:
    (alone,) = run(train_each, cases, tmp_path / "alone", "zero0")
    ranks = run(train_each, cases, tmp_path / "parts", "partitioned", world=2)
    for case, expected in alone.items():
        start = dict(made(*case).named_parameters())
        assert len(expected.losses) == STEPS and expected.weights.keys() <= start.keys()
        assert any(not torch.equal(weight, start[key]) for key, weight in expected.weights.items())
        for found in (rank[case] for rank in ranks):
            assert found.losses == pytest.approx(expected.losses, rel=1e-5), case
            assert found.weights.keys() == expected.weights.keys()
            for key, weight in expected.weights.items():
                torch.testing.assert_close(found.weights[key], weight, rtol=1e-4, atol=1e-6, msg=f"{case}: {key}")
        for one in (expected, *(rank[case] for rank in ranks)):
            assert one.repeats, f"{case}: the step after the checkpoint is another one"
            assert one.exported < 1e-5, f"{case}: the exported folder is another model"
