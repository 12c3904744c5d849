"""How the tests run: a process a core, each on few threads, so that parallel processes do not slow each other down."""

import os

import pytest
import torch

torch.set_num_threads(1)


def pytest_xdist_auto_num_workers(config: pytest.Config) -> int:
    """One worker a core, of which a few suffice; none for a single file, which ends sooner than workers start."""
    (first, *others) = config.args
    if not others and ".py" in first:
        return 0
    return min(8, len(os.sched_getaffinity(0)))
