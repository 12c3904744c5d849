"""Kernels equal the plain functions; where they do not run, nothing changes but the time."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import Tensor

from tempme_vl import kernels
from tempme_vl.backbones.base import PatchProjection


@pytest.mark.slow  # Triton's interpreter; on a GPU tests/cuda sees the same
@pytest.mark.skipif(sys.platform != "linux", reason="torch brings Triton on Linux alone")
def test_kernels_equal_the_plain_functions() -> None:
    interpreted = {} if torch.cuda.is_available() else {"TRITON_INTERPRET": "1"}
    run = subprocess.run(
        [
            sys.executable,
            "-m",
            "pytest",
            "-n",
            "0",
            "-p",
            "no:cacheprovider",
            str(Path(__file__).with_name("cases.py")),
        ],
        capture_output=True,
        text=True,
        env={**os.environ, **interpreted},
    )
    assert run.returncode == 0 and " passed" in run.stdout, run.stdout[-5000:] + run.stderr[-2000:]


@pytest.mark.parametrize(("side", "patch"), [(32, 8), (35, 8), ((16, 24), (4, 8))])
def test_patches_by_a_product_are_those_of_the_convolution(
    side: int | tuple[int, int], patch: int | tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    conv = torch.nn.Conv2d(3, 5, patch, patch).double()
    images = torch.randn(2, 3, *(side if isinstance(side, tuple) else (side, side)), dtype=torch.float64)
    expected, own = conv(images), PatchProjection.of(conv)
    monkeypatch.setattr(Tensor, "is_cuda", True)
    torch.testing.assert_close(own(images), expected, rtol=0, atol=1e-12)
    assert own.weight is conv.weight and own.bias is conv.bias


def test_windows_that_overlap_stay_a_convolution() -> None:
    conv = torch.nn.Conv2d(3, 5, 4, 2)
    assert PatchProjection.of(conv) is conv


def test_a_gpu_without_a_tool_chain_goes_on_without_kernels(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def match(*args: object, **options: object) -> None:
        raise RuntimeError("no C compiler")

    merging = ModuleType("merging")
    merging.match = match
    monkeypatch.setattr(kernels, "merging", merging, raising=False)
    monkeypatch.setitem(sys.modules, "tempme_vl.kernels.merging", merging)
    kernels._run_on.cache_clear()
    for _ in range(3):
        assert not kernels._run_on(torch.device("cpu"))
    kernels._run_on.cache_clear()
    (record,) = caplog.records
    assert (
        "merging runs without its fused kernels on cpu, and slower: RuntimeError: no C compiler" in record.getMessage()
    )
