"""Two methods from outside of the package, as docs/add_a_method.md adds them: each a file and a line."""

from __future__ import annotations

import importlib
import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from integrations import tiny_post
from torch import nn
from torch.optim import SGD, AdamW
from torch.utils.data import Dataset
from training.models import train_config
from training.processes import run

import tempme_vl
from tempme_vl import METHODS, VisualFrontend, create_frontend
from tempme_vl.evaluation.efficiency import cost_row
from tempme_vl.evaluation.papers import Setting
from tempme_vl.integrations import compress, load_compressed
from tempme_vl.merging import is_of_merging
from tempme_vl.recipes.build import merging
from tempme_vl.recipes.options.shared import MergeOptions
from tempme_vl.tasks.retrieval import create_retrieval_model
from tempme_vl.training import distributed
from tempme_vl.training.engine import Trainer
from tempme_vl.training.optim import parameter_groups

PAGE = Path(__file__).parents[2] / "docs" / "add_a_method.md"
FRAMES, SIDE = 4, 32
OPTIONS: dict[str, dict[str, Any]] = {"scaled": {"r": 2}, "cls_pruning": {"keep": 0.5}}
each = pytest.mark.parametrize("method", OPTIONS)


def add(folder: Path) -> None:
    """The page's files, and its line for each."""
    blocks = re.findall(r"```python\n# (\w+)\.py\n(.*?)```", PAGE.read_text(), re.S)
    assert [name for name, _ in blocks] == list(OPTIONS)
    for name, text in blocks:
        (folder / f"{name}.py").write_text(text)
        METHODS.register(name, importlib.import_module(name).METHOD)


