"""DoRA's layer against peft's."""

from __future__ import annotations

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from tuning.models import make

from tempme_vl.tuning import find_tuning
from tempme_vl.tuning.dora import Dora, DoraLinear

SIDES = {
    "lora_A": "lora_A.default.weight",
    "lora_B": "lora_B.default.weight",
    "lora_magnitude": "lora_magnitude_vector.default.weight",
}


@pytest.mark.parametrize("dropout", [0.0, 0.4])
@pytest.mark.parametrize("bias", [True, False])
def test_layer_and_merged_weight_equal_pefts(dropout: float, bias: bool) -> None:
    torch.manual_seed(0)
    linear = nn.Linear(12, 20, bias).double()
    ours = nn.Sequential(DoraLinear(nn.Linear(12, 20, bias).double(), 3, 2.0, dropout))
    config = LoraConfig(r=3, lora_alpha=6, lora_dropout=dropout, target_modules=["0"], use_dora=True)
    theirs = get_peft_model(nn.Sequential(linear), config)
    ours.load_state_dict({f"0.{name}": value for name, value in linear.state_dict().items()}, strict=False)
    with torch.no_grad():
        for side, name in SIDES.items():
            made = torch.rand_like(ours.get_parameter(f"0.{side}")) + 0.5
            ours.get_parameter(f"0.{side}").copy_(made)
            theirs.get_parameter(f"base_model.model.0.{name}").copy_(made)

    x = torch.randn(5, 7, 12, dtype=torch.float64)
    given = torch.randn(5, 7, 12, dtype=torch.float64, requires_grad=True)
    results = []
    for model in (ours, theirs):
        torch.manual_seed(1)
        y = model(given)
        (gradient,) = torch.autograd.grad(y.cos().sum(), given, retain_graph=True)
        y.cos().sum().backward(inputs=[p for name, p in model.named_parameters() if "lora_" in name])
        results.append((y, gradient))
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)
    for side, name in SIDES.items():
        gradient = theirs.get_parameter(f"base_model.model.0.{name}").grad
        assert gradient.abs().max() > 0
        torch.testing.assert_close(ours.get_parameter(f"0.{side}").grad, gradient, rtol=1e-12, atol=1e-12)

    state = Dora(rank=3, alpha=6.0).plain(ours.state_dict())
    merged = theirs.merge_and_unload()
    assert state.keys() == merged.state_dict().keys()
    torch.testing.assert_close(state["0.weight"], merged[0].weight, rtol=1e-5, atol=1e-6)  # merged in float32
    torch.testing.assert_close(nn.functional.linear(x, merged[0].weight, merged[0].bias), ours.eval()(x))


def test_it_starts_as_the_layer_to_the_last_bit() -> None:
    linear, x = nn.Linear(12, 20), torch.randn(5, 12)
    assert torch.equal(DoraLinear(linear, 3, 1.0, 0.0)(x), nn.functional.linear(x, linear.weight) + linear.bias)


def test_what_is_not_linear_is_refused() -> None:
    with pytest.raises(ValueError, match=r"dora works on linear layers; frontend.embed.conv1 is PatchProjection"):
        make("CLIP", find_tuning("dora", {"targets": ("conv1",)}))
