"""Folders of checkpoints and of exports."""

from __future__ import annotations

from pathlib import Path

import pytest
from training.processes import run
from training.runs import saved_states, tampered, tied_state

from tempme_vl.training.checkpoint import latest_checkpoint, replace_export


def test_the_newest_two_stay_and_stale_newer_ones_do_no_harm(tmp_path: Path) -> None:
    (left,) = run(saved_states, tmp_path)
    assert left == ["latest", "step-00000004", "step-00000005", "step-00000040"]


def test_no_checkpoint_yet(tmp_path: Path) -> None:
    assert latest_checkpoint(tmp_path) is None
    (tmp_path / "step-00000004.partial").mkdir()
    assert latest_checkpoint(tmp_path) is None


@pytest.mark.parametrize("part", [3, pytest.param(1, marks=pytest.mark.slow)])
def test_a_damaged_checkpoint_is_not_gone_on_from(tmp_path: Path, part: int) -> None:
    (found,) = run(tampered, tmp_path / "run", part)
    assert {file.partition("/")[0] for file, _, _ in found} == {"latest", "step-00000002"}
    for file, damage, said in found:
        if damage == "missing" and Path(file).name in ("latest", "manifest.json"):  # older versions have no manifest
            assert said == "same"
        else:
            assert said.startswith(("FolderError", "ConfigError", "ValueError")), (file, damage, said)
            assert Path(file).name in said, (file, damage, said)


@pytest.mark.parametrize("stage", ["zero0", "partitioned"])
def test_a_tied_weight_is_whole_and_there_once(stage: str, tmp_path: Path) -> None:
    (state,) = run(tied_state, tmp_path, stage)
    assert {name: tuple(value.shape) for name, value in state.items()} == {"w": (1,), "b": (1,), "unit": (1,)}


def test_export_is_replaced_in_one_step(tmp_path: Path) -> None:
    best = tmp_path / "best"

    def write(folder: Path) -> None:
        folder.mkdir()
        (folder / "weights").write_text(folder.name)

    replace_export(best, 3, write)
    assert (best / "weights").read_text() == "best-step-00000003"

    def fail(folder: Path) -> None:
        folder.mkdir()
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        replace_export(best, 5, fail)
    assert (best / "weights").read_text() == "best-step-00000003"
    replace_export(best, 5, write)
    assert (best / "weights").read_text() == "best-step-00000005"
    replace_export(best, 5, write)
    assert {path.name for path in tmp_path.iterdir()} == {"best", "best-step-00000005-again"}
