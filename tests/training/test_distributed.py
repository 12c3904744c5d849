"""What ranks do together, and the threads that each has."""

from __future__ import annotations

import pytest

from tempme_vl.training.distributed import threads_of_rank


@pytest.mark.parametrize(
    ("cores", "ranks", "asked", "threads"),
    [(16, 2, None, 8), (2, 4, None, 1), (2, 1, "1", 1), (16, 2, "3", 3), (4, 2, "8", 2), (4, 1, "", 4), (4, 1, "0", 4)],
)
def test_a_rank_has_its_part_of_the_cores_and_no_more_threads_than_were_asked_for(
    cores: int, ranks: int, asked: str | None, threads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    if asked is not None:
        monkeypatch.setenv("OMP_NUM_THREADS", asked)
    assert threads_of_rank(cores, ranks) == threads
