"""What training a language model of transformers takes, whatever model of ours it is a part of."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from tempme_vl.messages import shown
from tempme_vl.pretrained import read_safetensors
from tempme_vl.schema import ConfigError, check_plain, read_json

# as peft calls the files
ADAPTER_FOLDER, ADAPTER_CONFIG, ADAPTER_WEIGHTS = "adapter", "adapter_config.json", "adapter_model.safetensors"


def has_adapter(model: Any) -> bool:
    """Whether a model is in peft's wrapper, which whoever put it there has imported."""
    peft = sys.modules.get("peft")
    return peft is not None and isinstance(model, peft.PeftModel)


def read_adapter(folder: Path) -> dict[str, Tensor]:
    """LoRA's weights of a folder that peft is about to read, whose settings decide how much it makes.

    Raises:
        ConfigError, FolderError: settings that are none, a rank that the weights do not have, damaged weights.
    """
    file, state = folder / ADAPTER_CONFIG, read_safetensors(folder / ADAPTER_WEIGHTS)
    config = read_json(file)
    check_plain(config, str(file))
    ranks = [value.shape[0] for name, value in state.items() if "lora_A" in name or "lora_embedding_A" in name]
    pattern = config.get("rank_pattern") or {} if isinstance(config, dict) else None
    if not isinstance(pattern, dict) or not ranks:
        raise ConfigError(f"{file}: expected the settings of LoRA, and its weights in {folder / ADAPTER_WEIGHTS}")
    if wrong := [rank for rank in (config.get("r"), *pattern.values()) if type(rank) is not int or rank not in ranks]:
        raise ConfigError(f"{file}, 'r': expected {sorted(set(ranks))}, as its weights have; got {shown(wrong[0])}")
    return state


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
