"""The script that times exports runs."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

for package in ("onnxscript", "onnxruntime", "openvino"):
    pytest.importorskip(package)
SCRIPT = Path(__file__).parents[2] / "eval" / "export_speed.py"


@pytest.mark.slow
def test_it_times_what_is_exported() -> None:
    command = [sys.executable, str(SCRIPT), "--model", "open_clip:tiny", "--frames", "4", "--repeats", "1"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    rows = {line.split()[0]: line.split() for line in done.stdout.splitlines() if line.split()}
    assert all(float(off) < 1e-5 for way in ("torch", "onnxruntime", "openvino") for off in rows[way][-2:])
    assert all(float(off) > 1e-5 for off in rows["torch-bf16"][-2:])
    assert "openvino-bf16" in rows  # a CPU without bfloat16 computes it in float32
