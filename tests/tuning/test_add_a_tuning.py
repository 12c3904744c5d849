"""Two ways of tuning from outside of the package, as docs/add_a_tuning.md adds them: each a file and a line."""

from __future__ import annotations

import importlib
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from recipes.runs import COMMANDS
from torch.optim import AdamW
from training.models import train_config
from training.processes import run
from tuning.models import Pairs, make, outputs

from tempme_vl import TUNINGS
from tempme_vl.recipes.options.shared import TuningOptions
from tempme_vl.tasks.retrieval import RetrievalModel, load_retrieval_model
from tempme_vl.training import distributed
from tempme_vl.training.engine import Trainer
from tempme_vl.training.optim import parameter_groups

PAGE = Path(__file__).parents[2] / "docs" / "add_a_tuning.md"
KINDS = {"scaled_blocks": "ScaledBlocks", "last_block": "LastBlock"}
LEARNS = {"scaled_blocks": "tuned.scale.weight", "last_block": "last_scale"}
each = pytest.mark.parametrize("name", KINDS)


def add(folder: Path) -> None:
    """The page's files, and its line for each."""
    blocks = re.findall(r"```python\n# (\w+)\.py\n(.*?)```", PAGE.read_text(), re.S)
    assert [name for name, _ in blocks] == list(KINDS)
    for name, text in blocks:
        (folder / f"{name}.py").write_text(text)
        TUNINGS.register(name, getattr(importlib.import_module(name), KINDS[name]))


@pytest.fixture(autouse=True)
def tunings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.syspath_prepend(tmp_path)
    add(tmp_path)
    yield
    for name in KINDS:
        TUNINGS.unregister(name)
        del sys.modules[name]


@each
def test_recipes_know_it(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        COMMANDS["train retrieval"].parse(["--help"])
    assert name in capsys.readouterr().out
    options = COMMANDS["train retrieval"].parse(["--tuning", name])
    assert isinstance(options, TuningOptions) and options.tuned() == TUNINGS[name]()


@each
def test_a_model_starts_as_it_was_and_learns_what_is_new_at_its_rate(name: str) -> None:
    model = make("CLIP", name)
    assert torch.equal(outputs(model, "CLIP"), outputs(make("CLIP"), "CLIP"))
    new = {key for key, weight in model.named_parameters() if model.tuning.is_new(key) and weight.requires_grad}
    assert new and all(key.endswith(LEARNS[name]) for key in new)
    groups = parameter_groups(model, 1e-7, 1e-4, 0.0, model.is_new_parameter)
    fast = {id(weight) for group in groups if group["lr"] == 1e-4 for weight in group["params"]}
    assert {id(weight) for key, weight in model.named_parameters() if key in new} <= fast


def train(output: Path, name: str, steps: int, resume: str) -> tuple[int, dict[str, torch.Tensor], bool]:
    """Trains to a step, saves and exports: the step, the weights, and whether the exported folder is the model."""
    folder = output.with_name(f"{output.name} files {steps}")
    folder.mkdir()
    sys.path.insert(0, str(folder))
    add(folder)
    distributed.initialize()
    model = make("CLIP", name)
    assert isinstance(model, RetrievalModel)
    groups = parameter_groups(model, 1e-3, 1e-1, 0.1, model.is_new_parameter)
    trainer = Trainer(model, AdamW(groups), Pairs(model), train_config(output, epochs=5, batch_size=4, resume=resume))
    for batch in trainer.batches():
        trainer.update(batch, model.loss)
        if trainer.step == steps:
            break
    trainer.save()
    trainer.export(output / "best", lambda target, state: model.save_pretrained(target, state))
    state = {key: weight.clone() for key, weight in trainer.full_state_dict().items()}
    exported = outputs(load_retrieval_model(output / "best"), "CLIP")
    return trainer.step, state, torch.allclose(exported, outputs(model, "CLIP"), atol=1e-5)


@pytest.mark.parametrize("name", ["scaled_blocks", pytest.param("last_block", marks=pytest.mark.slow)])
def test_ten_steps_resumed_after_five_are_ten_steps(name: str, tmp_path: Path) -> None:
    ((_, whole, same),) = run(train, tmp_path / "whole", name, 10, "never")
    ((half, middle, _),) = run(train, tmp_path / "parts", name, 5, "never")
    ((step, parts, same_again),) = run(train, tmp_path / "parts", name, 10, "auto")
    assert (half, step) == (5, 10) and same and same_again
    assert whole.keys() == parts.keys() and all(torch.equal(whole[key], parts[key]) for key in whole)
    learnt = [key for key in whole if key.endswith(LEARNS[name])]
    assert learnt and not any(torch.equal(whole[key], middle[key]) for key in learnt)
