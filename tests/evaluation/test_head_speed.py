"""The command times every head on every number of tokens, and its rows are those of the heads."""

from __future__ import annotations

import json
import runpy
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

COMMAND = Path(__file__).parents[2] / "eval" / "head_speed.py"


def test_all_heads_take_turns(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    sizes = "--tokens 12 3 --videos 2 --captions 3 --width 8 --repeats 2"
    monkeypatch.setattr(sys, "argv", [str(COMMAND), *sizes.split(), "--json", str(tmp_path / "rows.json")])
    module = runpy.run_path(str(COMMAND), run_name="__main__")
    rows = json.loads((tmp_path / "rows.json").read_text())
    heads = ["eercf, strong gate", "eercf, weak gate", "xpool", "maxsim"]
    assert [(row["head"], row["tokens"]) for row in rows] == [(head, count) for head in heads for count in (12, 3)]
    assert all(row["pairs_per_second"] > 0 and row["ratio"] > 0 for row in rows)
    assert {row["ratio"] for row in rows if row["tokens"] == 12} == {1.0}
    assert "pairs a second" in capsys.readouterr().out

    compare = module["heads_of"](module["Options"](captions=3, width=8), torch.device("cpu"))
    video = F.normalize(torch.randn(2, 4, 8), dim=-1)
    assert {name: step(video).shape for name, step in compare.items()} == dict.fromkeys(heads, (3, 2))
