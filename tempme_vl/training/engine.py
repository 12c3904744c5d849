"""The training engine: a model under DeepSpeed, one update at a time, with checkpoints and logs.

A recipe owns the loop; `Trainer` owns what every recipe needs around it.
"""

from __future__ import annotations

import json
import math
import signal
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import deepspeed
import numpy as np
import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from tempme_vl.training import distributed, fingerprint
from tempme_vl.training.caching import cached_update
from tempme_vl.training.checkpoint import (
    full_state_dict,
    latest_checkpoint,
    load_checkpoint,
    read_state,
    save_checkpoint,
)
from tempme_vl.training.optim import warmup_cosine
from tempme_vl.training.sampler import StepSampler

Batch = Mapping[str, Any]
# of a DeepSpeed file, what the recipe's options decide
OURS = ("train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "gradient_clipping", "bf16")


class NonFiniteLossError(RuntimeError):
    """The loss or the gradient is NaN or infinite; training stopped before anything was overwritten."""


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
    clip_grad: float = 1.0
    precision: str = "auto"
    seed: int = 0
    workers: int = 2
    save_every: int = 500
    resume: str = "never"
    tensorboard: bool = False

    def fingerprint(self) -> dict[str, Any]:
        return {field.name: getattr(self, field.name) for field in fields(self) if field.name not in MAY_CHANGE}


class Trainer:
    """Trains a model on a data set addressed by (epoch, index).

    Args:
        model: called with a batch of tensors.
        optimizer: over the model's parameters; its groups' rates are the peak rates.
        dataset: has `__len__`, `__getitem__((epoch, index))`, and items with a "name".
        config: see `TrainConfig`.
        facts: JSON data: whatever else decides the result (the recipe's options, hashes of the annotations). A
            checkpoint keeps them, and only a run with the same ones may go on from it.

    Attributes:
        step: updates done; epoch: complete passes done; best_score, best_step: of the exported best model.

    Raises:
        ValueError: an output folder with checkpoints and resume="never", or of a run with other settings.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        dataset: Dataset,
        config: TrainConfig,
        facts: Mapping[str, Any] | None = None,
    ):
        self.config, self.dataset = config, dataset
        # once a loss is nearly 0, gradients below 1e-38 appear, on which a CPU is ten times as slow (docs/LOG.md)
        torch.set_flush_denormal(True)
        self.device = torch.device(deepspeed.get_accelerator().current_device_name())
        num_samples = len(dataset)  # type: ignore[arg-type]
        self._sampler_options = (num_samples, config.batch_size, config.epochs, config.seed)
        sampler = StepSampler(*self._sampler_options, 0, distributed.rank(), distributed.world_size())
        self.steps_per_epoch, self.total_steps = sampler.steps_per_epoch, sampler.total_steps
        self.step, self.best_score, self.best_step = 0, -math.inf, -1
        self._stop_signal = False

        local_batch = config.batch_size // distributed.world_size()
        if local_batch % config.chunks:
            raise ValueError(f"a batch of {local_batch} a rank does not divide into {config.chunks} chunks")
        settings = deepspeed_config(config, local_batch // config.chunks, self.device)
        self.fingerprint = fingerprint.flat(
            {
                **config.fingerprint(),
                "num_samples": num_samples,
                "ranks": distributed.world_size(),
                "zero_stage": settings.get("zero_optimization", {}).get("stage", 0),
                "bf16": settings["bf16"]["enabled"],
                "parameters": fingerprint.of_model(model),
                "optimizer": fingerprint.of_optimizer(optimizer),
                # of what the recipe's options decide, the options are compared
                "deepspeed": fingerprint.of_deepspeed({k: v for k, v in settings.items() if k not in OURS}),
                **(facts or {}),
            }
        )
        schedule = LambdaLR(
            optimizer, lambda step: warmup_cosine(step, self.total_steps, config.warmup, config.lr_floor)
        )
        self.engine, *_ = deepspeed.initialize(
            model=model,
            optimizer=optimizer,
            lr_scheduler=schedule,
            config=settings,
        )
        self._resume()
        self._log = RunLog(config.output, self.step, config.tensorboard) if distributed.is_main() else None

    def batches(self) -> Iterator[Batch]:
        """Batches on the device, from the step after the last checkpoint to the end.

        Between two batches it writes due checkpoints, and on SIGTERM a last one before it exits with status 143.
        """
        sampler = StepSampler(*self._sampler_options, self.step, distributed.rank(), distributed.world_size())
        loader = DataLoader(
            self.dataset,
            batch_sampler=sampler,
            num_workers=self.config.workers,
            pin_memory=self.device.type == "cuda",
            worker_init_fn=_ignore_sigterm,
            # of its own: else every start draws from the global one, and a resumed run is another than an unbroken one
            generator=torch.Generator().manual_seed(self.config.seed),
        )
        previous = signal.signal(signal.SIGTERM, self._on_sigterm)
        progress = tqdm(
            total=self.total_steps, initial=self.step, desc="train", disable=not distributed.is_main(), mininterval=2
        )
        try:
            for batch in loader:
                yield {key: _to(value, self.device) for key, value in batch.items()}
                progress.update()
                last = self.step == self.total_steps
                (stop,) = distributed.any_rank([self._stop_signal], self.device)
                if last or stop or self.step % self.config.save_every == 0:
                    self.save()
                if stop and not last:
                    if distributed.is_main():
                        print(f"SIGTERM: saved step {self.step}; continue with --resume auto", flush=True)
                    raise SystemExit(128 + signal.SIGTERM)
        finally:
            progress.close()
            signal.signal(signal.SIGTERM, previous)

    def update(self, batch: Batch, loss_fn: Callable[[Mapping[str, Tensor], Batch], Tensor]) -> float:
        """One optimizer step.

        Args:
            loss_fn: (the model's output, batch) -> scalar loss. It may gather features from all ranks if its
                gradients are scaled so that averaging over ranks is right (`tempme_vl.tasks.losses`).

        Returns:
            the loss, the mean over ranks.

        Raises:
            NonFiniteLossError: names the step and the samples.
        """
        start = time.perf_counter()
        self._seed_step()
        self.engine.train()
        if self.config.chunks == 1:
            loss = loss_fn(self.engine(batch), batch)
            self._require_finite(loss, "loss", batch)
            self.engine.backward(loss)
            self.engine.step()
        else:
            loss = cached_update(
                self.engine, batch, loss_fn, self.config.chunks, lambda loss: self._require_finite(loss, "loss", batch)
            )
        norm = self.engine.get_global_grad_norm()
        if norm is None:
            # ZeRO stage 0 in float32 does not tell it; a gradient that is not finite is in the weights by now
            norm = torch.stack([weight.detach().sum() for weight in self.engine.module.parameters()]).sum()
        self._require_finite(torch.as_tensor(norm), "gradient norm", batch)
        self.step += 1
        value = distributed.mean(float(loss.detach()), self.device)
        if self._log:
            self._log.write(
                self.step,
                {"loss": value, "lr": max(self.engine.get_lr()), "seconds": time.perf_counter() - start},
            )
        return value

    def _seed_step(self) -> None:
        """What a model draws (dropout, negatives) follows from the seed, the step and the rank: resuming is exact."""
        words = np.random.SeedSequence((self.config.seed, self.step, distributed.rank())).generate_state(2)
        torch.manual_seed(int(words[0]) << 32 | int(words[1]))

    @property
    def epoch(self) -> int:
        """Complete passes over the data so far."""
        return self.step // self.steps_per_epoch

    @property
    def epoch_ended(self) -> bool:
        return self.step % self.steps_per_epoch == 0

    def log(self, **values: float) -> None:
        """Adds a line to metrics.jsonl (and TensorBoard) at the present step."""
        if self._log:
            self._log.write(self.step, values)

    def is_best(self, score: float) -> bool:
        """Remembers the score and says whether it is the best so far (the first of equal ones wins)."""
        if score <= self.best_score:
            return False
        self.best_score, self.best_step = score, self.step
        return True

    def full_state_dict(self) -> dict[str, Tensor]:
        """Whole float32 weights at any ZeRO stage; all ranks call it."""
        return full_state_dict(self.engine)

    def save(self) -> None:
        """Writes a checkpoint; all ranks call it."""
        state = {
            "step": self.step,
            "epoch": self.epoch,
            "best_score": self.best_score,
            "best_step": self.best_step,
            "fingerprint": self.fingerprint,
        }
        save_checkpoint(self.engine, self.config.output / "checkpoints", self.step, state)

    def _resume(self) -> None:
        if self.config.resume not in ("never", "auto"):
            raise ValueError(f"--resume is 'never' or 'auto'; got {self.config.resume!r}")
        checkpoint = latest_checkpoint(self.config.output / "checkpoints")
        if checkpoint is None:
            return
        if self.config.resume == "never":
            raise ValueError(
                f"{self.config.output} holds checkpoints of an earlier run (last: {checkpoint.name}); "
                "continue it with --resume auto, or give another --output"
            )
        state = read_state(checkpoint)
        differing = fingerprint.differences(state["fingerprint"], self.fingerprint)
        if differing:
            raise ValueError(
                f"{checkpoint} belongs to a run with {'; '.join(differing)}. Continue it with the same options on the "
                "same number of ranks; for others start anew in another --output, from the weights that this run "
                "exported if you like"
            )
        load_checkpoint(self.engine, checkpoint)
        self.step, self.best_score, self.best_step = state["step"], state["best_score"], state["best_step"]

    def _on_sigterm(self, *_: Any) -> None:
        self._stop_signal = True

    def _require_finite(self, value: Tensor, what: str, batch: Batch) -> None:
        (bad,) = distributed.any_rank([not bool(torch.isfinite(value).all())], self.device)
        if bad:
            names = [name for names in distributed.gather_objects(list(batch["name"])) for name in names]
            raise NonFiniteLossError(
                f"{what} is {float(value.detach())} at step {self.step} (epoch {self.epoch}); samples of the batch: "
                f"{', '.join(names)}. The last checkpoint is untouched; look at these samples, or lower the rates"
            )


class RunLog:
    """metrics.jsonl, one JSON object a line, and TensorBoard if asked; lines after a resumed step are dropped."""

    def __init__(self, output: Path, step: int, tensorboard: bool):
        output.mkdir(parents=True, exist_ok=True)
        self.path = output / "metrics.jsonl"
        kept = [line for line in _lines(self.path) if json.loads(line)["step"] <= step]
        self.path.write_text("".join(line + "\n" for line in kept))
        self.board = None
        if tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            self.board = SummaryWriter(str(output / "tensorboard"), purge_step=step + 1)

    def write(self, step: int, values: Mapping[str, float]) -> None:
        with self.path.open("a") as log:
            log.write(json.dumps({"step": step, **values}) + "\n")
        if self.board:
            for name, value in values.items():
                self.board.add_scalar(name, value, step)


def deepspeed_config(config: TrainConfig, micro_batch: int, device: torch.device) -> dict[str, Any]:
    """A DeepSpeed JSON file with its "auto" values filled in.

    Raises:
        ValueError: a file that is missing or that sets one of these values to something else.
    """
    if not config.deepspeed.is_file():
        raise ValueError(f"no DeepSpeed configuration at {config.deepspeed}; see recipes/ds/")
    if config.precision not in ("auto", "bf16", "fp32"):
        raise ValueError(f"precision is 'auto' (bf16 on a GPU, else fp32), 'bf16' or 'fp32'; got {config.precision!r}")
    bf16 = config.precision == "bf16" or (config.precision == "auto" and device.type == "cuda")
    filled = json.loads(config.deepspeed.read_text())
    ours = (micro_batch, config.chunks, config.clip_grad, {"enabled": bf16})
    for key, value in zip(OURS, ours, strict=True):
        if filled.get(key, "auto") not in ("auto", {"enabled": "auto"}):
            raise ValueError(f'{config.deepspeed} sets {key}; leave it "auto": the recipe\'s options decide')
        filled[key] = value
    return filled


def _ignore_sigterm(worker: int) -> None:
    """Schedulers and launchers send SIGTERM to whole process trees; the last checkpoint still needs its loaders."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)


def _to(value: Any, device: torch.device) -> Any:
    return value.to(device, non_blocking=True) if isinstance(value, Tensor) else value


def _lines(path: Path) -> list[str]:
    if not path.is_file():
        return []
    text = path.read_text()
    return text[: text.rfind("\n") + 1].splitlines()  # without a last line that a kill cut off
