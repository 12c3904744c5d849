"""Files of weights: every kind comes back, and a damaged one is an error that names it."""

from __future__ import annotations

import json
import pickle
import zipfile
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import CLIPVisionConfig, CLIPVisionModel, LlamaConfig, LlamaForCausalLM

from tempme_vl import create_frontend
from tempme_vl.tasks.qa.llm import load_llm
from tempme_vl.weights.files import read_weights

STATE = {
    "tower.a": torch.arange(600.0).view(20, 30),
    "tower.b": torch.ones(5, dtype=torch.float16),
    "scale": torch.tensor(2.0),
}
# torch.jit, which says that it is old
OLD = pytest.mark.filterwarnings("ignore:.*torch.jit:FutureWarning", "ignore:.*torch.jit:DeprecationWarning")


class Held(nn.Module):
    """Tensors as attributes of nested modules, which TorchScript can save."""

    def __init__(self) -> None:
        super().__init__()
        self.tower = nn.Module()
        self.tower.register_parameter("a", nn.Parameter(STATE["tower.a"], requires_grad=False))
        self.tower.register_buffer("b", STATE["tower.b"])
        self.register_buffer("scale", STATE["scale"])
        self.sizes, self.name = [1, 2], "held"

    def forward(self, x: Tensor) -> Tensor:
        return x + self.sizes[0]


def shards(folder: Path, ending: str, save: Callable[[dict[str, Tensor], Path], object]) -> Path:
    """Two files and their index."""
    weight_map = {}
    for number, keys in enumerate((["tower.a"], ["tower.b", "scale"]), start=1):
        name = f"part-{number}.{ending}"
        save({key: STATE[key] for key in keys}, folder / name)
        weight_map |= dict.fromkeys(keys, name)
    stem = "model.safetensors" if ending == "safetensors" else "pytorch_model.bin"
    index = folder / f"{stem}.index.json"
    index.write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": weight_map}))
    return index


def write(kind: str, folder: Path) -> Path:
    file = folder / "weights.bin"
    if kind == "safetensors":
        file = folder / "weights.safetensors"
        save_file(STATE, file)
    elif kind == "safetensors by another name":
        save_file(STATE, file)
    elif kind == "zip":
        torch.save(STATE, file)
    elif kind == "old":
        torch.save(STATE, file, _use_new_zipfile_serialization=False)
    elif kind == "wrapped":
        wrapped = {f"module.{key}": value for key, value in STATE.items()}
        torch.save({"epoch": 3, "state_dict": wrapped, "optimizer": {"lr": 0.1}}, file)
    elif kind == "compiled":
        torch.save({"model": {f"_orig_mod.module.{key}": value for key, value in STATE.items()}}, file)
    elif kind == "TorchScript":
        torch.jit.save(torch.jit.script(Held()), str(file))
    elif kind == "shards of safetensors":
        file = shards(folder, "safetensors", save_file)
    elif kind == "shards of torch.save":
        file = shards(folder, "bin", torch.save)
    return file


KINDS = [
    *("safetensors", "safetensors by another name", "zip", "old", "wrapped", "compiled", "TorchScript"),
    *("shards of safetensors", "shards of torch.save"),
]


@OLD
@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_file_comes_back(kind: str, tmp_path: Path) -> None:
    file = write(kind, tmp_path)
    found = read_weights(file)
    assert found.path == file
    assert found.state.keys() == STATE.keys()
    for key, value in STATE.items():
        assert found.state[key].dtype == value.dtype and torch.equal(found.state[key], value), key
    if kind.startswith("shards"):
        assert read_weights(tmp_path).state.keys() == STATE.keys() and found.kind == f"2 {kind}"


