"""What a run is: the options that every recipe has, and what DeepSpeed is told of them."""

from __future__ import annotations

from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch

from tempme_vl.schema import ConfigError, read_json

# of a DeepSpeed file, what the recipe's options decide
OURS = ("train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "gradient_clipping", "bf16")

# What may be another when a run is continued: of the DeepSpeed file and of the precision, what they say counts.
MAY_CHANGE = {"output", "deepspeed", "precision", "workers", "save_every", "resume", "tensorboard"}


@dataclass(frozen=True)
class TrainConfig:
    """What a run is. All but `MAY_CHANGE` must agree between a checkpoint and the run that resumes it."""

    output: Path
    deepspeed: Path
    epochs: int
    batch_size: int
    chunks: int = 1
    warmup: float = 0.1
    lr_floor: float = 0.0
    schedule: str = "cosine"
    clip_grad: float = 1.0
    precision: str = "auto"
    seed: int = 0
    workers: int = 2
    save_every: int = 500
    resume: str = "never"
    tensorboard: bool = False

    def fingerprint(self) -> dict[str, Any]:
        return {field.name: getattr(self, field.name) for field in fields(self) if field.name not in MAY_CHANGE}


def deepspeed_config(config: TrainConfig, micro_batch: int, device: torch.device) -> dict[str, Any]:
    """A DeepSpeed JSON file with its "auto" values filled in.

    Raises:
        ValueError: a file that is missing, that sets one of these values to something else, or that asks for what
            checkpoints do not hold.
    """
    if not config.deepspeed.is_file():
        raise ValueError(f"no DeepSpeed configuration at {config.deepspeed}; see recipes/ds/")
    if config.precision not in ("auto", "bf16", "fp32"):
        raise ValueError(f"precision is 'auto' (bf16 on a GPU, else fp32), 'bf16' or 'fp32'; got {config.precision!r}")
    bf16 = config.precision == "bf16" or (config.precision == "auto" and device.type == "cuda")
    filled = read_json(config.deepspeed)
    if not isinstance(filled, dict):
        raise ConfigError(f"{config.deepspeed}: expected an object of DeepSpeed's settings; got {str(filled)[:80]!r}")
    ours = (micro_batch, config.chunks, config.clip_grad, {"enabled": bf16})
    for key, value in zip(OURS, ours, strict=True):
        if filled.get(key, "auto") not in ("auto", {"enabled": "auto"}):
            raise ValueError(f'{config.deepspeed} sets {key}; leave it "auto": the recipe\'s options decide')
        filled[key] = value
    if filled.get("fp16", {}).get("enabled"):
        raise ValueError(f"{config.deepspeed} enables fp16, whose scale of the loss is not kept: use --precision bf16")
    if filled.get("zero_optimization", {}).get("offload_optimizer", {}).get("device") == "nvme":
        raise ValueError(f"{config.deepspeed} keeps the optimizer on NVMe, where checkpoints do not reach: use cpu")
    return filled
