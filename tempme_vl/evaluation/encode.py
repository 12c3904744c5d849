"""A data set through a model, all ranks together, each its share."""

from __future__ import annotations

import signal
from collections.abc import Callable, Mapping, Sequence

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Subset
from tqdm import tqdm

Encoder = Callable[[Mapping[str, Tensor]], Mapping[str, Tensor]]


@torch.no_grad()
def encode_all(
    encode: Encoder,
    dataset: Dataset,
    device: torch.device,
    keep: Sequence[str],
    batch_size: int = 32,
    workers: int = 2,
    label: str = "clips",
) -> dict[str, Tensor]:
    """What a model makes of all items, in their order; every rank gets the whole result on the CPU.

    Args:
        encode: a model or DeepSpeed engine in eval mode.
        dataset: items of tensors and numbers; "valid" is for the result and not shown to the model.
        keep: names of the model's outputs or of the items' own tensors.
        label: for the progress bar.
    """
    total, rank, world = len(dataset), *rank_and_world()  # type: ignore[arg-type]
    # every rank runs the same number of batches, as ZeRO-3 needs: short shards repeat the last item
    per_rank = -(-total // world)
    shard = [min(rank * per_rank + i, total - 1) for i in range(per_rank)]
    loader = DataLoader(
        Subset(dataset, shard),
        batch_size=batch_size,
        num_workers=workers,
        worker_init_fn=_ignore_sigterm,
        generator=torch.Generator(),  # of its own: evaluating must not change what training draws
    )
    parts: dict[str, list[Tensor]] = {name: [] for name in keep}
    for batch in tqdm(loader, desc=f"encode {label}", disable=rank != 0, leave=False, mininterval=2):
        batch = {key: value.to(device) for key, value in batch.items()}
        outputs = {**batch, **encode({key: value for key, value in batch.items() if key != "valid"})}
        for name in keep:
            parts[name].append(outputs[name])
    return {name: gather_ranks(torch.cat(tensors), world)[:total].cpu() for name, tensors in parts.items()}


def _ignore_sigterm(worker: int) -> None:
    """A SIGTERM to the process tree is the trainer's to answer; the evaluation that it interrupts still ends."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)


def gather_ranks(rows: Tensor, world: int) -> Tensor:
    """The rows of all ranks, equally many each, in the order of the ranks."""
    if world == 1:
        return rows
    parts = [torch.empty_like(rows) for _ in range(world)]
    dist.all_gather(parts, rows.contiguous())
    return torch.cat(parts)


def rank_and_world() -> tuple[int, int]:
    """This process's number and how many there are: 0 and 1 without torch.distributed."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
