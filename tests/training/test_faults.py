"""Whatever goes wrong, every process ends, the cause is the last thing on the screen, and nothing is lost."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest
from training.fault_runs import (
    claimed,
    damaged_worker,
    epochs,
    export_and_die,
    exported,
    full_disk,
    hold,
    interrupted,
    killed,
    launch,
    not_finite,
    script,
    wait_for,
)
from training.processes import exit_codes, run, start
from training.runs import finish

from tempme_vl.training.checkpoint import latest_checkpoint

LIBRARY_USER = """
import torch
from tempme_vl.evaluation.encode import encode_all

class Clips(torch.utils.data.Dataset):
    def __len__(self):
        return 8

    def __getitem__(self, index):
        if index == 3:
            raise OSError("clip 3 is damaged")
        return {"x": torch.zeros(1)}

encode_all(lambda batch: batch, Clips(), torch.device("cpu"), ["x"], batch_size=1, workers=1)
"""


def last_lines(log: Path, count: int) -> list[str]:
    return [line for line in log.read_text().splitlines() if line.strip()][-count:]


def test_an_error_in_a_loader_worker_ends_a_program_that_only_evaluates() -> None:
    ended = subprocess.run([sys.executable, "-c", LIBRARY_USER], capture_output=True, text=True, timeout=90)
    assert ended.returncode == 1
    assert "OSError: clip 3 is damaged" in ended.stderr.strip().splitlines()[-1]


@pytest.mark.parametrize(("world", "rank"), [(1, 0), (2, 0), (2, 1)])
def test_an_error_in_a_loader_worker_ends_every_rank(tmp_path: Path, world: int, rank: int) -> None:
    log = tmp_path / "log"
    codes = exit_codes(start(script, damaged_worker, tmp_path / "run", rank, log=log, world=world))
    assert codes == [1] * world
    cause, advice = last_lines(log, 2)
    assert cause == ("" if world == 1 else f"rank {rank} of {world}: ") + "OSError: number 7 is damaged"
    assert advice == "no checkpoint was written yet"
    assert not [p for p in psutil.process_iter(["environ"]) if str(log) in str(p.info["environ"])]


def test_an_error_of_all_ranks_is_shown_once_with_what_to_do(tmp_path: Path) -> None:
    log = tmp_path / "log"
    assert exit_codes(start(script, not_finite, tmp_path / "run", log=log, world=2)) == [1, 1]
    assert log.read_text().count("Traceback") == 1
    cause, advice = last_lines(log, 2)
    assert "of 2: " in cause and "NonFiniteLossError: loss is nan at step 2" in cause
    assert "step-00000002" in advice and advice.endswith("continue with --resume auto")


def test_a_rank_that_is_killed_ends_the_others(tmp_path: Path) -> None:
    logs = [tmp_path / "log0", tmp_path / "log1"]
    runs = [start(script, killed, rank, log=log, world=2) for rank, log in enumerate(logs)]
    for rank, (log, processes) in enumerate(zip(logs, runs, strict=True)):
        codes = exit_codes(processes)
        assert codes[rank] == -signal.SIGKILL and codes[1 - rank] == 1
        (said,) = last_lines(log, 1)
        assert said.startswith(f"rank {rank} of 2: it ended without a word")


def test_ranks_end_when_their_launcher_is_gone(tmp_path: Path) -> None:
    output, pid = tmp_path / "run", tmp_path / "pid"
    assert exit_codes(start(launch, output, pid, log=tmp_path / "log")) == [-signal.SIGKILL]
    wait_for(lambda: not psutil.pid_exists(int(pid.read_text())))
    assert "the launcher is gone" in (tmp_path / "log").read_text()
    assert latest_checkpoint(output / "checkpoints") is not None


def test_a_run_folder_in_use_is_refused(tmp_path: Path) -> None:
    output, go, log = tmp_path / "run", tmp_path / "go", tmp_path / "log"
    (holder,) = start(hold, output, go, log=log)
    wait_for((output / "held").exists)
    (said,) = run(claimed, output, False)
    assert f"in use by process {holder.pid} on " in said and "another --output" in said
    holder.kill()
    holder.join()
    assert run(claimed, output, False) == [""]  # a lock does not outlive its process
    assert {path.name for path in output.iterdir()} <= {".lock", "held", "metrics.jsonl"}


def test_run_folders_that_are_not_shared_are_refused_on_every_rank(tmp_path: Path) -> None:
    said = run(claimed, tmp_path / "run", True, world=2)
    for text in said:
        assert "not the same folder on all ranks" in text and "rank 1 on " in text and "all machines share" in text
    assert run(claimed, tmp_path / "shared", False, world=2) == ["", ""]
    assert [path.name for path in (tmp_path / "shared").iterdir()] == [".lock"]


def test_a_folder_that_cannot_be_written_to_is_refused_on_every_rank(tmp_path: Path) -> None:
    (tmp_path / "0").mkdir()
    (tmp_path / "1").write_text("a file")
    for text in run(claimed, tmp_path, True, world=2):
        assert text.startswith("rank 1 on ") and f"cannot write to {tmp_path / '1'}" in text


@pytest.mark.parametrize("times", [1, 2])
def test_ctrl_c_saves_and_a_second_one_ends_at_once(tmp_path: Path, times: int) -> None:
    output, log = tmp_path / "run", tmp_path / "log"
    codes = exit_codes(start(script, interrupted, output, times, log=log))
    text = log.read_text()
    assert "Traceback" not in text
    if times == 2:
        assert codes == [1]  # of this stand-in for an interpreter
        assert last_lines(log, 2) == ["interrupted", "no checkpoint was written yet"]
        return
    assert codes == [130]
    assert "Ctrl-C: saved step 4; continue with --resume auto" in text
    ((_, whole),) = run(finish, tmp_path / "whole")
    ((_, resumed),) = run(_finish_resumed, output)
    assert all(whole[name].equal(resumed[name]) for name in whole)


def _finish_resumed(output: Path) -> tuple[int, dict]:
    return finish(output, resume="auto")


def test_a_checkpoint_comes_before_the_end_of_an_epoch_which_a_resumed_run_makes_up_for(tmp_path: Path) -> None:
    output, seen, log = tmp_path / "run", tmp_path / "seen", tmp_path / "log"
    assert exit_codes(start(epochs, output, seen, 2, log=log)) == [-signal.SIGKILL]
    assert seen.read_text().splitlines() == ["1 step-00000003", "2 step-00000006"]
    assert exit_codes(start(epochs, output, seen, 2, log=log)) == [-signal.SIGKILL]
    assert run(epochs, output, seen) == [(7.0, 6, 9)]
    rest = ["2 step-00000006", "2 step-00000006", "3 step-00000009"]
    assert seen.read_text().splitlines()[2:] == rest
    # nothing is owed by a run that has ended
    assert run(epochs, output, seen) == [(7.0, 6, 9)]
    assert seen.read_text().splitlines()[2:] == rest
    state = json.loads((output / "checkpoints" / "step-00000009" / "run.json").read_text())
    assert (state["epoch_is_open"], state["best_step"]) == (False, 6)
    entries = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    assert [(entry["step"], entry["score"]) for entry in entries if "score" in entry] == [(3, 1), (6, 2), (9, 3)]
    assert [entry["step"] for entry in entries if "loss" in entry] == list(range(1, 10))


@pytest.mark.parametrize("step", [5, 6])
@pytest.mark.parametrize("place", ["writing", "replace before", "replace after", "rmtree before", "end"])
def test_a_kill_at_any_moment_leaves_a_whole_export(tmp_path: Path, step: int, place: str) -> None:
    target = tmp_path / "best"
    assert exit_codes(start(export_and_die, target, step, place, log=tmp_path / "log")) == [-signal.SIGKILL]
    found = {(target / name).read_text() for name in ("first", "second")}
    assert found in ({"old"}, {"new"})
    if place in ("replace after", "end"):
        assert found == {"new"}


def test_a_checkpoint_that_does_not_fit_says_where_and_why(tmp_path: Path) -> None:
    output = tmp_path / "run"
    (said,) = run(full_disk, output)
    partial = output / "checkpoints" / "step-00000004.partial"
    assert said.startswith(f"WriteError: could not write {partial}: File too large")
    assert f"{output / 'checkpoints' / 'step-00000002'} is whole" in said


@pytest.mark.parametrize("stage", ["zero0", "partitioned"])
def test_an_export_gathers_on_the_first_rank_what_the_model_saves(tmp_path: Path, stage: str) -> None:
    first, second = run(exported, tmp_path / "run", stage, world=2)
    assert first == (["b", "w"], ["w"])
    assert second == ([], ["w"])
