"""The command tempme-vl: how it finds what is meant, and that it trains and evaluates."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tempme_vl import __version__, cli
from tempme_vl.training.config import DEEPSPEED, deepspeed_file


@pytest.mark.parametrize("given", [[], ["--help"], ["train", "-h"]])
def test_commands_are_listed(given: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    cli.main(given)
    shown = capsys.readouterr().out
    asked = [command for command in cli.COMMANDS if command.name.startswith(given[0] if len(given) > 1 else "")]
    assert len(asked) in (5, 20)
    listed = [command for command in cli.COMMANDS if f"\n  {command.name:<18}" in shown]
    assert listed == asked


def test_the_version(capsys: pytest.CaptureFixture[str]) -> None:
    cli.main(["--version"])
    assert capsys.readouterr().out == f"tempme-vl {__version__}\n"


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (["trian"], "expected one of train retrieval, train peft"),
        (
            ["train"],
            "train retrieval, train peft, train videoqa, train videollm, train pretraining; got 'train'",
        ),
        (["eval", "nothing"], "got 'eval nothing'"),
        (["train", "retrieval", "--lrr", "1"], "unknown: --lrr 1; did you mean --lr?"),
        (["--local_rank=0", "train", "retrieval", "--dataset", "nothing"], "unknown data set 'nothing'"),
    ],
)
def test_what_is_not_a_command_is_one_line(given: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        cli.main(given)
    assert end.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ") and said in line


def test_deepspeed_files_by_name_and_by_path(tmp_path: Path) -> None:
    names = {"zero0", "zero1", "zero2", "zero3", "zero3_offload"}
    assert {file.stem for file in DEEPSPEED.iterdir()} == names
    root = Path(__file__).parents[1]
    for name in names:
        assert deepspeed_file(Path(name)).samefile(root / "recipes" / "ds" / f"{name}.json")
    own = tmp_path / "zero1"
    own.write_text("{}")
    assert deepspeed_file(own) == own
    with pytest.raises(ValueError, match=r"no DeepSpeed configuration at zero4; .* zero0, zero1, zero2"):
        deepspeed_file(Path("zero4"))


@pytest.mark.slow  # tests/recipes trains by the scripts' functions, which are the same
def test_the_launcher_trains_and_evaluates_by_the_module(tmp_path: Path) -> None:
    launch = [sys.executable, "-m", "deepspeed.launcher.runner", "--num_accelerators", "2", "--master_port", "29871"]
    train = ["--module", "tempme_vl.cli", "train", "retrieval", "--epochs", "1", "--batch-size", "400"]
    done = subprocess.run([*launch, *train, "--output", "run"], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    report = json.loads((tmp_path / "run" / "report.json").read_text())
    assert report["ranks"] == 2
    evaluate = ["-m", "tempme_vl.cli", "eval", "retrieval", "--checkpoint", "run/best", "--dataset", "motion"]
    done = subprocess.run([sys.executable, *evaluate, "--json", "e.json"], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert json.loads((tmp_path / "e.json").read_text())["t2v"] == pytest.approx(report["t2v"])
