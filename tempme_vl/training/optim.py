"""Optimizers: which parameters decay, the published update rules, and the learning-rate curves."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

# Which parameters decay, by their names and shapes.
DECAY: dict[str, Callable[[str, Tensor], bool]] = {
    "matrices": lambda name, parameter: parameter.ndim >= 2,  # not biases, norms, the logit scale
    "no_bias": lambda name, parameter: "bias" not in name,  # CLIP4Clip's code: norms and the logit scale decay, too
    "all": lambda name, parameter: True,  # TempMe's code
}


def parameter_groups(
    model: nn.Module,
    lr: float,
    lr_new: float,
    weight_decay: float,
    is_new: Callable[[str], bool],
    decay: str = "matrices",
) -> list[dict[str, Any]]:
    """Trainable parameters in up to four groups: pretrained or new, with or without weight decay.

    Args:
        lr, lr_new: peak rates of pretrained and of new parameters.
        is_new: tells new parameters by name.
        decay: a name in `DECAY`: which parameters decay.
    """
    groups: dict[tuple[bool, bool], dict[str, Any]] = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        new, decays = is_new(name), DECAY[decay](name, parameter)
        group = groups.setdefault(
            (new, decays),
            {"params": [], "lr": lr_new if new else lr, "weight_decay": weight_decay if decays else 0.0},
        )
        group["params"].append(parameter)
    return list(groups.values())


class BertAdam(torch.optim.Optimizer):
    """The Adam of BERT's first code, as CLIP4Clip and most retrieval code after it have it.

    Every tensor's gradient is clipped to norm 1 by itself (CLIP4Clip clips the global norm before, as the engine does),
    the moments are not corrected for their start, and decay is part of the update. With the curve "cosine_whole".

    Needs each parameter by itself: ZeRO and bf16 flatten them, which `Trainer` refuses.
    """

    per_tensor = True

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-4,
        betas: tuple[float, float] = (0.9, 0.98),
        eps: float = 1e-6,
        weight_decay: float = 0.0,
        max_norm: float = 1.0,
    ):
        settings = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, "max_norm": max_norm}
        super().__init__(params, settings)

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        for group, parameter, gradient in _with_gradient(self):
            norm = float(gradient.norm())
            if norm > group["max_norm"]:
                gradient = gradient * (group["max_norm"] / (norm + 1e-6))
            mean, square = _moments(self.state[parameter], parameter, gradient, group["betas"])
            update = mean / (square.sqrt() + group["eps"]) + group["weight_decay"] * parameter
            parameter.sub_(group["lr"] * update)


class AdamWTempMe(torch.optim.Optimizer):
    """AdamW as TempMe's code has it; torch's adds eps to the corrected root and decays first.

    The correction for the moments' start is in the rate, and decay shrinks the updated weights. With the curve
    "cosine_from_zero".
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 6e-4,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-6,
        weight_decay: float = 0.0,
    ):
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        for group, parameter, gradient in _with_gradient(self):
            state, (beta1, beta2) = self.state[parameter], group["betas"]
            mean, square = _moments(state, parameter, gradient, group["betas"])
            state["step"] = state.get("step", 0) + 1
            rate = group["lr"] * math.sqrt(1 - beta2 ** state["step"]) / (1 - beta1 ** state["step"])
            parameter.addcdiv_(mean, square.sqrt() + group["eps"], value=-rate)
            parameter.mul_(1 - group["lr"] * group["weight_decay"])


def _with_gradient(optimizer: torch.optim.Optimizer) -> list[tuple[dict[str, Any], Tensor, Tensor]]:
    """(group, parameter, gradient) of all that have one."""
    return [(group, p, p.grad) for group in optimizer.param_groups for p in group["params"] if p.grad is not None]


def _moments(
    state: dict[str, Any], parameter: Tensor, gradient: Tensor, betas: tuple[float, float]
) -> tuple[Tensor, Tensor]:
    """Running means of the gradient and of its square."""
    if "exp_avg" not in state:
        state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(parameter), torch.zeros_like(parameter)
    mean, square = state["exp_avg"], state["exp_avg_sq"]
    return mean.lerp_(gradient, 1 - betas[0]), square.mul_(betas[1]).addcmul_(gradient, gradient, value=1 - betas[1])


def warmup_cosine(step: int, total_steps: int, warmup: float, floor: float = 0.0) -> float:
    """The factor on the peak rate: linear warm-up over a share of the steps, then a cosine down to `floor`."""
    warmup_steps = int(warmup * total_steps)
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    return _cosine((step - warmup_steps) / max(1, total_steps - warmup_steps), floor)


def cosine_from_zero(step: int, total_steps: int, warmup: float, floor: float = 0.0) -> float:
    """TempMe's: the warm-up begins with a step of rate 0."""
    warmup_steps = int(warmup * total_steps)
    return step / warmup_steps if step < warmup_steps else warmup_cosine(step, total_steps, warmup, floor)


def cosine_whole(step: int, total_steps: int, warmup: float, floor: float = 0.0) -> float:
    """CLIP4Clip's: the warm-up begins with rate 0, and the cosine is that of the whole run: it does not start at 1."""
    progress = step / total_steps
    return progress / warmup if progress < warmup else _cosine(progress, floor)


def by_epoch(step: int, total_steps: int, warmup: float, floor: float = 0.0, epochs: int = 1) -> float:
    """TESTA's in pre-training: linear from a fifth of the peak on, then 0.95 times as much in each epoch as before."""
    warmup_steps = int(warmup * total_steps)
    if step < warmup_steps:
        return 0.2 + 0.8 * step / warmup_steps
    return max(floor, 0.95 ** (step * epochs // total_steps))


Curve = Callable[[int, int, float, float], float]
SCHEDULES: dict[str, Callable[..., float]] = {
    "cosine": warmup_cosine,
    "cosine_from_zero": cosine_from_zero,
    "cosine_whole": cosine_whole,
    "by_epoch": by_epoch,
}


def find_schedule(name: str, epochs: int) -> Curve:
    """(step, all steps, share of warm-up, floor) -> the factor on the peak rate.

    Args:
        epochs: of the run.

    Raises:
        ValueError: an unknown name.
    """
    if name not in SCHEDULES:
        raise ValueError(f"schedule is one of {', '.join(SCHEDULES)}; got {name!r}")
    return partial(by_epoch, epochs=max(1, epochs)) if name == "by_epoch" else SCHEDULES[name]


def _cosine(progress: float, floor: float) -> float:
    return floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))
