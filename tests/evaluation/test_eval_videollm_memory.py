"""The command measures each point in a process of its own, and its table has them all."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

COMMAND = Path(__file__).parents[2] / "eval" / "videollm_memory.py"


@pytest.mark.slow
def test_fewer_frames_at_once_take_less(tmp_path: Path) -> None:
    file = tmp_path / "memory.json"
    options = f"--blocks 1 --frames 64 --at-once 8 --json {file}"
    done = subprocess.run([sys.executable, COMMAND, *options.split()], check=True, capture_output=True, text=True)
    whole, parts = json.loads(file.read_text())["rows"]
    assert (whole["at_once"], parts["at_once"]) == (None, 8)
    assert parts["peak"] - parts["before"] < 0.8 * (whole["peak"] - whole["before"])
    assert whole["tokens"] == parts["tokens"] == 32 * 64 // 2
    assert "| frames | tokens |" in done.stdout
