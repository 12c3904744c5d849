"""What a run says of itself as it goes."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tempme_vl.training.writing import naming


class RunLog:
    """metrics.jsonl, one JSON object a line, and TensorBoard if asked.

    Lines after a resumed step are dropped, and with `open_epoch` what its evaluation, which is repeated, has written.
    """

    def __init__(self, output: Path, step: int, tensorboard: bool, open_epoch: bool = False):
        output.mkdir(parents=True, exist_ok=True)
        self.path = output / "metrics.jsonl"
        entries = [(line, _entry(line, f"{self.path}, line {n}")) for n, line in enumerate(_lines(self.path), 1)]
        kept = [
            line
            for line, entry in entries
            if entry["step"] < step or (entry["step"] == step and ("loss" in entry or not open_epoch))
        ]
        partial = output / ".metrics.jsonl.partial"
        with naming(self.path):
            partial.write_text("".join(line + "\n" for line in kept))
            partial.replace(self.path)
        self.board = None
        if tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            self.board = SummaryWriter(str(output / "tensorboard"), purge_step=step + 1)

    def write(self, step: int, values: Mapping[str, float]) -> None:
        with naming(self.path), self.path.open("a") as log:
            log.write(json.dumps({"step": step, **values}) + "\n")
        if self.board:
            for name, value in values.items():
                self.board.add_scalar(name, value, step)


def _entry(line: str, place: str) -> dict[str, Any]:
    try:
        entry = json.loads(line)
        if isinstance(entry, dict) and type(entry["step"]) is int:
            return entry
    except (ValueError, KeyError, RecursionError):
        pass
    raise ValueError(
        f"{place}: expected the JSON object of a step, as a run writes it; got {line[:80]!r}. Mend or delete the line"
    )


def _lines(path: Path) -> list[str]:
    if not path.is_file():
        return []
    text = path.read_text(encoding="utf-8", errors="replace")
    return text[: text.rfind("\n") + 1].splitlines()  # without a last line that a kill cut off