@OLD
@pytest.mark.parametrize("kind", KINDS)
def test_a_cut_file_is_an_error_of_one_line(kind: str, tmp_path: Path) -> None:
    index = write(kind, tmp_path)
    file = tmp_path / "part-2.bin" if "torch.save" in kind else index
    file = tmp_path / "part-1.safetensors" if kind == "shards of safetensors" else file
    whole = file.read_bytes()
    for kept in (0, 1, 5, 70, len(whole) // 3, len(whole) // 2, len(whole) - 100, len(whole) - 1):
        file.write_bytes(whole[:kept])
        with pytest.raises(ValueError, match=f"{file.name} (cannot be read|is not a pickle)") as caught:
            read_weights(index)
        assert "\n" not in str(caught.value)


def mutated(content: bytes, random: Random) -> bytes:
    changed, place = bytearray(content), random.randrange(len(content))
    how = random.choice(("flip", "cut", "insert", "clear", "double"))
    if how == "flip":
        for _ in range(random.randrange(1, 4)):
            changed[random.randrange(len(content))] ^= 1 << random.randrange(8)
    elif how == "cut":
        del changed[place:]
    elif how == "insert":
        changed[place:place] = random.randbytes(random.randrange(1, 20))
    elif how == "clear":
        changed[place : place + 50] = bytes(len(changed[place : place + 50]))
    else:
        changed += changed[place:]
    return bytes(changed)


@OLD
@pytest.mark.parametrize("kind", KINDS)
def test_whatever_is_damaged_is_a_typed_error(kind: str, tmp_path: Path) -> None:
    """Or goes unseen, in formats that hold no checksums: then it may only be read as other numbers or names."""
    index, random = write(kind, tmp_path), Random(0)
    files = sorted(tmp_path.iterdir())
    refused = 0
    for _ in range(100):
        file = random.choice(files)
        whole = file.read_bytes()
        file.write_bytes(mutated(whole, random))
        try:
            state = read_weights(index).state
        except ValueError as error:
            assert any(file.name in str(error) for file in files) and "\n" not in str(error)
            refused += 1
        else:
            if "safetensors" not in kind and kind != "old":
                assert state.keys() == STATE.keys()
                assert all(torch.equal(value, STATE[key]) for key, value in state.items())
        file.write_bytes(whole)
    assert refused > 20


@pytest.mark.parametrize("what", ["tower", "language model"])
def test_a_cut_file_in_a_folder_of_transformers(what: str, tmp_path: Path) -> None:
    """Which that library reads itself."""
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 2, "num_hidden_layers": 2}
    model: Any = CLIPVisionModel(CLIPVisionConfig(**sizes, image_size=32, patch_size=8))
    if what == "language model":
        model = LlamaForCausalLM(LlamaConfig(**sizes, vocab_size=50))
    model.save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    whole = file.read_bytes()
    for kept in (0, 100, len(whole) // 2):
        file.write_bytes(whole[:kept])
        with pytest.raises(ValueError, match=r"(can be loaded from|could not load) .*header"):
            if what == "tower":
                create_frontend(f"hf:{tmp_path}", "default", method="none")
            else:
                load_llm(str(tmp_path))


@OLD
@pytest.mark.parametrize("kind", ["zip", "TorchScript"])
def test_a_changed_byte_is_noticed(kind: str, tmp_path: Path) -> None:
    """torch.load itself loads other numbers then, without a word."""
    file = write(kind, tmp_path)
    content = bytearray(file.read_bytes())
    place = content.index(STATE["tower.a"].numpy().tobytes()[400:600])
    content[place] ^= 0xFF
    file.write_bytes(content)
    with pytest.raises(ValueError, match=r"weights.bin cannot be read .*data/\d is damaged or missing"):
        read_weights(file)


def test_an_archive_without_checksums_is_read(tmp_path: Path) -> None:
    torch.serialization.set_crc32_options(False)
    try:
        file = write("zip", tmp_path)
    finally:
        torch.serialization.set_crc32_options(True)
    assert torch.equal(read_weights(file).state["tower.a"], STATE["tower.a"])


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:1\nsize 3\n", "a pointer of Git LFS"),
        (b"<!DOCTYPE html><html>Sign in</html>", "a web page"),
        (b"\x89PNG some picture", "cannot be read|is not a pickle"),
        (b"{}", "cannot be read|is not a pickle"),
    ],
)
def test_what_is_no_file_of_weights(content: bytes, message: str, tmp_path: Path) -> None:
    (tmp_path / "weights.pt").write_bytes(content)
    with pytest.raises(ValueError, match=message) as caught:
        read_weights(tmp_path / "weights.pt")
    assert "weights.pt" in str(caught.value) and "\n" not in str(caught.value)


