"""Rows that became slower since a stored measurement are named, and nothing else is."""

from __future__ import annotations

import json
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest

from tempme_vl.evaluation import efficiency_command
from tempme_vl.evaluation.options import EFFICIENCY
from tempme_vl.evaluation.regressions import SlowerError, compare, stored


def report(**ratios: float) -> dict[str, Any]:
    """As `efficiency --measure --json` writes it."""
    setting = {
        "model": "open_clip:tiny",
        "frames": 12,
        "image_size": 224,
        "batch": 1,
        "what": "forward of the visual tower",
        "schedule": "default",
        "dtype": "float32",
        "device": "cpu (x86_64)",
        "threads": 1,
        "torch": "2.11",
        "turns": 5,
    }
    rows = [{"name": name, "seconds": 0.1 * ratio, "ratio": ratio} for name, ratio in ratios.items()]
    return {"measured": [{"setting": setting, "rows": rows}], "date": "2026-11-28"}


BEFORE = report(none=1.0, tome=0.8, tempme=0.6)


def written(folder: Path, content: object) -> Path:
    file = folder / "before.json"
    file.write_text(json.dumps(content))
    return file


@pytest.mark.parametrize("whole", [False, True], ids=["a report", "a report of parts"])
def test_only_rows_slower_by_more_than_the_spread_are_named(whole: bool, tmp_path: Path) -> None:
    content = {"parts": {"forward": {"report": BEFORE}, "heads": {"report": [1]}, "lost": {"report": None}}}
    before = stored(written(tmp_path, content if whole else BEFORE))
    now = report(none=1.0, tome=0.83, tempme=0.72)["measured"]
    with pytest.raises(SlowerError, match=r"1 of 2 rows became slower by more than 10%: tempme 0.600 -> 0.720 \(\+20%"):
        compare(before, now, 0.1)
    assert "2 rows as fast as stored, within 25%; now by then: tome 1.04, tempme 1.20" in compare(before, now, 0.25)
    assert "tempme 0.50" in compare(before, report(none=1.0, tempme=0.3)["measured"], 0.0)


@pytest.mark.parametrize("name", ["model", "frames", "batch", "what", "schedule", "dtype", "device", "threads"])
def test_other_settings_are_not_compared(name: str) -> None:
    now = deepcopy(BEFORE["measured"])
    now[0]["setting"][name] = "another"
    with pytest.raises(SlowerError, match="nothing to compare"):
        compare(BEFORE["measured"], now, 0.1)


def test_neither_are_ratios_to_another_row() -> None:
    with pytest.raises(SlowerError, match="nothing to compare"):
        compare(BEFORE["measured"], report(open_clip=1.0, none=0.9, tempme=0.6)["measured"], 0.1)


def test_a_file_without_measurements_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="it holds no measured rows"):
        stored(written(tmp_path, {"rows": []}))
    (tmp_path / "before.json").write_text("{")
    with pytest.raises(ValueError, match="expected JSON that --json wrote"):
        stored(tmp_path / "before.json")


def test_the_command_compares_and_fails_after_it_has_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    now = report(none=1.0, tempme=0.7)["measured"][0]
    monkeypatch.setattr(efficiency_command, "measure", lambda options, batch: now)
    command = ["--measure", "--no-costs", "--against", str(written(tmp_path, BEFORE)), "--json", str(tmp_path / "now")]
    with pytest.raises(SlowerError, match="tempme"):
        efficiency_command.main(EFFICIENCY.parse(command))
    assert json.loads((tmp_path / "now").read_text())["measured"] == [now]
    efficiency_command.main(EFFICIENCY.parse([*command, "--spread", "0.2"]))
    assert "tempme 1.17" in capsys.readouterr().out
    with pytest.raises(ValueError, match="add --measure"):
        efficiency_command.main(EFFICIENCY.parse(command[1:]))
