"""How the tests run: a process a core, each on one thread, so that parallel processes do not slow each other down."""

import gc
import os

os.environ["OMP_NUM_THREADS"] = "1"  # also of processes that tests start; read when torch is imported

import pytest
import torch

torch.set_num_threads(1)
LONGEST = ("distributed", "recipes")  # folders with tests of tens of seconds


def pytest_xdist_auto_num_workers(config: pytest.Config) -> int:
    """One worker a core, of which a few suffice; none for a single file, which ends sooner than workers start."""
    (first, *others) = config.args
    if not others and ".py" in first:
        return 0
    return min(8, len(os.sched_getaffinity(0)))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest first: at the end, cores would wait for one of them."""
    items.sort(key=lambda item: item.path.parent.name not in LONGEST)


def pytest_collection_finish() -> None:
    """What was imported stays: no search for garbage looks through it again."""
    gc.freeze()
