"""Tensors by name from the kinds of files that weights come in. What a file is, its content tells and not its name.

Nothing of a file is run: pickles are read by torch with `weights_only=True`, and a TorchScript archive is not loaded
but only its tensors are (`tempme_vl.weights.torchscript`).
"""

from __future__ import annotations

import json
import pickle
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from tempme_vl.messages import few
from tempme_vl.weights.torchscript import is_torchscript, read_torchscript

# What other libraries call the weights in a folder, in the order in which they are looked for.
FILES = (
    "model.safetensors",
    "model.safetensors.index.json",
    "open_clip_model.safetensors",
    "open_clip_model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
    "open_clip_pytorch_model.bin",
    "open_clip_pytorch_model.bin.index.json",
)
# Where training scripts put the state dict in what they save, and what wrappers put in front of all of its keys.
_WRAPPERS = ("state_dict", "model", "module", "model_state_dict")
_PREFIXES = ("module.", "_orig_mod.")
_ZIP = b"PK"  # how an archive of torch.save or torch.jit begins


@dataclass(frozen=True)
class WeightsFile:
    """What a file holds.

    Attributes:
        path: the file; of a folder the one in it, of shards their index.
        kind: which sort of file it is, in words.
        state: tensors by name on the CPU, as they are in the file.
    """

    path: Path
    kind: str
    state: dict[str, Tensor]


def read_weights(path: str | Path) -> WeightsFile:
    """The state dict of a file or folder, mapped from disk where the file allows it.

    Args:
        path: safetensors; what torch.save wrote, a state dict or one under "state_dict", "model", "module" or
            "model_state_dict"; a TorchScript archive; the index of shards of either of the first two
            (NAME.index.json); or a folder with one of `FILES`. The prefixes of DDP and torch.compile are left out.

    Raises:
        ValueError: no such file; damaged; a pickle of more than tensors and plain values, which is never run; shards
            that do not hold what their index says; or no state dict inside.
    """
    path = find_weights(path)
    if path.suffix == ".json":
        return _read_shards(path)
    kind, loaded = _read(path)
    return WeightsFile(path, kind, _state_dict(loaded, path))


def find_weights(path: str | Path) -> Path:
    """The file itself, or the one in a folder.

    Raises:
        ValueError: there is none; the message lists what is there.
    """
    path = Path(path)
    if path.is_dir():
        for name in FILES:
            if (path / name).is_file():
                return path / name
        raise ValueError(
            f"{path} is a folder without weights: expected one of {', '.join(FILES)}; "
            f"found {few(sorted(entry.name for entry in path.iterdir()), 8) or 'nothing'}"
        )
    if not path.is_file():
        raise ValueError(
            f"expected a checkpoint file; {path} {'is no regular file' if path.exists() else 'does not exist'}"
        )
    return path


def _read(path: Path) -> tuple[str, Any]:
    """The sort of a file, and what is in it."""
    if trouble := _trouble(path):
        raise ValueError(f"{path} cannot be read as a checkpoint: {trouble}")
    try:
        if path.suffix == ".safetensors" or _is_safetensors(path):
            return "safetensors", load_file(path)
        if not _begins(path, _ZIP):
            # The format before PyTorch 1.6 is no zip file and cannot be mapped.
            return "torch.save", torch.load(path, map_location="cpu", weights_only=True)
        with zipfile.ZipFile(path) as archive:
            if is_torchscript(archive):
                return "TorchScript", read_torchscript(archive)
        return "torch.save", torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except pickle.UnpicklingError as error:
        # The message begins with advice to load the file unsafely, and ends with what it met.
        met = str(error).split("WeightsUnpickler error:")[-1].strip().split("\n")[0]
        raise ValueError(
            f"{path} is not a pickle of only tensors and plain values, and loading anything else could run code of its "
            "author. If you trust the file, load it yourself with torch.load(..., weights_only=False) and save only "
            f"its weights, best as .safetensors. The loader said: {met}"
        ) from error
    except Exception as error:  # damaged files fail in many ways (KeyError, EOFError, RuntimeError, ...)
        said = (str(error).strip() or "nothing").split("\n")[0]
        raise ValueError(
            f"{path} cannot be read as a checkpoint; is it damaged, or only partly downloaded? The loader said: "
            f"{type(error).__name__}: {said}"
        ) from error


