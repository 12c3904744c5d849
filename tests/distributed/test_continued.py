"""A run that goes on with another number of ranks is the run that kept them."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
from distributed.runs import go_on, save_and_go_on
from training.processes import run

STAGES = ("zero0", "zero1", "zero2", "zero3", "partitioned", "zero3_offload")
CASES: dict[str, dict[str, Any]] = {stage: {"stage": stage, "optimizer": "adamw"} for stage in STAGES}
QUICK = {name: CASES[name] for name in ("zero1", "partitioned")}
WHOLE = {
    **{name: case for name, case in CASES.items() if name not in QUICK},
    "sgd": {"stage": "zero2", "optimizer": "sgd"},
    "classifier": {"stage": "zero2", "optimizer": "adamw", "task": "classifier"},
    "decoder": {"stage": "partitioned", "optimizer": "adamw", "task": "decoder"},
}


def assert_goes_on(
    cases: dict[str, dict[str, Any]], before: int, after: tuple[int, ...], folder: Path, chunks: int = 1
) -> None:
    kept = run(save_and_go_on, cases, folder / "kept", world=before)[0]
    for world in after:
        shutil.copytree(folder / "kept", folder / str(world))
        continued = run(go_on, cases, folder / str(world), chunks, world=world)
        line = (
            f"a checkpoint of {before} rank{'s' if before > 1 else ''} continues on {world}: "
            f"the batch stays 8, now {8 // world} a rank instead of {8 // before}\n"
        )
        for rank, (found, said) in enumerate(continued):
            assert said.count(line) == (len(cases) if rank == 0 else 0)
            for name, steps in kept.items():
                assert len(steps) == 3
                assert [names for names, _ in found[name]] == [names for names, _ in steps]
                # rounding alone was seen to make 2e-7
                assert [loss for _, loss in found[name]] == pytest.approx([loss for _, loss in steps], rel=1e-6), name


def test_two_ranks_go_on_as_one(tmp_path: Path) -> None:
    assert_goes_on(QUICK, 2, (1,), tmp_path, chunks=2)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("cases", "before", "after"), [(QUICK, 1, (2, 4)), (WHOLE, 1, (2,)), (WHOLE, 2, (1, 4)), (CASES, 4, (2,))]
)
def test_ranks_become_more_and_fewer_at_every_stage(
    cases: dict[str, dict[str, Any]], before: int, after: tuple[int, ...], tmp_path: Path
) -> None:
    assert_goes_on(cases, before, after, tmp_path)
