"""The script that looks for clips whose content is known runs, with a model that has learnt nothing."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from search.search_runs import save_model

pytest.importorskip("lancedb")
SCRIPT = Path(__file__).parents[2] / "eval" / "search_motion.py"


@pytest.mark.slow
def test_it_counts_what_is_found(tmp_path: Path) -> None:
    model = save_model(tmp_path / "model")
    out = ("--output", str(tmp_path / "out"), "--json", str(tmp_path / "rows.json"))
    command = [sys.executable, str(SCRIPT), "--checkpoint", str(model), "--clips", "20", "--places", "10", *out]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    rows = json.loads((tmp_path / "rows.json").read_text())["rows"]
    assert [(row["tokens"], row["segments"]) for row in rows] == [(form, 20) for form in ("none", "int8", "float16")]
    assert rows[0]["bytes a clip"] < rows[1]["bytes a clip"] < rows[2]["bytes a clip"]
    assert 0 <= rows[1]["pointing game"] <= 100 and 25 < rows[1]["by chance"] < 35
    assert 0 <= rows[1]["two objects: on the other"] <= 100 and 10 < rows[1]["two objects: by chance"] < 22
