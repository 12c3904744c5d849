"""Which module runs in the place of one, where its input goes, and how precise it is: models may be in the wrapper of
peft, quantised, or offloaded by accelerate.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn


def running(module: nn.Module) -> nn.Module:
    """The module that runs in the place of one: where peft trains a copy of it, the copy, unless adapters are off."""
    while hasattr(module, "modules_to_save") and hasattr(module, "original_module"):
        wrapper: Any = module
        off = wrapper.disable_adapters or not wrapper.active_adapters
        module = wrapper.original_module if off else wrapper.modules_to_save[wrapper.active_adapters[0]]
    return module


def input_device(module: nn.Module) -> torch.device:
    """Where the input of a module goes. Offloaded weights lie on `meta` between calls; accelerate brings them to the
    device that its hook names, and the input with them."""
    for weight in module.parameters():
        if not weight.is_meta:
            return weight.device
    for part in module.modules():
        hook = _hook(part)
        for one in (hook, *getattr(hook, "hooks", ())):
            if getattr(one, "execution_device", None) is not None:
                return torch.device(one.execution_device)
    return torch.device("cpu")


def _hook(module: nn.Module) -> Any:
    """accelerate's `ModelHook` of a module, or None."""
    return getattr(module, "_hf_hook", None)


def input_dtype(module: nn.Module) -> torch.dtype:
    """How precise the input of a module is: as its first weight that is no packed integer."""
    return next((weight.dtype for weight in module.parameters() if weight.is_floating_point()), torch.float32)


def as_input(values: Tensor, module: nn.Module) -> Tensor:
    """The input of a module where it goes, and numbers that are not whole as precise as the module."""
    return values.to(input_device(module), input_dtype(module) if values.is_floating_point() else None)


@contextmanager
def own_weights(module: nn.Module) -> Iterator[None]:
    """Has the weights that a module itself holds at hand, where accelerate offloads them between calls: what its hook
    does before and after a call of the module."""
    hook = _hook(module) if any(weight.is_meta for weight in module.parameters(recurse=False)) else None
    if hook is None:
        yield
        return
    hook.pre_forward(module)
    try:
        yield
    finally:
        hook.post_forward(module, None)
