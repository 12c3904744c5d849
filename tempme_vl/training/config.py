"""What a run is: the options that every recipe has, and what DeepSpeed is told of them."""

from __future__ import annotations

from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from tempme_vl.schema import ConfigError, read_json

if TYPE_CHECKING:
    import torch

DEEPSPEED = Path(__file__).parent / "ds"  # recipes/ds leads here: an installed package has no recipes/

# of a DeepSpeed file, what the recipe's options decide
OURS = ("train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "gradient_clipping", "bf16")

# What may be another when a run is continued: of the DeepSpeed file and of the precision, what they say counts.
MAY_CHANGE = {"output", "deepspeed_config", "precision", "workers", "save_every", "resume", "tensorboard"}


@dataclass(frozen=True)
class TrainConfig:
    """The run.

    All but `MAY_CHANGE` must agree between a checkpoint and the run that resumes it.
    """

    output: Path = Path("runs/run")
    """Run folder."""
    deepspeed_config: Path = Path("zero1")
    """zero0, zero1, zero2, zero3, zero3_offload, or a file of your own."""
    epochs: int = 5
    """0 evaluates and exports the model as it starts (zero-shot)."""
    batch_size: int = 128
    """Global: over all ranks."""
    chunks: int = 1
    """Gradient caching: encode a rank's batch in this many pieces, with the exact gradient of the whole."""
    warmup: float = 0.1
    """Share of the steps in which the rate rises; it then falls along a cosine to lr_floor of its peak."""
    lr_floor: float = 0.0
    """Share of its peak that the rate ends at."""
    schedule: Literal["cosine", "cosine_from_zero", "cosine_whole", "by_epoch"] = "cosine"
    """cosine_from_zero: TempMe's, its first step has rate 0; cosine_whole: CLIP4Clip's, whose cosine is that of the
    whole run, so that the rate drops where the warm-up ends; by_epoch: TESTA's in pre-training, which starts at a fifth
    of the peak and falls by 5 percent after each epoch."""
    clip_grad: float = 1.0
    """Largest norm of the gradient; 0 does not clip."""
    precision: Literal["auto", "bf16", "fp32"] = "auto"
    """auto: bf16 on a GPU, fp32 on a CPU."""
    seed: int = 0
    """Of whatever is random."""
    workers: int = 8
    """Loader processes a rank, in training and evaluation; 0 reads in the rank's own process."""
    save_every: int = 500
    """Steps between checkpoints; one is always written at the end and on SIGTERM."""
    resume: Literal["never", "auto"] = "never"
    """auto continues from OUTPUT's last checkpoint if there is one."""
    tensorboard: bool = False
    """Log to OUTPUT/tensorboard, too."""

    def fingerprint(self) -> dict[str, Any]:
        return {field.name: getattr(self, field.name) for field in fields(TrainConfig) if field.name not in MAY_CHANGE}


def deepspeed_file(named: Path) -> Path:
    """The file of a name such as zero2; a path is returned as it is.

    Raises:
        ValueError: there is none.
    """
    own = {file.stem: file for file in sorted(DEEPSPEED.glob("*.json"))}
    file = own.get(str(named), named)
    if not file.is_file():
        raise ValueError(f"no DeepSpeed configuration at {named}; see recipes/ds/, or give one of {', '.join(own)}")
    return file


def deepspeed_config(config: TrainConfig, micro_batch: int, device: torch.device) -> dict[str, Any]:
    """A DeepSpeed JSON file with its "auto" values filled in.

    Raises:
        ValueError: a file that is missing, that sets one of these values to something else, or that asks for what
            checkpoints do not hold.
    """
    file = deepspeed_file(config.deepspeed_config)
    if config.precision not in ("auto", "bf16", "fp32"):
        raise ValueError(f"precision is 'auto' (bf16 on a GPU, else fp32), 'bf16' or 'fp32'; got {config.precision!r}")
    bf16 = config.precision == "bf16" or (config.precision == "auto" and device.type == "cuda")
    filled = read_json(file)
    if not isinstance(filled, dict):
        raise ConfigError(f"{file}: expected an object of DeepSpeed's settings; got {str(filled)[:80]!r}")
    ours = (micro_batch, config.chunks, config.clip_grad, {"enabled": bf16})
    for key, value in zip(OURS, ours, strict=True):
        if filled.get(key, "auto") not in ("auto", {"enabled": "auto"}):
            raise ValueError(f'{file} sets {key}; leave it "auto": the recipe\'s options decide')
        filled[key] = value
    if filled.get("fp16", {}).get("enabled"):
        raise ValueError(f"{file} enables fp16, whose scale of the loss is not kept: use --precision bf16")
    if filled.get("zero_optimization", {}).get("offload_optimizer", {}).get("device") == "nvme":
        raise ValueError(f"{file} keeps the optimizer on NVMe, where checkpoints do not reach: use cpu")
    return filled
