"""Which parameters decay, which curve a run follows, and what a rule that looks at single tensors needs."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from training.models import Line, Numbers, small_model, train_config
from training.processes import run

from tempme_vl.training import distributed
from tempme_vl.training.engine import Trainer
from tempme_vl.training.optim import SCHEDULES, BertAdam, parameter_groups


def decaying(decay: str) -> tuple[set[str], set[str]]:
    """Names of the parameters that decay, and of those that do not."""
    model = small_model()
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    groups = parameter_groups(model, 1.0, 2.0, 0.2, lambda name: "clip_position" in name, decay)
    sides: tuple[set[str], set[str]] = (set(), set())
    for group in groups:
        sides[group["weight_decay"] == 0.0].update(names[id(parameter)] for parameter in group["params"])
    assert len(sides[0] | sides[1]) == len(names)
    return sides


def test_what_decays_is_ours_clip4clips_or_tempmes() -> None:
    norm, scale = "frontend.embed.ln_pre.weight", "logit_scale.log_scale"
    ours, none = decaying("matrices")
    assert {norm, scale} <= none and "frontend.embed.conv1.weight" in ours
    theirs, none = decaying("no_bias")
    assert {norm, scale, *ours} - {name for name in ours if "bias" in name} <= theirs
    assert none == {name for name in (*theirs, *none) if "bias" in name} and none
    assert decaying("all")[1] == set()


def rates(output: Path, schedule: str, floor: float = 0.0) -> list[float]:
    distributed.initialize()
    model = Line()
    rule = torch.optim.SGD(model.parameters(), lr=2.0)
    config = train_config(output, batch_size=4, schedule=schedule, warmup=1 / 3, epochs=2, lr_floor=floor)
    trainer = Trainer(model, rule, Numbers(), config)
    found = []
    for batch in trainer.batches():
        found.append(max(trainer.engine.get_lr()))
        trainer.update(batch, lambda y, _: y["y"].mean())
    return found


def test_the_curve_of_a_run_is_the_one_that_is_asked_for(tmp_path: Path) -> None:
    found = {name: run(rates, tmp_path / name, name)[0] for name in SCHEDULES}
    falling = pytest.approx([2.0, 1.7071, 1.0, 0.2929], abs=1e-4)  # a cosine over the four steps after the warm-up
    assert found["cosine"][:2] == [1.0, 2.0] and found["cosine"][2:] == falling
    assert found["cosine_from_zero"][:2] == [0.0, 1.0] and found["cosine_from_zero"][2:] == falling
    whole = [0.0, 1.0, 1.5, 1.0, 0.5, 0.1340]  # from the third step on a cosine over all six
    assert found["cosine_whole"] == pytest.approx(whole, abs=1e-4)


def refused(output: Path, stage: str, **changes: str) -> str:
    distributed.initialize()
    model = Line()
    try:
        Trainer(model, BertAdam(model.parameters()), Numbers(), train_config(output, stage, batch_size=4, **changes))
    except ValueError as error:
        return str(error)
    return ""


def _refused(output: Path, stage: str, precision: str, schedule: str) -> str:
    return refused(output, stage, precision=precision, schedule=schedule)


def test_a_rule_that_looks_at_single_tensors_needs_them_whole(tmp_path: Path) -> None:
    assert run(_refused, tmp_path, "zero0", "fp32", "cosine") == [""]
    for stage, precision in (("zero1", "fp32"), ("zero3", "fp32"), ("zero0", "bf16")):
        (said,) = run(_refused, tmp_path, stage, precision, "cosine")
        assert "BertAdam clips every tensor by itself" in said and "zero0.json" in said
    (said,) = run(_refused, tmp_path, "zero0", "fp32", "linear")
    assert "by_epoch; got 'linear'" in said


def test_bertadam_clips_every_tensor_to_norm_1_by_itself() -> None:
    moved = []
    for size in (1.0, 40.0):
        small, large = (torch.nn.Parameter(torch.zeros(4)) for _ in range(2))
        rule = BertAdam([small, large], lr=0.1)
        small.grad, large.grad = torch.full((4,), 0.01), torch.tensor([0.0, 0.6, 0.8, 0.0]) * size
        rule.step()
        moved.append(torch.cat([small.detach(), large.detach(), rule.state[large]["exp_avg"]]))
    torch.testing.assert_close(moved[0], moved[1], rtol=1e-5, atol=0)
    assert float(rule.state[large]["exp_avg"].norm()) == pytest.approx(0.1, rel=1e-5)


def test_the_curve_ends_at_its_floor(tmp_path: Path) -> None:
    (found,) = run(rates, tmp_path, "cosine", 0.4)
    assert found[2] == 2.0 and min(found) == found[-1]
    assert found[-1] == pytest.approx(0.4 * 2.0 + 0.6 * 0.2929, abs=1e-4)
