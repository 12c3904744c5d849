"""The published update rules: CLIP4Clip's BertAdam and TempMe's AdamW, step for step what their own code makes.

The reference tensors are random weights and gradients, and the weights that the original code made of them
(ArrowLuo/CLIP4Clip 508ffa3, modules/optimization.py; LunarShen/TempMe e624930, tvr/models/optimization_adamw.py).
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from tempme_vl.training.optim import AdamWTempMe, BertAdam, cosine_from_zero, cosine_whole, parameter_groups

DATA = Path(__file__).parent / "data" / "tuning"


class Held(nn.Module):
    """Parameters under dotted names."""

    def __init__(self, weights: dict[str, Tensor]):
        super().__init__()
        for name, weight in weights.items():
            module: nn.Module = self
            *path, last = name.split(".")
            for part in path:
                if not hasattr(module, part):
                    module.add_module(part, nn.Module())
                module = getattr(module, part)
            module.register_parameter(last, nn.Parameter(weight.float()))


def part(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}


def give(model: nn.Module, gradients: dict[str, Tensor]) -> None:
    for name, parameter in model.named_parameters():
        parameter.grad = gradients[name].float()


def test_bertadam_is_clip4clips() -> None:
    tensors = load_file(DATA / "bertadam.safetensors")
    model = Held(part(tensors, "w."))
    groups = parameter_groups(model, 1e-2 * 1e-2, 1e-2, 0.2, lambda name: "clip." not in name, "no_bias")
    optimizer = BertAdam(groups)
    peaks = [group["lr"] for group in groups]
    for step in range(5):
        give(model, part(tensors, f"in.grad.{step}."))
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for group, peak in zip(optimizer.param_groups, peaks, strict=True):
            group["lr"] = peak * cosine_whole(step, 10, 0.2)
        optimizer.step()
        for name, parameter in model.named_parameters():
            expected = tensors[f"out.param.{step}.{name}"]
            torch.testing.assert_close(parameter.detach(), expected, rtol=0, atol=1e-6, msg=f"{name} after step {step}")
        after = [peak * cosine_whole(step + 1, 10, 0.2) for peak in (1e-4, 1e-2, 1e-4)]
        assert after == pytest.approx(tensors[f"out.lr_after.{step}"].tolist(), rel=1e-6)


def test_adamw_is_tempmes() -> None:
    tensors = load_file(DATA / "adamw_tempme.safetensors")
    model = Held(part(tensors, "w."))
    groups = parameter_groups(model, 6e-4, 6e-4, 0.2, lambda name: False, "all")
    assert len(groups) == 1
    optimizer = AdamWTempMe(groups)
    for step in range(6):
        give(model, part(tensors, f"in.grad.{step}."))
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.param_groups[0]["lr"] = 6e-4 * cosine_from_zero(step, 12, 2 / 12)
        assert optimizer.param_groups[0]["lr"] == pytest.approx(float(tensors[f"out.lr_used.{step}"]), rel=1e-9)
        optimizer.step()
        for name, parameter in model.named_parameters():
            expected = tensors[f"out.param.{step}.{name}"]
            torch.testing.assert_close(parameter.detach(), expected, rtol=0, atol=1e-6, msg=f"{name} after step {step}")
