"""The one command for a GPU: every part runs, on a CPU too, and no part loses what others found."""

from __future__ import annotations

import json
import runpy
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tempme_vl.evaluation.gpu_report import format_report, timm_rows, write_csv
from tempme_vl.evaluation.parts import Part, run_part

COMMAND = Path(__file__).parents[2] / "eval" / "gpu.py"
WRITES = "import json, sys; json.dump({text}, open(sys.argv[-1], 'w')); {then}"


def python(name: str, text: str = "[]", then: str = "pass", seconds: float = 60.0) -> Part:
    return Part(name, (sys.executable, "-c", WRITES.format(text=text, then=then)), seconds)


@pytest.mark.parametrize(
    ("part", "left", "status", "report", "said"),
    [
        (python("done", "[1]"), 60, "done", [1], ""),
        (python("broken", "[2]", "1 / 0"), 60, "failed", [2], "ZeroDivisionError"),
        (python("late", "[3]", "import time; time.sleep(60)", 2.0), 60, "out of time", [3], ""),
        (python("late", "[3]", "import time; time.sleep(60)"), 2, "out of time", [3], ""),
        (python("after", "[4]"), 0, "not begun", None, "no time was left"),
        (Part("silent", (sys.executable, "-c", "pass"), 60), 60, "failed", None, ""),
    ],
    ids=lambda value: value.name if isinstance(value, Part) else "",
)
def test_a_part_ends_one_way_or_another(
    part: Part, left: float, status: str, report: object, said: str, tmp_path: Path
) -> None:
    (tmp_path / f"{part.name}.json").write_text('["of an earlier run"]')
    done = run_part(part, tmp_path, left)
    assert (done["status"], done["report"]) == (status, report)
    assert ("error" in done) == (status != "done") and said in done.get("error", "")
    assert done["seconds"] < 30


def test_a_part_sees_its_environment(tmp_path: Path) -> None:
    part = replace(python("seen", "__import__('os').environ['SEEN']"), environment={"SEEN": "yes"})
    assert run_part(part, tmp_path, 60)["report"] == "yes"


def test_what_fails_is_told_at_the_end_and_all_else_is_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    script = runpy.run_path(str(COMMAND))
    measured = {"measured": [measurement()]}
    parts = [python("first", repr(measured)), python("second", then="1 / 0"), python("third", repr(measured))]
    script["main"].__globals__["small_parts"] = lambda: parts
    with pytest.raises(ValueError, match="1 of 3 parts did not end well: second"):
        script["main"](script["Options"](tmp_path, small=True))
    report = json.loads((tmp_path / "gpu.json").read_text())
    assert {name: done["status"] for name, done in report["parts"].items()} == {
        "first": "done",
        "second": "failed",
        "third": "done",
    }
    shown = capsys.readouterr().out
    assert "second: failed" in shown and "### third (done" in shown
    assert (tmp_path / "infer.csv").read_text().splitlines()[0].startswith("model,infer_img_size,infer_batch_size")
    with pytest.raises(ValueError, match="--parts fourth: expected some of first, second, third"):
        script["main"](script["Options"](tmp_path, small=True, parts=("fourth",)))


def measurement(**changed: Any) -> dict[str, Any]:
    setting = {
        "model": "open_clip:tiny",
        "frames": 12,
        "image_size": 224,
        "batch": 8,
        "what": "forward of the visual tower",
        "schedule": "default",
        "dtype": "bfloat16",
        "device": "a GPU",
        "threads": 1,
    }
    rows = [
        {"name": "none", "seconds": 0.02, "ratio": 1.0, "gflops": 10.0, "memory": None, "merging": None},
        {
            "name": "tempme",
            "seconds": 0.01,
            "ratio": 0.5,
            "gflops": 6.0,
            "memory": {"peak": 3 * 2**20, "before": 0},
            "merging": 0.1,
        },
    ]
    return {"setting": setting | changed, "rows": rows}


def test_columns_are_those_of_timms_benchmarks(tmp_path: Path) -> None:
    train = measurement(what="full fine-tuning step, input embeddings frozen")
    report = {"parts": {"a": {"report": {"measured": [measurement()]}}, "b": {"report": {"measured": [train]}}}}
    rows = timm_rows(report, "infer")
    assert [row["infer_samples_per_sec"] for row in rows] == [400.0, 800.0]
    write_csv(tmp_path / "infer.csv", rows)
    header, _, tempme = (tmp_path / "infer.csv").read_text().splitlines()
    assert header == "model,infer_img_size,infer_batch_size,infer_samples_per_sec,infer_step_time,infer_gmacs"
    assert tempme == "open_clip:tiny tempme,224,8,800.0,10.0,6.0"
    assert [row["train_step_time"] for row in timm_rows(report, "train")] == [20.0, 10.0]
    write_csv(tmp_path / "none.csv", [])
    assert (tmp_path / "none.csv").read_text() == "\n" or not (tmp_path / "none.csv").read_text()


def test_tables_of_a_report() -> None:
    agreement = {"path": "merge", "dtype": "float32", "error": 1.0, "tolerance": 1e-5, "holds": False}
    stages = {"tower": 0.5, "prefill": 1.5, "total": 2.5}
    reports = {
        "exact": {"agreements": [agreement, {**agreement, "holds": True}]},
        "forward": {"measured": [measurement()]},
        "host": {"rows": [{"row": "host", "tokens": 7, "seconds": stages, "ratios": dict.fromkeys(stages, 1.0)}]},
        "heads": [{"head": "xpool", "tokens": 3, "pairs_per_second": 10.0, "ratio": 2.0}],
        "lost": None,
    }
    parts = {name: {"status": "done", "seconds": 1.0, "report": found} for name, found in reports.items()}
    shown = format_report(
        {"parts": parts, "device": "a GPU", "date": "2026-01-01T", "versions": {"torch": "2"}, "small": False}
    )
    assert "1 of 2 fast paths agree" in shown and "| merge | float32 |" in shown
    assert "| tempme | 6 | 10.0 | 0.500 | 800 | 3 | 0.100 |" in shown
    assert "| host | 7 | 0.500 (1.00) | 1.500 (1.00) | 2.000 | 2.500 (1.00) |" in shown
    assert "| xpool | 3 | 10 (2.00) |" in shown and "### lost" in shown


@pytest.mark.slow  # eight processes; a minute and a half of CPU time
def test_every_part_runs_on_a_cpu(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, str(COMMAND), "--output", str(tmp_path), "--small", "--minutes", "30"],
        capture_output=True,
        text=True,
    )
    report = json.loads((tmp_path / "gpu.json").read_text())
    assert done.returncode == 0, done.stdout + done.stderr
    assert {part["status"] for part in report["parts"].values()} == {"done"} and len(report["parts"]) == 8
    agreements = report["parts"]["exact"]["report"]["agreements"]
    assert len(agreements) == 30 and all(one["holds"] for one in agreements)
