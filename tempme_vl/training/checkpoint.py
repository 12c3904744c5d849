"""Checkpoints that survive a kill at any moment, and exports of full weights.

A checkpoint is written beside its final name and renamed when it is complete; `latest` names the last complete one
and is replaced in one step. Its tensors are whole and lie in safetensors files, each in that of one rank: any number of
ranks reads them.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from tempme_vl.manifest import FolderError, check_manifest, errors_in, write_manifest
from tempme_vl.training import distributed
from tempme_vl.training.whole import buffers, whole_weight
from tempme_vl.training.writing import naming

LATEST, STATE = "latest", "run.json"
FILE = 1 << 28  # bytes: what a rank holds beside the model while it writes


def save_checkpoint(
    tensors: Iterable[tuple[str, Tensor]], root: Path, step: int, state: dict[str, Any], keep: int = 2
) -> Path:
    """Writes `tensors`, `state` and every rank's random states; all ranks call it.

    A checkpoint that `latest` names already is not written again (`replace_state` changes its state).

    Args:
        tensors: by name, whole, in the same order on all ranks (`WholeState`).
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
        _write_share(partial, tensors)
        distributed.barrier()
        if distributed.is_main():
            write_manifest(partial, everything=True)  # but of the state, which `replace_state` changes
            (partial / STATE).write_text(_signed(state))
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
            _replace(checkpoint / STATE, lambda path: path.write_text(_signed(state)))
    distributed.barrier()


def latest_checkpoint(root: Path) -> Path | None:
    """The last complete checkpoint below `root`, if there is one."""
    pointer = root / LATEST
    if not pointer.is_file():  # lost, or killed before it was written for the first time
        whole = sorted(state.parent for state in root.glob(f"step-*[0-9]/{STATE}"))
        return whole[-1] if whole else None
    name = pointer.read_bytes().decode(errors="replace").strip()
    if not re.fullmatch(r"step-\d{8,}", name):
        there = ", ".join(sorted(path.name for path in root.glob("step-*[0-9]"))) or "none is there"
        raise FolderError(
            f"{pointer}: expected the name of a checkpoint ({there}); got {name[:40]!r}. Write the one to go on from"
        )
    return root / name


def read_state(checkpoint: Path) -> dict[str, Any]:
    """The `state` that was given to `save_checkpoint`, of a checkpoint that is as it was written; all ranks call it.

    Of files above 64 MiB their size and samples are compared, by the first rank.

    Raises:
        ValueError: no checkpoint, or not a whole one.
        FolderError: a file of it is changed, cut or missing.
    """
    if not (checkpoint / STATE).is_file():
        raise ValueError(f"expected {STATE} in {checkpoint}; let {checkpoint.parent / LATEST} name a whole checkpoint")
    if distributed.is_main():
        check_manifest(checkpoint)
    distributed.barrier()  # no other rank is to stumble over a damaged file before the first one says what it is
    with errors_in(checkpoint / STATE):
        state = json.loads((checkpoint / STATE).read_text())  # not by `read_json`: a score may be -Infinity
        if not isinstance(state, dict):
            raise ValueError(f"expected an object; got {str(state)[:80]!r}")
    if state.pop("sha256", _digest(state)) != _digest(state):  # those of older versions have none
        raise FolderError(
            f'{checkpoint / STATE} is not as it was written, by its own "sha256". Go on from another checkpoint '
            f"(write its name to {checkpoint.parent / LATEST}); if you changed it on purpose, delete that entry"
        )
    return state


class Tensors:
    """The tensors of a checkpoint by name, read when they are asked for.

    Raises:
        ValueError: a file that cannot be read, or a tensor that is not there; names it.
    """

    def __init__(self, checkpoint: Path):
        self.checkpoint = checkpoint
        self._files: dict[str, Any] = {}
        for path in sorted(checkpoint.glob("rank-*.safetensors")):
            try:
                file = safe_open(path, "pt")
            except (OSError, SafetensorError) as error:
                raise ValueError(f"{path} cannot be read ({error}); {self._advice()}") from error
            self._files |= dict.fromkeys(file.keys(), file)
        self.names = self._files.keys()

    def __getitem__(self, name: str) -> Tensor:
        if name not in self._files:
            raise ValueError(f"expected {name} in a file rank-*.safetensors of {self.checkpoint}; {self._advice()}")
        return self._files[name].get_tensor(name)

    def _advice(self) -> str:
        return f"write the name of an older checkpoint into {self.checkpoint.parent / LATEST}"


def restore_random_states(tensors: Tensors) -> None:
    """This rank's random states; another's where fewer ranks wrote them.

    What a step draws does not follow from them, but from its number (`Trainer`).
    """
    rank = distributed.rank() % sum(name.startswith("random/cpu/") for name in tensors.names)
    torch.set_rng_state(tensors[f"random/cpu/{rank}"])
    if torch.cuda.is_available() and f"random/cuda/{rank}" in tensors.names:
        torch.cuda.set_rng_state(tensors[f"random/cuda/{rank}"])


def full_state_dict(
    engine: Any, wanted: Callable[[str], bool] = lambda name: True, everywhere: bool = True
) -> dict[str, Tensor]:
    """All parameters whole, in the optimizer's float32 where it holds them so; all ranks call it.

    A parameter with two names (tied) is there once, under its first.

    Args:
        wanted: tells by its name whether a parameter is; others are not gathered.
        everywhere: False for the first rank alone; others get nothing, and hold one parameter at a time.
    """
    module: nn.Module = engine.module
    kept = everywhere or distributed.is_main()
    state = buffers(module) if kept else {}
    for name, parameter in module.named_parameters():
        if not wanted(name):
            continue
        with whole_weight(parameter) as weight:
            if kept:
                state[name] = weight.to("cpu", copy=True)
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


def _signed(state: dict[str, Any]) -> str:
    return json.dumps({**state, "sha256": _digest(state)}, indent=2) + "\n"


def _digest(state: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(state, sort_keys=True).encode()).hexdigest()


def _replace(path: Path, make: Callable[[Path], Any]) -> None:
    partial = path.with_name(f".{path.name}.partial")
    partial.unlink(missing_ok=True)
    make(partial)
    os.replace(partial, path)


def _write_share(folder: Path, tensors: Iterable[tuple[str, Tensor]]) -> None:
    """What falls to this rank, each tensor to the one that has least, in files of some `FILE` bytes."""
    rank, loads = distributed.rank(), [0] * distributed.world_size()
    share, files, size = _random_states(), 0, 0
    for name, tensor in tensors:
        owner = loads.index(min(loads))
        loads[owner] += tensor.nbytes
        if owner != rank:
            continue
        share[name] = tensor.detach().to("cpu", copy=True).contiguous()
        size += tensor.nbytes
        if size >= FILE:
            (folder / f"rank-{rank:04d}-{files:04d}.safetensors").write_bytes(save(share))
            share, files, size = {}, files + 1, 0
    (folder / f"rank-{rank:04d}-{files:04d}.safetensors").write_bytes(save(share))


def _random_states() -> dict[str, Tensor]:
    states = {f"random/cpu/{distributed.rank()}": torch.get_rng_state()}
    if torch.cuda.is_available():
        states[f"random/cuda/{distributed.rank()}"] = torch.cuda.get_rng_state()
    return states
