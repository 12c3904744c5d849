"""What autograd keeps of a forward pass for the backward pass: counted, and nothing of it held."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Kept:
    """A tensor that is kept: its shape and type, and its memory's size and address (views share it)."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    bytes: int
    address: int


def kept_tensors(forward: Callable[[], object], known: Iterable[Tensor] = ()) -> list[Kept]:
    """Each memory once, that of weights and inputs left out.

    Everything is freed where it would be without a backward pass, but its address may then be another's: sums are right
    only while the result of `forward` is alive, which this holds on to.

    Args:
        forward: runs the model with gradients.
        known: weights and inputs, which are there anyway.
    """
    there = {tensor.untyped_storage().data_ptr() for tensor in known}
    held: list[Tensor] = []
    found: dict[int, Kept] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        address = storage.data_ptr()
        if address not in there and address not in found:
            held.append(tensor)
            found[address] = Kept(tuple(tensor.shape), tensor.dtype, storage.nbytes(), address)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        result = forward()
    del result
    return list(found.values())


def kept_bytes(model: nn.Module, x: Tensor) -> int:
    """Bytes that a model's forward pass on an input keeps for its backward pass."""
    return sum(kept.bytes for kept in kept_tensors(lambda: model(x), (x, *model.parameters(), *model.buffers())))
