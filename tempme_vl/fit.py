"""Whether weights fit a model, found out before any is loaded."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from tempme_vl.messages import few


def load_strictly(module: nn.Module, state: Mapping[str, Tensor], source: str) -> None:
    """`load_state_dict` of all weights, once it is certain that they fit.

    Raises:
        ValueError: see `misfits`.
    """
    if trouble := misfits(module.state_dict(), state):
        raise ValueError(f"{source} does not hold the weights of this model: {trouble}")
    module.load_state_dict(state)


def misfits(expected: Mapping[str, Tensor], state: Mapping[str, Tensor]) -> str:
    """What is missing, unknown, of another shape or no usable numbers, in one line; empty where all is well."""
    both = sorted(expected.keys() & state.keys())
    groups = {
        "of other shapes": [
            f"{key} {tuple(state[key].shape)} instead of {tuple(expected[key].shape)}"
            for key in both
            if state[key].shape != expected[key].shape
        ],
        "missing": sorted(expected.keys() - state.keys()),
        "unknown": sorted(state.keys() - expected.keys()),
        "of a dtype that needs a scale, as quantised weights do": [
            f"{key} {state[key].dtype}"
            for key in both
            if expected[key].dtype.is_floating_point and not _plain(state[key].dtype)
        ],
    }
    found = [f"{len(keys)} {what}: {few(keys)}" for what, keys in groups.items() if keys]
    if not found:
        endless = [key for key in both if not state[key].isfinite().all()]
        found = [f"{len(endless)} are not finite: {few(endless)}"] if endless else []
    return "; ".join(found)


def _plain(dtype: torch.dtype) -> bool:
    return dtype.is_floating_point and dtype.itemsize > 1
