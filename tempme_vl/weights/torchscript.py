"""The tensors of a TorchScript archive, such as OpenAI's CLIP files, without loading the archive.

`torch.jit.load` runs no pickle of Python's, but it compiles and may run (`__setstate__`) the program that the archive
holds, and torch advises against that for files of strangers. The weights need none of it: they are the attributes of
nested modules, described by a pickle (data.pkl) of very few kinds of objects, and one uncompressed file of numbers
each. The unpickler here can make nothing but these: a class of the archive becomes a table of attributes, a storage its
numbers, and whatever else a pickle asks for is refused.
"""

from __future__ import annotations

import io
import pickle
import zipfile
from collections import OrderedDict
from typing import Any

import torch
from torch import Tensor

_DTYPES = {
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "FloatStorage": torch.float32,
    "DoubleStorage": torch.float64,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ShortStorage": torch.int16,
    "CharStorage": torch.int8,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
}
# Attributes of modules that are no tensors, as torch.jit writes them; nothing here needs their values.
_LISTS = ("build_intlist", "build_doublelist", "build_boollist", "build_tensorlist", "restore_type_tag")


class _Module:
    """A module of the archive: its attributes."""

    def __init__(self) -> None:
        self.attributes: dict[Any, Any] = {}

    def __setstate__(self, state: Any) -> None:
        self.attributes = state if isinstance(state, dict) else {}


class _Unpickler(pickle.Unpickler):
    def __init__(self, archive: zipfile.ZipFile, root: str):
        super().__init__(io.BytesIO(archive.read(f"{root}/data.pkl")))
        self.archive, self.root = archive, root

    def find_class(self, module: str, name: str) -> Any:
        if module.startswith("__torch__"):
            return _Module
        if module == "torch" and name in _DTYPES:
            return _DTYPES[name]
        if (module, name) == ("torch._utils", "_rebuild_tensor_v2"):
            return self.tensor
        if (module, name) == ("collections", "OrderedDict"):
            return OrderedDict
        if module == "torch.jit._pickle" and name in _LISTS:
            return self.plain
        raise pickle.UnpicklingError(f"Unsupported global: {module}.{name} in a TorchScript archive")

    def persistent_load(self, pid: Any) -> Tensor:
        """("storage", dtype, number, device, length) -> (length,), on the CPU wherever it was."""
        _, dtype, key, _, length = pid
        name = f"{self.root}/data/{key}"
        if (size := self.archive.getinfo(name).file_size) != length * dtype.itemsize:
            raise ValueError(f"storage {key} has {size} bytes instead of {length} x {dtype.itemsize}")
        numbers = bytearray(self.archive.read(name))  # which checks their CRC
        return torch.frombuffer(numbers, dtype=dtype) if numbers else torch.empty(0, dtype=dtype)

    def tensor(self, storage: Tensor, offset: int, size: tuple[int, ...], stride: tuple[int, ...], *_: Any) -> Tensor:
        return storage.as_strided(size, stride, offset)

    def plain(self, value: Any, *_: Any) -> Any:
        return value


def is_torchscript(archive: zipfile.ZipFile) -> bool:
    """Whether torch.jit.save wrote it: beside its data are the constants of a program."""
    return any(name.count("/") == 1 and name.endswith("/constants.pkl") for name in archive.namelist())


def read_torchscript(archive: zipfile.ZipFile) -> dict[str, Tensor]:
    """All tensors among the attributes of the archive's modules, by dotted name, as the archive has them.

    Raises:
        pickle.UnpicklingError: objects other than modules, tensors and plain values.
        Exception: of many types, for a damaged archive.
    """
    root = next(name for name in archive.namelist() if name.endswith("/data.pkl") and name.count("/") == 1)
    root = root.removesuffix("/data.pkl")
    if f"{root}/byteorder" in archive.namelist() and archive.read(f"{root}/byteorder") != b"little":
        raise ValueError("its numbers have the byte order of another machine")
    module = _Unpickler(archive, root).load()
    if not isinstance(module, _Module):
        raise ValueError(f"expected a module; got {type(module).__name__}")
    return dict(_tensors(module))


def _tensors(module: _Module, prefix: str = "") -> list[tuple[str, Tensor]]:
    found = []
    for name, value in module.attributes.items():
        if isinstance(value, _Module):
            found += _tensors(value, f"{prefix}{name}.")
        elif isinstance(value, Tensor):
            found.append((f"{prefix}{name}", value))
    return found
