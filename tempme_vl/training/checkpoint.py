"""Checkpoints that survive a kill at any moment, and exports of full weights.

A checkpoint is written beside its final name and renamed when it is complete; `latest` names the last complete one
and is replaced in one step. DeepSpeed's files are pickles: resume only from run folders of your own.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tempme_vl.training import distributed
from tempme_vl.training.writing import naming

LATEST, STATE = "latest", "run.json"


def save_checkpoint(engine: Any, root: Path, step: int, state: dict[str, Any], keep: int = 2) -> Path:
    """Writes model, optimizer, schedule, `state` and every rank's random states; all ranks call it.

    A checkpoint that `latest` names already is not written again (`replace_state` changes its state).

    Args:
        root: folder of all checkpoints of a run.
        state: JSON data for `read_state`.
        keep: how many of the newest checkpoints stay.

    Raises:
        WriteError: names the folder, the cause and the last whole checkpoint.
    """
    final = root / f"step-{step:08d}"
    if latest_checkpoint(root) == final:
        return final
    partial = root / f"{final.name}.partial"
    before = latest_checkpoint(root)
    with naming(partial, "no checkpoint was there before" if before is None else f"{before} is whole"):
        if distributed.is_main():
            for unfinished in root.glob("step-*.partial"):
                shutil.rmtree(unfinished)
            partial.mkdir(parents=True)
        distributed.barrier()
        engine.save_checkpoint(str(root), tag=partial.name, save_latest=False)
        torch.save(_random_states(), partial / f"random_{distributed.rank()}.pt")
        distributed.barrier()
        if distributed.is_main():
            (partial / STATE).write_text(json.dumps(state, indent=2) + "\n")
            shutil.rmtree(final, ignore_errors=True)
            partial.rename(final)
            _replace(root / LATEST, lambda path: path.write_text(final.name))
            older = [path for path in root.glob("step-*[0-9]") if path.name < final.name]
            for old in sorted(older, reverse=True)[keep - 1 :]:
                shutil.rmtree(old)
        distributed.barrier()
    return final


def replace_state(checkpoint: Path, state: dict[str, Any]) -> None:
    """Another `state` for a checkpoint, in one step."""
    if distributed.is_main():
        with naming(checkpoint / STATE):
            _replace(checkpoint / STATE, lambda path: path.write_text(json.dumps(state, indent=2) + "\n"))
    distributed.barrier()


def latest_checkpoint(root: Path) -> Path | None:
    """The last complete checkpoint below `root`, if there is one."""
    pointer = root / LATEST
    return root / pointer.read_text().strip() if pointer.is_file() else None


def read_state(checkpoint: Path) -> dict[str, Any]:
    """The `state` that was given to `save_checkpoint`.

    Raises:
        ValueError: no checkpoint, or not a whole one.
    """
    if not (checkpoint / STATE).is_file():
        raise ValueError(f"expected {STATE} in {checkpoint}; let {checkpoint.parent / LATEST} name a whole checkpoint")
    return json.loads((checkpoint / STATE).read_text())


def load_checkpoint(engine: Any, checkpoint: Path) -> None:
    """Restores engine and random states of the same number of ranks and ZeRO stage; all ranks call it."""
    path, _ = engine.load_checkpoint(str(checkpoint.parent), tag=checkpoint.name)
    if path is None:
        raise ValueError(f"DeepSpeed found nothing to load in {checkpoint}; is it complete?")
    _restore_random_states(torch.load(checkpoint / f"random_{distributed.rank()}.pt", weights_only=True))


def full_state_dict(
    engine: Any, wanted: Callable[[str], bool] = lambda name: True, everywhere: bool = True
) -> dict[str, Tensor]:
    """All parameters whole, in the optimizer's float32 where it holds them so; all ranks call it.

    A parameter with two names (tied) is there once, under its first.

    Args:
        wanted: tells by its name whether a parameter is; others are not gathered.
        everywhere: False for the first rank alone; others get nothing, and hold one parameter at a time.
    """
    import deepspeed
    from deepspeed.utils import safe_get_full_fp32_param

    module: nn.Module = engine.module
    kept = everywhere or distributed.is_main()
    names = {name for name, _ in module.named_parameters(remove_duplicate=False)}
    buffers = {name: value for name, value in module.state_dict().items() if name not in names}
    state = buffers if kept else {}
    for name, parameter in module.named_parameters():
        if not wanted(name):
            continue
        full = safe_get_full_fp32_param(parameter) if parameter.requires_grad else None
        if full is None:
            with deepspeed.zero.GatheredParameters([parameter]):
                full = parameter.detach().clone() if kept else None
        if kept and full is not None:
            state[name] = full.reshape(getattr(parameter, "ds_shape", parameter.shape)).cpu()
    return state


def replace_export(target: Path, step: int, write: Callable[[Path], None]) -> None:
    """Writes a folder beside `target` and makes `target` a link to it in one step; the older one goes afterwards.

    Whenever this is interrupted, `target` is a whole folder: the old one or the new one, also of the same step.

    Raises:
        WriteError: names the folder and the cause.
    """
    name = f"{target.name}-step-{step:08d}"
    # the folder that the link names now stays until it names another
    taken = os.readlink(target) if target.is_symlink() else None
    folder = target.with_name(name if taken != name else f"{name}-again")
    with naming(folder, f"{target} is as it was"):
        shutil.rmtree(folder, ignore_errors=True)
        write(folder)
        if target.is_dir() and not target.is_symlink():  # a copy of a run, in which the link became a folder
            target.rename(target.with_name(f"{target.name}-step-copied"))
        _replace(target, lambda path: path.symlink_to(folder.name, target_is_directory=True))
    for old in target.parent.glob(f"{target.name}-step-*"):
        if old != folder:
            shutil.rmtree(old)


def _replace(path: Path, make: Callable[[Path], Any]) -> None:
    partial = path.with_name(f".{path.name}.partial")
    partial.unlink(missing_ok=True)
    make(partial)
    os.replace(partial, path)


def _random_states() -> dict[str, Tensor]:
    states = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        states["cuda"] = torch.cuda.get_rng_state()
    return states


def _restore_random_states(states: dict[str, Tensor]) -> None:
    torch.set_rng_state(states["cpu"])
    if "cuda" in states:
        torch.cuda.set_rng_state(states["cuda"])
