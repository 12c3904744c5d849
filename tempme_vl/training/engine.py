"""The training engine: a model under DeepSpeed, one update at a time, with checkpoints and logs.

A recipe owns the loop; `Trainer` owns what every recipe needs around it.
"""

from __future__ import annotations

import math
import signal
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from tempme_vl.processes import become_worker
from tempme_vl.together import advise
from tempme_vl.training import distributed, fingerprint
from tempme_vl.training.caching import cached_update
from tempme_vl.training.checkpoint import (
    Tensors,
    full_state_dict,
    latest_checkpoint,
    read_state,
    replace_export,
    replace_state,
    restore_random_states,
    save_checkpoint,
)
from tempme_vl.training.config import OURS, TrainConfig, deepspeed_config
from tempme_vl.training.folder import claim
from tempme_vl.training.log import RunLog
from tempme_vl.training.optim import find_schedule
from tempme_vl.training.sampler import StepSampler
from tempme_vl.training.whole import WholeState

Batch = Mapping[str, Any]


class NonFiniteLossError(RuntimeError):
    """The loss or the gradient is NaN or infinite; training stopped before anything was overwritten."""


class Trainer:
    """Trains a model on a data set addressed by (epoch, index).

    Args:
        model: called with a batch of tensors. Where it has them, `check_training(batch_size, bf16)` is
            called first, to refuse what it cannot be trained with, and `begin_step(step, steps_per_epoch)` in front of
            every step.
        optimizer: over the model's parameters; its groups' rates are the peak rates.
        dataset: has `__len__`, `__getitem__((epoch, index))`, and items with a "name".
        config: see `TrainConfig`.
        facts: JSON data: whatever else decides the result (the recipe's options, hashes of the annotations). A
            checkpoint keeps them, and only a run with the same ones may go on from it.

    Attributes:
        step: updates done; epoch: complete passes done; best_score, best_step: of the exported best model.
        trainable_params: how many numbers train.

    Raises:
        ValueError: an output folder with checkpoints and resume="never", of a run with other settings, in use by
            another run, or not the same one on all ranks.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        dataset: Dataset,
        config: TrainConfig,
        facts: Mapping[str, Any] | None = None,
    ):
        import deepspeed

        self.config, self.dataset = config, dataset
        # once a loss is nearly 0, gradients below 1e-38 appear, on which a CPU is ten times as slow (docs/LOG.md)
        torch.set_flush_denormal(True)
        self.device = torch.device(deepspeed.get_accelerator().current_device_name())
        num_samples = len(dataset)  # type: ignore[arg-type]
        self._sampler_options = (num_samples, config.batch_size, config.epochs, config.seed)
        sampler = StepSampler(*self._sampler_options, 0, distributed.rank(), distributed.world_size())
        self.steps_per_epoch, self.total_steps = sampler.steps_per_epoch, sampler.total_steps
        self.step, self.best_score, self.best_step = 0, -math.inf, -1
        self._begin_step: Callable[[int, int], None] = getattr(model, "begin_step", lambda step, steps: None)
        self._signals: list[int] = []
        self._epoch_is_open = False  # its checkpoint is written, what comes at its end is not done

        local_batch = config.batch_size // distributed.world_size()
        if local_batch % config.chunks:
            raise ValueError(
                f"a batch of {local_batch} a rank does not divide into {config.chunks} chunks; change --chunks, "
                "--batch-size or the number of ranks"
            )
        settings = deepspeed_config(config, local_batch // config.chunks, self.device)
        self.trainable_params = fingerprint.trainable_params(model)
        self.fingerprint = fingerprint.flat(
            {
                **config.fingerprint(),
                "num_samples": num_samples,
                "zero_stage": settings.get("zero_optimization", {}).get("stage", 0),
                "bf16": settings["bf16"]["enabled"],
                "parameters": fingerprint.of_model(model),
                "optimizer": fingerprint.of_optimizer(optimizer),
                # of what the recipe's options decide, the options are compared
                "deepspeed": fingerprint.of_deepspeed({k: v for k, v in settings.items() if k not in OURS}),
                **(facts or {}),
            }
        )
        if check := getattr(model, "check_training", None):
            check(config.batch_size, self.fingerprint["bf16"])
        if getattr(optimizer, "per_tensor", False) and (self.fingerprint["zero_stage"] or self.fingerprint["bf16"]):
            raise ValueError(
                f"{type(optimizer).__name__} clips every tensor by itself, but ZeRO and bf16 join them: "
                "use --precision fp32 and a DeepSpeed file of ZeRO stage 0 (recipes/ds/zero0.json)"
            )
        factor, steps = find_schedule(config.schedule, config.epochs), max(1, self.total_steps)
        self._lock = claim(config.output)
        checkpoint = self._resumed()
        for group in optimizer.param_groups:
            group["initial_lr"] = group["lr"]  # which torch wants of a schedule that does not begin at its start
        schedule = LambdaLR(
            optimizer, lambda step: factor(step, steps, config.warmup, config.lr_floor), last_epoch=self.step - 1
        )
        self._whole = WholeState(optimizer)
        self.engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, lr_scheduler=schedule, config=settings)
        self._whole.fill_up(self.engine)
        if checkpoint is not None:
            self._load(checkpoint)
        log_options = (config.output, self.step, config.tensorboard, self._epoch_is_open)
        self._log = RunLog(*log_options) if distributed.is_main() else None

    def batches(self, end_epoch: Callable[[], None] | None = None) -> Iterator[Batch]:
        """Batches on the device, from the step after the last checkpoint to the end.

        Between two batches it writes due checkpoints, and on SIGTERM or Ctrl-C a last one before it exits with status
        143 or 130. A second Ctrl-C ends the run at once.

        Args:
            end_epoch: evaluates and exports. Called after every epoch, once its checkpoint is written; should a run end
                before it is done, the run that is resumed does it first. A run of 0 epochs calls it once.
        """
        sampler = StepSampler(*self._sampler_options, self.step, distributed.rank(), distributed.world_size())
        loader = DataLoader(
            self.dataset,
            batch_sampler=sampler,
            num_workers=self.config.workers,
            pin_memory=self.device.type == "cuda",
            worker_init_fn=become_worker,
            # of its own: else every start draws from the global one, and a resumed run is another than an unbroken one
            generator=torch.Generator().manual_seed(self.config.seed),
        )
        previous = {number: signal.signal(number, self._on_signal) for number in (signal.SIGTERM, signal.SIGINT)}
        progress = tqdm(
            total=self.total_steps, initial=self.step, desc="train", disable=not distributed.is_main(), mininterval=2
        )
        try:
            if end_epoch is not None and (self._epoch_is_open or self.total_steps == 0):
                self._close_epoch(end_epoch)
            for batch in loader:
                yield {key: _to(value, self.device) for key, value in batch.items()}
                progress.update()
                self._epoch_is_open = self.epoch_ended and end_epoch is not None
                last, stop = self.step == self.total_steps, self._stop_signals()
                if last or stop or self._epoch_is_open or self.step % self.config.save_every == 0:
                    self.save()
                if stop and (self._epoch_is_open or not last):
                    self._leave(stop)
                if self._epoch_is_open and end_epoch is not None:
                    self._close_epoch(end_epoch)
        finally:
            progress.close()
            for number, handler in previous.items():
                signal.signal(number, handler)

    def _close_epoch(self, end_epoch: Callable[[], None]) -> None:
        end_epoch()
        self._epoch_is_open = False
        replace_state(self.save(), self._state())
        stop = self._stop_signals()
        if stop:
            self._leave(stop)

    def _on_signal(self, number: int, _: Any) -> None:
        if number == signal.SIGINT and number in self._signals:
            raise KeyboardInterrupt
        self._signals.append(number)
        if number == signal.SIGINT and distributed.is_main():
            print("\nCtrl-C: this step is finished and saved; once more ends the run at once", flush=True)

    def _stop_signals(self) -> int:
        """The signal that a rank got, if any did: Ctrl-C before SIGTERM, which launchers send after it."""
        asked = (signal.SIGINT, signal.SIGTERM)
        flags = distributed.any_rank([number in self._signals for number in asked], self.device)
        return next((number for number, flag in zip(asked, flags, strict=True) if flag), 0)

    def _leave(self, number: int) -> None:
        if distributed.is_main():
            name = "Ctrl-C" if number == signal.SIGINT else "SIGTERM"
            print(f"{name}: saved step {self.step}; continue with --resume auto", flush=True)
        raise SystemExit(128 + number)

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
        self._begin_step(self.step, self.steps_per_epoch)
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
        # DeepSpeed tells no norm at ZeRO stage 0 in float32, and older versions tell 1 for one that is not finite; but
        # such a gradient is in the weights by now
        norm, weights = self.engine.get_global_grad_norm(), self._whole.total(self.engine)
        norm = weights if norm is None else norm + 0 * weights
        total, broken = distributed.sums([float(loss.detach()), not _is_finite(norm)], self.device)
        if broken:
            self._refuse(norm, "gradient norm", batch)
        self.step += 1
        value = total / distributed.world_size()
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
        """Whole float32 weights at any ZeRO stage, on every rank; all ranks call it."""
        return full_state_dict(self.engine)

    def export(self, target: Path, write: Callable[[Path, dict[str, Tensor]], None]) -> None:
        """Replaces the folder `target` in one step; all ranks call it.

        Args:
            write: the model's `save_pretrained`, called on the first rank with a folder and whole float32 weights:
                those that the model's `is_saved` tells by their names, where it has it.
        """
        wanted = getattr(self.engine.module, "is_saved", lambda name: True)
        state = full_state_dict(self.engine, wanted, everywhere=False)
        if distributed.is_main():
            replace_export(target, self.step, lambda folder: write(folder, state))
        distributed.barrier()

    def save(self) -> Path:
        """Writes a checkpoint, unless this step has one, and gives its folder; all ranks call it."""
        with closing(self._whole.read(self.engine)) as tensors:
            checkpoint = save_checkpoint(tensors, self.config.output / "checkpoints", self.step, self._state())
        advise(f"the last checkpoint is {checkpoint}; continue with --resume auto")
        return checkpoint

    def _state(self) -> dict[str, Any]:
        return {
            "step": self.step,
            "epoch": self.epoch,
            "epoch_is_open": self._epoch_is_open,
            "best_score": self.best_score,
            "best_step": self.best_step,
            "ranks": distributed.world_size(),
            "fingerprint": self.fingerprint,
        }

    def _resumed(self) -> Path | None:
        """The checkpoint from which this run goes on, if there is one; takes over its step and scores."""
        if self.config.resume not in ("never", "auto"):
            raise ValueError(f"--resume is 'never' or 'auto'; got {self.config.resume!r}")
        checkpoint = latest_checkpoint(self.config.output / "checkpoints")
        if checkpoint is None:
            advise("no checkpoint was written yet")
            return None
        if self.config.resume == "never":
            raise ValueError(
                f"{self.config.output} holds checkpoints of an earlier run (last: {checkpoint.name}); "
                "continue it with --resume auto, or give another --output"
            )
        state = read_state(checkpoint)
        if "ranks" not in state:
            raise ValueError(f"{checkpoint} is of an older version of tempme_vl; continue it with that one")
        ranks, there, here = state["ranks"], state["fingerprint"], self.fingerprint
        if ranks != distributed.world_size():
            # chunks change memory alone, like ranks
            there, here = {**there, "chunks": self.config.chunks}, {**here, "chunks": self.config.chunks}
        differing = fingerprint.differences(there, here)
        if differing:
            raise ValueError(
                f"{checkpoint} belongs to a run with {'; '.join(differing)}. Continue it with the same options; for "
                "others start anew in another --output, from the weights that this run exported if you like"
            )
        if ranks != distributed.world_size() and distributed.is_main():
            total, now = self.config.batch_size, distributed.world_size()
            print(
                f"a checkpoint of {ranks} rank{'s' * (ranks > 1)} continues on {now}: the batch stays {total}, now "
                f"{total // now} a rank instead of {total // ranks}",
                flush=True,
            )
        self.step, self.best_score, self.best_step = state["step"], state["best_score"], state["best_step"]
        self._epoch_is_open = state["epoch_is_open"]
        return checkpoint

    def _load(self, checkpoint: Path) -> None:
        tensors = Tensors(checkpoint)
        self._whole.write(self.engine, tensors.names, tensors.__getitem__)
        restore_random_states(tensors)
        advise(f"the last checkpoint is {checkpoint}; continue with --resume auto")

    def _require_finite(self, value: Tensor, what: str, batch: Batch) -> None:
        (bad,) = distributed.any_rank([not _is_finite(value)], self.device)
        if bad:
            self._refuse(value, what, batch)

    def _refuse(self, value: Tensor, what: str, batch: Batch) -> NoReturn:
        names = [name for names in distributed.gather_objects(list(batch["name"])) for name in names]
        raise NonFiniteLossError(
            f"{what} is {float(value.detach())} at step {self.step} (epoch {self.epoch}); samples of the batch: "
            f"{', '.join(names)}. The last checkpoint is untouched; look at these samples, or lower the rates"
        )


def _is_finite(value: Tensor) -> bool:
    return bool(torch.isfinite(value).all())


def _to(value: Any, device: torch.device) -> Any:
    return value.to(device, non_blocking=True) if isinstance(value, Tensor) else value
