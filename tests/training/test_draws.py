"""What the engine must not get wrong without a word: what is drawn when, clipping, orders, the best of equals."""

from __future__ import annotations

from itertools import chain, pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from training.models import Line, Numbers, line_trainer, train_config
from training.processes import run

from tempme_vl.training import distributed
from tempme_vl.training.caching import cached_update
from tempme_vl.training.engine import Trainer
from tempme_vl.training.sampler import StepSampler


class Drawing(Line):
    """A line that notes a number drawn in each forward pass."""

    def __init__(self) -> None:
        super().__init__()
        self.drawn: list[float] = []

    def forward(self, batch: dict[str, Any]) -> dict[str, Tensor]:
        self.drawn.append(float(torch.rand(())))
        return super().forward(batch)


def drawn(output: Path, seed: int = 0) -> list[float]:
    """What a model draws in four steps."""
    distributed.initialize()
    model = Drawing()
    rule = torch.optim.SGD(model.parameters(), lr=0.1)
    trainer = Trainer(model, rule, Numbers(), train_config(output, batch_size=4, seed=seed))
    for batch in trainer.batches():
        if trainer.step == 4:
            break
        trainer.update(batch, lambda y, _: y["y"].mean())
    return model.drawn


def test_every_step_rank_and_seed_draws_its_own(tmp_path: Path) -> None:
    first, second = run(drawn, tmp_path / "two", world=2)
    (again,) = run(drawn, tmp_path / "one")
    (other,) = run(drawn, tmp_path / "other", 1)
    assert again == first
    assert len({*first, *second, *other}) == 12


def gradient_step(output: Path, clip: float, stage: str) -> float:
    """How far a step of SGD at rate 1 moves y = w x + b where the gradient is 300 for each x of 100."""
    distributed.initialize()
    model = Line()
    rule = torch.optim.SGD(model.parameters(), lr=1.0)
    changes = {"batch_size": 4, "clip_grad": clip, "warmup": 0.0}
    trainer = Trainer(model, rule, Numbers(), train_config(output, stage, **changes))
    batch = {"x": torch.full((4, 1), 0.0), "name": ["a"] * 4}
    trainer.update(batch, lambda y, _: 300 * y["y"].mean())
    return 0.0 - float(trainer.full_state_dict()["b"])


@pytest.mark.parametrize("stage", ["zero0", "zero1", "zero3"])
def test_a_gradient_is_clipped_to_the_norm_that_is_asked_for_and_not_at_all_at_0(tmp_path: Path, stage: str) -> None:
    moved = [run(gradient_step, tmp_path / f"run{clip}", clip, stage)[0] for clip in (0.0, 1.0, 30.0)]
    assert moved == pytest.approx([300.0, 1.0, 30.0], rel=1e-4)


def scores(output: Path) -> list[tuple[bool, float, int]]:
    trainer = line_trainer(output)
    answers = []
    for trainer.step, score in enumerate([-5.0, 2.0, 2.0, 1.0, 2.0, 3.0], start=1):
        answers.append((trainer.is_best(score), trainer.best_score, trainer.best_step))
    return answers


def test_the_first_of_equal_scores_is_the_best(tmp_path: Path) -> None:
    (answers,) = run(scores, tmp_path)
    assert answers == [
        (True, -5.0, 1),
        (True, 2.0, 2),
        (False, 2.0, 2),
        (False, 2.0, 2),
        (False, 2.0, 2),
        (True, 3.0, 6),
    ]


class Noisy(nn.Module):
    """Features behind dropout; keeps what each call gave."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.drop = nn.Linear(6, 5), nn.Dropout(0.5)
        self.scale = nn.Parameter(torch.tensor(0.5))
        self.given: list[Tensor] = []

    def forward(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        features = self.drop(self.layer(batch["x"]))
        self.given.append(features.detach().clone())
        return {"y": features, "scale": self.scale.exp()}


class Accumulating:
    """A stand-in for DeepSpeed's engine: gradients averaged over the chunks, as it averages them."""

    def __init__(self, model: nn.Module, chunks: int):
        self.model, self.chunks, self.steps = model, chunks, 0

    def __call__(self, batch: Any) -> Any:
        return self.model(batch)

    def backward(self, loss: Tensor) -> None:
        (loss / self.chunks).backward()

    def step(self) -> None:
        self.steps += 1


def test_gradient_caching_sees_the_same_dropout_twice_and_gives_the_gradient_of_what_it_saw() -> None:
    chunks, model = 4, Noisy()
    batch = {"x": torch.randn(12, 6, generator=torch.Generator().manual_seed(0)), "name": ["n"] * 12}
    engine = Accumulating(model, chunks)

    def loss_fn(features: Any, _: Any) -> Tensor:
        rows = features["y"]
        return (features["scale"] * rows @ rows.T).logsumexp(dim=0).mean()

    torch.manual_seed(7)
    loss = cached_update(engine, batch, loss_fn, chunks, lambda loss: None)
    after = torch.rand(())
    first, second = model.given[:chunks], model.given[chunks:]
    assert len(second) == chunks == engine.steps
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert len({tuple((part == 0).flatten().tolist()) for part in first}) == chunks
    cached = {name: weight.grad.clone() for name, weight in model.named_parameters()}

    # the whole batch at once, with the very masks
    model.zero_grad()
    rows = model.layer(batch["x"]) * (torch.cat(first) != 0) * 2
    whole = loss_fn({"y": rows, "scale": model.scale.exp()}, batch)
    whole.backward()
    assert float(loss) == pytest.approx(float(whole.detach()), rel=1e-5)
    for name, weight in model.named_parameters():
        torch.testing.assert_close(cached[name], weight.grad, rtol=1e-4, atol=1e-6)
    # a step draws as much as one that encodes once: what comes after does not depend on the second pass
    torch.manual_seed(7)
    for part in batch["x"].chunk(chunks):
        model({"x": part})
    assert torch.equal(torch.rand(()), after)


def test_neighbouring_seeds_and_epochs_share_no_order() -> None:
    orders = {}
    for seed in range(4):
        batches = list(StepSampler(40, 8, 4, seed))
        for epoch in range(4):
            indices = [index for _, index in chain.from_iterable(batches[5 * epoch : 5 * epoch + 5])]
            orders[seed, epoch] = tuple(indices)
    assert len(set(orders.values())) == len(orders) == 16


def test_an_order_is_far_from_the_order_of_the_file() -> None:
    indices = [index for batch in StepSampler(1000, 100, 1, seed=0) for _, index in batch]
    steps = [abs(b - a) for a, b in pairwise(indices)]
    assert sum(steps) / len(steps) == pytest.approx(1000 / 3, rel=0.1)  # of two independent uniform numbers