def test_arrays_of_numpy_are_refused(tmp_path: Path) -> None:
    np.savez(tmp_path / "weights.npz", a=np.zeros(3))
    with pytest.raises(ValueError, match=r"weights.npz cannot be read .*a zip archive of arrays of numpy"):
        read_weights(tmp_path / "weights.npz")


class Code:
    """Leaves a file behind if its pickle is run."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self) -> tuple[object, ...]:
        return Path.touch, (self.path,)


@OLD
@pytest.mark.parametrize("kind", ["zip", "old", "TorchScript", "bare"])
def test_no_file_runs_code(kind: str, tmp_path: Path) -> None:
    code, file = Code(tmp_path / "ran"), tmp_path / "weights.bin"
    if kind == "bare":
        file.write_bytes(pickle.dumps(code, protocol=2))
    elif kind != "TorchScript":
        torch.save({"a": code}, file, _use_new_zipfile_serialization=kind == "zip")
    else:
        whole = write(kind, tmp_path).rename(tmp_path / "whole")
        with zipfile.ZipFile(whole) as source, zipfile.ZipFile(file, "w") as target:
            for name in source.namelist():
                content = pickle.dumps(code, protocol=2) if name.endswith("/data.pkl") else source.read(name)
                target.writestr(name, content)
    with pytest.raises(ValueError, match=r"weights.bin is not a pickle of only tensors .*Unsupported global"):
        read_weights(file)
    assert not (tmp_path / "ran").exists()


@OLD
def test_the_program_of_a_torchscript_archive_is_not_run(tmp_path: Path) -> None:
    """torch.jit.load would: it compiles the archive's code, and here finds that it is none."""
    whole, file = write("TorchScript", tmp_path).rename(tmp_path / "whole"), tmp_path / "weights.pt"
    with zipfile.ZipFile(whole) as source, zipfile.ZipFile(file, "w") as target:
        for name in source.namelist():
            target.writestr(name, b"no program" if "/code/" in name else source.read(name))
    assert torch.equal(read_weights(file).state["tower.a"], STATE["tower.a"])
    with pytest.raises(RuntimeError):
        torch.jit.load(str(file))


@pytest.mark.parametrize(
    ("index", "message"),
    [
        ("not json", "expected the index of shards"),
        ("[]", "expected the index of shards"),
        ('{"weight_map": {}}', "expected the index of shards"),
        ('{"weight_map": {"tower.a": 3}}', "expected the index of shards"),
        ('{"weight_map": {"tower.a": "../part-1.safetensors"}}', "expected the index of shards"),
        ('{"weight_map": {"tower.a": "part-3.safetensors"}}', "part-3.safetensors are not beside it"),
        ('{"weight_map": {"tower.c": "part-1.safetensors"}}', "tower.c are missing, tower.a are not named there"),
    ],
)
def test_an_index_that_does_not_fit_its_shards(index: str, message: str, tmp_path: Path) -> None:
    file = shards(tmp_path, "safetensors", save_file)
    file.write_text(index)
    with pytest.raises(ValueError, match=message):
        read_weights(tmp_path)


def test_a_folder_without_weights_says_what_is_there(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").touch()
    with pytest.raises(ValueError, match=r"is a folder without weights: expected one of model.safetensors.*notes.txt"):
        read_weights(tmp_path)