@pytest.fixture(autouse=True)
def methods(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.syspath_prepend(tmp_path)
    add(tmp_path)
    yield
    for name in OPTIONS:
        METHODS.unregister(name)
        del sys.modules[name]


def video(rows: int = 2) -> torch.Tensor:
    return torch.randn(rows, FRAMES, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(0))


@each
def test_a_front_end_counts_saves_and_loads(method: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    frontend = create_frontend("open_clip:tiny", method=method, num_frames=FRAMES, **OPTIONS[method]).eval()
    with torch.no_grad():
        for name, weight in frontend.named_parameters():
            if is_of_merging(frontend, name):
                weight.add_(0.5)
    output = frontend(video(), trace_source=True)
    assert output.tokens.shape[1] == frontend.schedule.output_tokens < FRAMES * frontend.shape.tokens
    dropped = (output.source < 0).sum(1)
    assert torch.equal(output.size.sum((1, 2)).long() + dropped, torch.full((2,), FRAMES * frontend.shape.tokens))
    assert bool(dropped.any()) == (method == "cls_pruning")
    frontend.set_grad_checkpointing()
    torch.testing.assert_close(frontend(video()).tokens, output.tokens)
    frontend.save_pretrained(tmp_path / "saved")
    again = VisualFrontend.from_pretrained(tmp_path / "saved").eval()
    assert torch.equal(again(video()).tokens, output.tokens)
    # as weights of a tower, and under open_clip's names, without what merging has learnt
    tower = create_frontend("open_clip:tiny", str(tmp_path / "saved"), method="none", num_frames=FRAMES)
    assert tower.openai_state_dict().keys() == frontend.openai_state_dict().keys()


@each
@pytest.mark.slow
def test_it_can_be_exported(method: str) -> None:
    frontend = create_frontend("open_clip:tiny", method=method, num_frames=FRAMES, **OPTIONS[method]).eval()
    with torch.no_grad():
        expected = frontend(video())
        exported = torch.export.export(frontend, (video(),)).module()(video())
    torch.testing.assert_close(exported.tokens, expected.tokens, rtol=0, atol=1e-5)


@each
def test_recipes_and_tables_know_it(method: str) -> None:
    given = tuple(f"{name}={json.dumps(value)}" for name, value in OPTIONS[method].items())
    keywords = merging(MergeOptions(method=method, method_options=given), FRAMES)
    frontend = create_frontend("open_clip:tiny", **keywords)
    assert frontend.schedule.method == method and method in tempme_vl.METHODS
    row = cost_row(Setting("B/32", 12, method, options=OPTIONS[method]))
    assert row.tokens < row.input_tokens and row.gflops < cost_row(Setting("B/32")).gflops


def test_what_it_learns_has_the_rate_of_new_modules() -> None:
    model = create_retrieval_model("open_clip:tiny", None, "scaled", FRAMES, r=2)
    new = [name for name, _ in model.named_parameters() if model.is_new_parameter(name)]
    layers = range(len(model.frontend.blocks))
    assert new == [f"frontend.blocks.{layer}.after_attention.scale.weight" for layer in layers]
    groups = parameter_groups(model, 1e-7, 1e-4, 0.0, model.is_new_parameter)
    assert sum(len(group["params"]) for group in groups if group["lr"] == 1e-4) == len(new)
    before = model.frontend.blocks[0].after_attention.scale.weight.detach().clone()
    optimizer = SGD(groups)
    for _ in range(10):
        optimizer.zero_grad()
        model.frontend(video()).tokens.square().mean().backward()
        optimizer.step()
    assert not torch.equal(model.frontend.blocks[0].after_attention.scale.weight, before)


class Pooled(nn.Module):
    """A front end as the trainer wants a model."""

    def __init__(self, method: str):
        super().__init__()
        torch.manual_seed(0)
        self.frontend = create_frontend("open_clip:tiny", method=method, num_frames=FRAMES, **OPTIONS[method])

    def forward(self, batch: dict[str, Any]) -> dict[str, torch.Tensor]:
        return {"y": self.frontend(batch["video"]).pooled}


class Videos(Dataset):
    def __len__(self) -> int:
        return 8

    def __getitem__(self, key: tuple[int, int]) -> dict[str, Any]:
        return {"video": video(8)[key[1]], "name": f"video-{key[1]}"}


def train(output: Path, method: str, steps: int, resume: str) -> tuple[int, dict[str, torch.Tensor], bool]:
    """Trains to a step, saves and exports; gives the step, the weights, and whether the exported folder has them."""
    folder = output.with_name(f"{output.name} files {steps}")
    folder.mkdir()
    sys.path.insert(0, str(folder))
    add(folder)
    distributed.initialize()
    model = Pooled(method)
    groups = parameter_groups(model, 1e-3, 1e-1, 0.1, lambda name: is_of_merging(model, name))
    trainer = Trainer(model, AdamW(groups), Videos(), train_config(output, epochs=5, batch_size=4, resume=resume))
    for batch in trainer.batches():
        trainer.update(batch, lambda features, _: features["y"].square().mean())
        if trainer.step == steps:
            break
    trainer.save()
    trainer.export(output / "best", lambda target, _: model.frontend.save_pretrained(target))
    state = {name: weight.clone() for name, weight in trainer.full_state_dict().items()}
    exported = VisualFrontend.from_pretrained(output / "best").state_dict()
    same = all(torch.equal(state[f"frontend.{name}"], weight) for name, weight in exported.items())
    return trainer.step, state, same


@pytest.mark.parametrize("method", ["scaled", pytest.param("cls_pruning", marks=pytest.mark.slow)])
def test_ten_steps_resumed_after_five_are_ten_steps(method: str, tmp_path: Path) -> None:
    ((_, whole, same),) = run(train, tmp_path / "whole", method, 10, "never")
    ((half, middle, _),) = run(train, tmp_path / "parts", method, 5, "never")
    ((step, parts, same_again),) = run(train, tmp_path / "parts", method, 10, "auto")
    assert (half, step) == (5, 10) and same and same_again
    assert whole.keys() == parts.keys() and all(torch.equal(whole[name], parts[name]) for name in whole)
    learnt = [name for name in whole if ".scale." in name]
    assert bool(learnt) == (method == "scaled") and not any(torch.equal(whole[name], middle[name]) for name in learnt)


def test_it_works_behind_a_tower_with_what_it_learns(tmp_path: Path) -> None:
    model, processor = tiny_post.build("InternVL")
    compressed = compress(model, processor, "scaled", tiny_post.FRAMES, r=2, steps=2)
    assert list(compressed.merging) == ["0", "1"] and sum(p.numel() for p in compressed.merging.parameters()) > 0
    frames = tiny_post.video(0)
    ask = f"{tiny_post.placeholder('InternVL')} why"
    with torch.no_grad():
        first = compressed(**compressed.prepare(ask, [frames])).logits
        for weight in compressed.merging.parameters():
            weight.mul_(3)
        other = compressed(**compressed.prepare(ask, [frames])).logits
        assert (first - other).abs().max() > 1e-3
        compressed.save_pretrained(tmp_path)
        again = load_compressed(tmp_path)
        torch.testing.assert_close(again(**again.prepare(ask, [frames])).logits, other)
    loss = compressed(**compressed.prepare(ask, [frames], labels=True)).loss
    loss.backward()
    assert all(weight.grad is not None for weight in compressed.merging.parameters())


def test_what_reads_attention_is_refused_where_there_is_none() -> None:
    model, processor = tiny_post.build("InternVL")
    with pytest.raises(ValueError, match=r"'cls_pruning' does not work behind a tower: it reads attention"):
        compress(model, processor, "cls_pruning", tiny_post.FRAMES, keep=0.5)
    with pytest.raises(ValueError, match=r"'cls_pruning' reads the attention of CLS tokens, and this tower has none"):
        create_frontend("umt:tiny", method="cls_pruning", num_frames=FRAMES, keep=0.5)
    with pytest.raises(ValueError, match="'r' are missing"):
        compress(model, processor, "scaled", tiny_post.FRAMES)
