"""What training a language model of transformers takes, whatever model of ours it is a part of."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn


def has_adapter(model: Any) -> bool:
    """Whether a model is in peft's wrapper, which whoever put it there has imported."""
    peft = sys.modules.get("peft")
    return peft is not None and isinstance(model, peft.PeftModel)


@contextmanager
def exact_buffers(model: nn.Module) -> Iterator[None]:
    """Around a cast of all that a module holds: its buffers keep their precision.

    Half precision, also as DeepSpeed sets it, is for weights: rounded rotary frequencies displace words.
    """
    exact = [
        (module, name, buffer)
        for module in model.modules()
        for name, buffer in module.named_buffers(recurse=False)
        if buffer.is_floating_point()
    ]
    yield
    for module, name, buffer in exact:
        cast = getattr(module, name)
        if cast.dtype.itemsize < buffer.dtype.itemsize:
            setattr(module, name, buffer.to(cast.device))


def set_grad_checkpointing(model: Any, enable: bool) -> None:
    """Recomputes the model's blocks in the backward pass."""
    # transformers renames it from gradient_ to activation_
    name = "activation" if hasattr(model, "activation_checkpointing_enable") else "gradient"
    if enable:
        getattr(model, f"{name}_checkpointing_enable")({"use_reentrant": False})
    else:
        getattr(model, f"{name}_checkpointing_disable")()
