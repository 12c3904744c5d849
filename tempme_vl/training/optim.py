"""Parameter groups and the learning-rate curve."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from torch import nn


def parameter_groups(
    model: nn.Module, lr: float, lr_new: float, weight_decay: float, is_new: Callable[[str], bool]
) -> list[dict[str, Any]]:
    """Trainable parameters in up to four groups: pretrained or new, with or without weight decay.

    Vectors and scalars (biases, norms, the logit scale) do not decay.

    Args:
        lr, lr_new: peak rates of pretrained and of new parameters.
        is_new: tells new parameters by name.
    """
    groups: dict[tuple[bool, bool], dict[str, Any]] = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        new, decays = is_new(name), parameter.ndim >= 2
        group = groups.setdefault(
            (new, decays),
            {"params": [], "lr": lr_new if new else lr, "weight_decay": weight_decay if decays else 0.0},
        )
        group["params"].append(parameter)
    return list(groups.values())


def warmup_cosine(step: int, total_steps: int, warmup: float, floor: float = 0.0) -> float:
    """The factor on the peak rate: linear warm-up over a share of the steps, then a cosine down to `floor`."""
    warmup_steps = int(warmup * total_steps)
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    progress = (step - warmup_steps) / max(1, total_steps - warmup_steps)
    return floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))
