"""The few things ranks do together; all of them also work alone."""

from __future__ import annotations

import os
import socket
from typing import Any

import torch
import torch.distributed as dist

from tempme_vl import together
from tempme_vl.libraries import undocumented


def initialize() -> torch.device:
    """Joins the process group that the deepspeed launcher describes, or makes one of a single process.

    From then on the ranks end together (`tempme_vl.together`).

    Returns:
        this rank's device.
    """
    import deepspeed
    from deepspeed.accelerator import get_accelerator

    if "WORLD_SIZE" not in os.environ:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        alone = {
            "RANK": "0",
            "WORLD_SIZE": "1",
            "LOCAL_RANK": "0",
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
        }
        os.environ.update(alone)
    device = torch.device(get_accelerator().device_name(int(os.environ["LOCAL_RANK"])))
    if device.type == "cpu":
        # else DeepSpeed compiles an all-reduce for inference at start: half a minute and a compiler, for nothing here
        with undocumented("deepspeed"):
            deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        local_ranks = int(os.environ.get("LOCAL_WORLD_SIZE", os.environ["WORLD_SIZE"]))
        torch.set_num_threads(threads_of_rank(len(os.sched_getaffinity(0)), local_ranks))
    else:
        get_accelerator().set_device(device.index)
    first = not dist.is_initialized()
    deepspeed.init_distributed(verbose=False)
    if first:
        together.watch(rank(), world_size(), gather_objects)
    return device


def threads_of_rank(cores: int, local_ranks: int) -> int:
    """An equal part of the cores, and no more than OMP_NUM_THREADS where that is set: on cores that others use, too,
    threads that wait for each other made a step of a small model ten times as long (docs/LOG.md)."""
    share, asked = max(1, cores // local_ranks), os.environ.get("OMP_NUM_THREADS", "")
    return min(share, int(asked)) if asked.isdecimal() and int(asked) else share


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def is_main() -> bool:
    return rank() == 0


def barrier() -> None:
    """Waits for all ranks."""
    if world_size() > 1:
        dist.barrier()


def gather_objects(value: Any) -> list[Any]:
    """Every rank's value, in rank order, on every rank."""
    if world_size() == 1:
        return [value]
    values: list[Any] = [None] * world_size()
    dist.all_gather_object(values, value)
    return values


def any_rank(flags: list[bool], device: torch.device) -> list[bool]:
    """Element by element: whether any rank says True."""
    if world_size() == 1:
        return flags
    tensor = torch.tensor(flags, dtype=torch.int32, device=device)
    dist.all_reduce(tensor, op=dist.ReduceOp.MAX)
    return [bool(flag) for flag in tensor.tolist()]


def sums(values: list[float], device: torch.device) -> list[float]:
    """Each value summed over all ranks, in one exchange."""
    if world_size() == 1:
        return values
    tensor = torch.tensor(values, dtype=torch.float64, device=device)
    dist.all_reduce(tensor)
    return tensor.tolist()
