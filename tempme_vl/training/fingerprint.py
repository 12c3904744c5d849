"""What decides a run's result, as JSON data: a checkpoint keeps it, and only a run with the same may go on from it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

LONGEST = 200  # characters of a value that are kept as they are; of longer ones only their hash

# DeepSpeed's settings that only watch a run
WATCHING = {
    "steps_per_print",
    "wall_clock_breakdown",
    "memory_breakdown",
    "dump_state",
    "flops_profiler",
    "comms_logger",
    "tensorboard",
    "wandb",
    "csv_monitor",
    "comet",
}


def digest(value: Any) -> str:
    """A short hash of JSON data; what JSON does not have counts as its text."""
    return hashlib.blake2b(json.dumps(value, sort_keys=True, default=str).encode(), digest_size=8).hexdigest()


def flat(facts: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested facts by dotted names, as JSON gives them back; long values as their hash."""
    found: dict[str, Any] = {}
    for key, value in facts.items():
        name = f"{prefix}{key}"
        if isinstance(value, Mapping) and value:
            found |= flat(value, f"{name}.")
            continue
        text = json.dumps(value, sort_keys=True, default=str)
        found[name] = json.loads(text) if len(text) <= LONGEST else f"hash {digest(value)}"
    return found


def differences(there: Mapping[str, Any], here: Mapping[str, Any]) -> list[str]:
    """Every fact that differs between two flat fingerprints, with its old and its new value."""
    names = [*here, *(name for name in there if name not in here)]
    missing = object()
    pairs = [(name, there.get(name, missing), here.get(name, missing)) for name in names]
    return [
        f"{name} {'not recorded' if old is missing else old}, now {'not given' if new is missing else new}"
        for name, old, new in pairs
        if old is missing or new is missing or old != new or type(old) is not type(new)
    ]


def of_optimizer(optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """Its rule and the settings of its groups, as they are before a schedule changes the rates."""
    groups = {
        str(index): {
            **{key: value for key, value in group.items() if key != "params" and _is_setting(value)},
            "weights": sum(_size(parameter) for parameter in group["params"]),
        }
        for index, group in enumerate(optimizer.param_groups)
    }
    return {"rule": type(optimizer).__name__, **groups}


def of_model(model: nn.Module) -> str:
    """Hash of all parameters' names and shapes, and of which ones train."""
    return digest([(name, list(_shape(weight)), weight.requires_grad) for name, weight in model.named_parameters()])


def trainable_params(model: nn.Module) -> int:
    """How many numbers train, whole where ZeRO-3 partitions them."""
    return sum(_size(parameter) for parameter in model.parameters() if parameter.requires_grad)


def of_deepspeed(settings: Mapping[str, Any]) -> dict[str, Any]:
    """A DeepSpeed configuration without what only watches a run."""
    return {key: value for key, value in settings.items() if key not in WATCHING}


def _is_setting(value: Any) -> bool:
    if isinstance(value, Sequence) and not isinstance(value, str):
        return all(map(_is_setting, value))
    return value is None or isinstance(value, bool | int | float | str)


def _shape(parameter: torch.Tensor) -> tuple[int, ...]:
    return tuple(getattr(parameter, "ds_shape", parameter.shape))


def _size(parameter: torch.Tensor) -> int:
    return int(torch.Size(_shape(parameter)).numel())