def _trouble(path: Path) -> str | None:
    """Why a file can hold no weights, as far as its first bytes tell."""
    with path.open("rb") as stream:
        head = stream.read(64)
    if not head:
        return "it is empty"
    if head.startswith(b"version https://git-lfs"):
        return "it is a pointer of Git LFS and not the file itself (git lfs pull fetches it)"
    if head.lstrip()[:1] == b"<":
        return "it is a web page; was it saved instead of the file behind its link?"
    return _zip_trouble(path) if head.startswith(_ZIP) else None


def _zip_trouble(path: Path) -> str | None:
    """Why a zip archive holds no weights, or other ones than were written: torch.load compares no checksums."""
    part = "list of parts, which stands at its end,"
    try:
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
            if not any(name.split("/")[-1] == "data.pkl" for name in names):
                held = "arrays of numpy" if names and all(name.endswith(".npy") for name in names) else "other files"
                return f"it is a zip archive of {held}; expected what torch.save wrote, or safetensors"
            for entry in archive.infolist():
                part = entry.filename
                if entry.CRC == 0:  # torch can be told to write none
                    continue
                with archive.open(entry) as stream:
                    while stream.read(1 << 22):
                        pass
    except Exception as error:  # of zipfile, zlib and struct
        return f"its {part} is damaged or missing; is it only partly downloaded? ({type(error).__name__}: {error})"
    return None


def _begins(path: Path, start: bytes) -> bool:
    with path.open("rb") as stream:
        return stream.read(len(start)) == start


def _is_safetensors(path: Path) -> bool:
    """Whether the file begins with the length of a JSON header that it can hold."""
    with path.open("rb") as stream:
        head = stream.read(9)
    return head[8:] == b"{" and int.from_bytes(head[:8], "little") <= path.stat().st_size


def _state_dict(loaded: Any, path: Path) -> dict[str, Tensor]:
    state = loaded
    if isinstance(loaded, Mapping):
        state = next((loaded[name] for name in _WRAPPERS if isinstance(loaded.get(name), Mapping)), loaded)
    if not isinstance(state, Mapping):
        raise ValueError(f"expected a state dict in {path}; got {type(state).__name__}")
    others = [
        f"{key!r} ({type(value).__name__})"
        for key, value in state.items()
        if not (isinstance(key, str) and isinstance(value, Tensor))
    ]
    if others or not state:
        raise ValueError(
            f"expected a state dict of tensors in {path}, by name, bare or under one of {', '.join(_WRAPPERS)}; "
            f"got {'an empty one' if not state else 'also ' + few(others)}"
        )
    found = dict(state)
    for prefix in _PREFIXES * 2:  # in either order
        if all(key.startswith(prefix) for key in found):
            found = {key.removeprefix(prefix): value for key, value in found.items()}
    return found


def _read_shards(index: Path) -> WeightsFile:
    try:
        shard_of = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        plain = all(isinstance(name, str) and Path(name).name == name for name in shard_of.values())
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        plain = False
    if not plain or not shard_of:
        raise ValueError(
            f'expected the index of shards in {index}, JSON with a "weight_map" of names of weights to names of files '
            "beside it; it is something else, or damaged"
        )
    names = sorted(set(shard_of.values()))
    if missing := [name for name in names if not (index.parent / name).is_file()]:
        raise ValueError(f"{index} names {len(names)} files; {few(missing)} are not beside it")
    state: dict[str, Tensor] = {}
    kinds = []
    for name in names:
        kind, loaded = _read(index.parent / name)
        shard = _state_dict(loaded, index.parent / name)
        expected = {key for key, file in shard_of.items() if file == name}
        if shard.keys() != expected:
            raise ValueError(
                f"{index.parent / name} does not hold the weights that {index.name} says: "
                f"{few(sorted(expected - shard.keys())) or 'none'} are missing, "
                f"{few(sorted(shard.keys() - expected)) or 'none'} are not named there"
            )
        kinds.append(kind)
        state |= shard
    return WeightsFile(index, f"{len(names)} shards of {kinds[0]}", state)
