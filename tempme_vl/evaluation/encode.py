"""A data set through a model, all ranks together, each its share; of the results only what is asked for is kept."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Subset
from tqdm import tqdm

from tempme_vl.processes import become_worker
from tempme_vl.training import distributed

Encoder = Callable[[Mapping[str, Tensor]], Mapping[str, Tensor]]
GATHERED_BYTES = 2**26  # of a rank at once, on the device


@dataclass(frozen=True)
class Rows:
    """Some neighbouring rows of a tensor that ranks hold together: those from `first` on, of `total`.

    Slices with the numbers of the whole tensor, as the whole tensor would, where it has them.
    """

    own: Tensor
    first: int
    total: int

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the whole tensor."""
        return self.total, *self.own.shape[1:]

    def __len__(self) -> int:
        return self.total

    def __getitem__(self, rows: slice) -> Tensor:
        start, stop, _ = rows.indices(self.total)
        if start < self.first or stop > self.first + len(self.own):
            raise IndexError(f"rows {start} to {stop} are not here, but {self.first} to {self.first + len(self.own)}")
        return self.own[start - self.first : stop - self.first]


def encode_all(
    encode: Encoder,
    dataset: Dataset,
    device: torch.device,
    keep: Sequence[str],
    batch_size: int = 32,
    workers: int = 2,
    label: str = "videos",
) -> dict[str, Tensor]:
    """What a model makes of all items, in their order; every rank gets the whole result on the CPU.

    Args: as in `encode_own`.
    """
    total = len(dataset)  # type: ignore[arg-type]
    shards = even_shards(total)
    own = encode_own(encode, dataset, device, keep, shards, batch_size, workers, label)
    return {name: gather_on_cpu(rows, device)[:total] for name, rows in own.items()}


def even_shards(total: int) -> list[list[int]]:
    """Numbers of items for every rank, in order and equally many; where there are too few the last one repeats."""
    world = distributed.world_size()
    per_rank = -(-total // world)
    return [[min(rank * per_rank + i, total - 1) for i in range(per_rank)] for rank in range(world)]


@torch.no_grad()
def encode_own(
    encode: Encoder,
    dataset: Dataset,
    device: torch.device,
    keep: Sequence[str],
    shards: Sequence[Sequence[int]],
    batch_size: int = 32,
    workers: int = 2,
    label: str = "videos",
) -> dict[str, Tensor]:
    """What a model makes of the items of this rank, on the CPU.

    Args:
        encode: a model or DeepSpeed engine in eval mode.
        dataset: items of tensors and numbers; "valid" is for the result and not shown to the model.
        keep: names of the model's outputs or of the items' own tensors.
        shards: numbers of the items of every rank, one at least. All ranks run equally many batches, as ZeRO-3 needs:
            to the results of a short shard those of its last item are added.
        workers: loader processes a rank; 0 loads in this one.
        label: for the progress bar.
    """
    rank = distributed.rank()
    own, longest = list(shards[rank]), max(map(len, shards))
    own += own[-1:] * (longest - len(own))
    loader = DataLoader(
        Subset(dataset, own),
        batch_size=batch_size,
        num_workers=workers,
        worker_init_fn=become_worker,
        generator=torch.Generator(),  # of its own: evaluating must not change what training draws
    )
    kept: dict[str, Tensor] = {}
    filled = 0
    waiting: dict[str, Tensor] = {}  # of the batch before: it is fetched while the device works on the next one

    def fetch() -> None:
        nonlocal filled
        for name, rows in waiting.items():
            if name not in kept:
                kept[name] = torch.empty(longest, *rows.shape[1:], dtype=rows.dtype)
            kept[name][filled : filled + len(rows)] = rows
        filled += len(next(iter(waiting.values()), ()))

    for batch in tqdm(loader, desc=f"encode {label}", disable=rank != 0, leave=False, mininterval=2):
        outputs = encode({key: value.to(device) for key, value in batch.items() if key != "valid"})
        made = {name: outputs[name] if name in outputs else batch[name] for name in keep}
        fetch()
        waiting = made
    fetch()
    return kept


def gather_on_cpu(rows: Tensor, device: torch.device) -> Tensor:
    """The rows of all ranks, equally many each, in the order of the ranks.

    They lie on the CPU and pass through `device`, which is where ranks can exchange them, some at a time.
    """
    world = distributed.world_size()
    if world == 1:
        return rows
    gathered = torch.empty(world, *rows.shape, dtype=rows.dtype)
    step = max(1, GATHERED_BYTES // max(1, rows[:1].nbytes))
    for first in range(0, len(rows), step):
        some = rows[first : first + step].to(device).contiguous()
        parts = [torch.empty_like(some) for _ in range(world)]
        dist.all_gather(parts, some)
        for rank, part in enumerate(parts):
            gathered[rank, first : first + step] = part
    return gathered.flatten(0, 1)
