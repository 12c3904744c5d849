"""A pre-training file of UMT converts to what the original code loads into its retrieval and QA models from it."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import pytest
import torch
from parity.umt import UmtCase, umt_cases
from torch import Tensor

from tempme_vl.backbones.umt_checkpoint import Target, convert, detect_form, read_checkpoint

TARGETS: dict[str, Target] = {"ret": "retrieval", "qa": "qa"}
# The reference's tensor file leaves these out: they equal the word embeddings and cls.predictions.bias, as the real
# files hold them.
TIED = {
    "text_encoder.cls.predictions.decoder.weight": "text_encoder.bert.embeddings.word_embeddings.weight",
    "text_encoder.cls.predictions.decoder.bias": "text_encoder.cls.predictions.bias",
}


def released(case: UmtCase) -> dict[str, Tensor]:
    """The state dict as the real file holds it."""
    return case.tensors | {name: case.tensors[twin] for name, twin in TIED.items()}


def without_positions(keys: Iterable[str]) -> set[str]:
    """Position indices are a buffer of the original's library, and no weight."""
    return {key for key in keys if not key.endswith(".position_ids")}


@pytest.mark.parametrize("form", TARGETS)
@pytest.mark.parametrize("complete", [True, False], ids=["released", "without tied"])
@pytest.mark.parametrize("case", umt_cases("umt_pretrain_ckpt_*"), ids=str)
def test_conversion(case: UmtCase, complete: bool, form: str) -> None:
    state = released(case) if complete else case.tensors
    assert detect_form(state) == "pretraining"
    converted, reference = convert(state, TARGETS[form]), case.entry["conversion"][form]
    report = converted.report
    assert not report.unexplained
    assert set(report.missing) == set(reference["missing"])
    assert without_positions(report.unexpected) == {key for key in reference["unexpected"] if key in state}
    assert set(converted.state) == without_positions(reference["source_of"])
    for key, sources in reference["source_of"].items():
        if not key.endswith(".position_ids"):
            assert any(converted.state[key] is state[name] for name in sources if name in state), key
            assert all(torch.equal(converted.state[key], state[name]) for name in sources if name in state), key


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
@pytest.mark.parametrize("case", umt_cases("umt_pretrain_ckpt_*"), ids=str)
def test_file_comes_back(case: UmtCase, suffix: str, tmp_path: Path) -> None:
    path = case.path
    if suffix == ".pth":
        path = tmp_path / "pretrained.pth"
        torch.save({"model": released(case)}, path)
    loaded = read_checkpoint(path)
    assert detect_form(loaded) == "pretraining"
    assert loaded.keys() == (case.tensors if suffix == ".safetensors" else released(case)).keys()
    assert all(torch.equal(loaded[key], value) for key, value in case.tensors.items())
