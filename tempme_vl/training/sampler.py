"""The order of training samples, as a function of the step alone."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from torch.utils.data import Sampler


class StepSampler(Sampler[list[tuple[int, int]]]):
    """The batches of one rank from a given step to the last, each a list of (epoch, sample index).

    Each epoch is a permutation drawn from (seed, epoch), cut into global batches; a rank takes its contiguous part
    of each, so that all ranks' parts in rank order are the batch of a single process. The last, incomplete batch
    of an epoch is left out; its samples come in other epochs.

    Raises:
        ValueError: fewer samples than a batch, or a batch that the ranks do not divide.
    """

    def __init__(
        self,
        num_samples: int,
        batch_size: int,
        epochs: int,
        seed: int,
        start_step: int = 0,
        rank: int = 0,
        world: int = 1,
    ):
        if batch_size % world:
            raise ValueError(
                f"a global batch of {batch_size} does not divide over {world} ranks; change --batch-size or the number "
                "of ranks"
            )
        if num_samples < batch_size:
            raise ValueError(
                f"a batch of {batch_size} needs as many samples; the training split has {num_samples}; "
                "lower --batch-size"
            )
        self.num_samples, self.batch_size, self.seed = num_samples, batch_size, seed
        self.start_step, self.rank, self.world = start_step, rank, world
        self.steps_per_epoch = num_samples // batch_size
        self.total_steps = epochs * self.steps_per_epoch

    def __len__(self) -> int:
        return self.total_steps - self.start_step

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        local = self.batch_size // self.world
        order, order_epoch = np.empty(0, dtype=np.int64), -1
        for step in range(self.start_step, self.total_steps):
            epoch, batch = divmod(step, self.steps_per_epoch)
            if epoch != order_epoch:
                order, order_epoch = np.random.default_rng((self.seed, epoch)).permutation(self.num_samples), epoch
            first = batch * self.batch_size + self.rank * local
            yield [(epoch, int(index)) for index in order[first : first + local]]
