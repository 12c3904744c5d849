"""Parameter groups and the learning-rate curve."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch
from training.models import small_model

from tempme_vl.training.optim import find_schedule, parameter_groups, warmup_cosine
from tempme_vl.tuning import CLIP4Clip


def test_each_trainable_parameter_is_in_its_one_group() -> None:
    model = small_model()
    model.tune(CLIP4Clip())
    groups = parameter_groups(model, lr=1e-7, lr_new=1e-4, weight_decay=0.2, is_new=model.is_new_parameter)
    found = {id(parameter): group for group in groups for parameter in group["params"]}
    assert len(found) == sum(len(group["params"]) for group in groups)
    trainable = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert len(trainable) < len(list(model.parameters()))
    assert found.keys() == {id(parameter) for parameter in trainable.values()}
    for name, parameter in trainable.items():
        group = found[id(parameter)]
        assert group["lr"] == (1e-4 if "clip_position" in name else 1e-7), name
        assert group["weight_decay"] == (0.2 if parameter.ndim >= 2 else 0.0), name
    assert found[id(model.logit_scale.log_scale)]["weight_decay"] == 0.0
    assert sum(group["lr"] == 1e-4 for group in groups) == 1


def test_nothing_new_gives_no_empty_group() -> None:
    groups = parameter_groups(torch.nn.Linear(3, 2), 1.0, 2.0, 0.1, lambda name: False)
    assert [len(group["params"]) for group in groups] == [1, 1]


def test_curve_warms_up_peaks_and_ends_at_the_floor() -> None:
    curve = [warmup_cosine(step, 100, 0.1) for step in range(101)]
    assert curve[:10] == pytest.approx([(step + 1) / 10 for step in range(10)])
    assert max(curve) == 1.0 == curve[10]
    assert all(a > b for a, b in pairwise(curve[10:]))
    assert curve[55] == pytest.approx(0.5)
    assert curve[100] == pytest.approx(0.0)
    assert warmup_cosine(200, 100, 0.1) == pytest.approx(0.0)


def test_curve_without_warmup_and_with_a_floor() -> None:
    assert warmup_cosine(0, 10, 0.0, 0.1) == 1.0
    assert warmup_cosine(10, 10, 0.0, 0.1) == pytest.approx(0.1)
    assert warmup_cosine(5, 10, 0.0, 0.1) == pytest.approx(0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi / 2)))
    assert warmup_cosine(0, 1, 1.0) == 1.0


def test_the_curve_of_pre_training_falls_by_epochs() -> None:
    """From 1e-6 to 5e-6 in 5000 steps, then 0.95 of it after every epoch, 5e-7 at the least."""
    steps, epochs = 20_000, 60
    curve = find_schedule("by_epoch", epochs)

    def rate(step: int) -> float:
        return 5e-6 * curve(step, steps * epochs, 5000 / (steps * epochs), 0.1)

    assert [rate(step) for step in (0, 2500, 5000, steps - 1)] == pytest.approx([1e-6, 3e-6, 5e-6, 5e-6])
    assert [rate(steps * epoch) for epoch in (1, 2)] == pytest.approx([4.75e-6, 4.5125e-6])
    assert rate(3 * steps - 1) == rate(2 * steps)
    assert rate(44 * steps) == pytest.approx(5e-6 * 0.95**44) and rate(45 * steps) == pytest.approx(5e-7)
    with pytest.raises(ValueError, match=r"schedule is one of cosine, .*, by_epoch; got 'linear'"):
        find_schedule("linear", 1)
