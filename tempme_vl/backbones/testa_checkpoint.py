"""Public files of BLIP (ICML 2022) and TESTA (EMNLP Findings 2023): what of them fills a model that has their names.

Names and tensors only. BLIP's tower sees images: a tower of divided attention starts its attention over time as a copy
of the attention within frames, and the linear layer behind it at zero, so that it does nothing at first.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from tempme_vl.backbones.base import square_side
from tempme_vl.messages import few
from tempme_vl.weights.files import read_weights

# names of the visual tower and of its momentum copy
TOWER, MOMENTUM_TOWER = "visual_encoder.", "visual_encoder_m."
_POSITIONS, _TIMES = "pos_embed", "time_embed"


@dataclass(frozen=True)
class Converted:
    """Weights for a model, and where they came from.

    Attributes:
        state: by the model's names; positions may be new tensors, all others are those of the file.
        source: the name in the file of each, in the model's order.
        missing: names of the model that the file cannot fill.
        unused: names of the file without a place.
    """

    state: dict[str, Tensor]
    source: dict[str, str]
    missing: tuple[str, ...]
    unused: tuple[str, ...]

    def __str__(self) -> str:
        moved = [f"{name} from {source}" for name, source in self.source.items() if name != source]
        groups = (("from others", moved), ("missing", self.missing), ("unused", self.unused))
        counts = "; ".join(f"{len(keys)} {what}: {few(list(keys))}" for what, keys in groups if keys)
        return f"{len(self.state)} weights found; {counts or 'nothing is left'}"


def read_checkpoint(path: str | Path) -> dict[str, Tensor]:
    """The state dict of a file on the CPU, under "model" in public ones; see `tempme_vl.weights.files.read_weights`.

    Raises:
        ValueError: see there; or no file of BLIP or TESTA.
    """
    state = read_weights(path).state
    if not any(key.startswith(TOWER) for key in state):
        raise ValueError(
            f"expected a file of BLIP or TESTA, with keys such as {TOWER}blocks.0.attn.qkv.weight; {path} has "
            f"{few(list(state))}"
        )
    return state


def convert(state: Mapping[str, Tensor], wanted: Mapping[str, torch.Size], queues: bool = False) -> Converted:
    """What of a file fills a model.

    Args:
        state: as of `read_checkpoint`.
        wanted: names, as the public models have them, and shapes of the model's weights.
        queues: whether the queues of contrast and what numbers them are taken, to go on with the training that wrote
            the file. They are left out otherwise, as TESTA does: they hold features of another data set.

    Returns:
        the weights. Positions of another number of patches are resized, bicubic, and of another number of frames by the
        nearest; the momentum copy of the latter is then the resized one of the tower itself. A momentum copy that the
        file does not have is a copy of what it follows (TESTA's code wants it there).

    Raises:
        ValueError: positions that form no square.
    """
    found: dict[str, Tensor] = {}
    source: dict[str, str] = {}
    for name, shape in wanted.items():
        origin = next((other for other in _origins(name, state, shape) if other in state), None)
        if origin is None or ("queue" in name and not queues):
            continue
        source[name], found[name] = origin, _fitted(name, state[origin], shape)
    missing = tuple(name for name in wanted if name not in found)
    used = set(source.values())
    return Converted(found, source, missing, tuple(name for name in state if name not in used))


def _origins(name: str, state: Mapping[str, Tensor], shape: torch.Size) -> list[str]:
    """Names under which a file may hold a weight, the first choice first."""
    online = re.sub(r"^(visual_encoder|text_encoder|vision_proj|text_proj)_m\.", r"\1.", name)
    own = [name, online]
    if name.endswith(f".{_TIMES}") and name in state and state[name].shape != shape:
        own = [online]
    return own + [re.sub(r"\.temporal_(attn|norm1)\.", r".\1.", other) for other in own]


def _fitted(name: str, value: Tensor, shape: torch.Size) -> Tensor:
    if value.shape == shape:
        return value
    if name.endswith(f".{_POSITIONS}"):
        return resize_positions(value, square_side(shape[1] - 1))
    return resize_times(value, shape[1]) if name.endswith(f".{_TIMES}") else value


def resize_positions(table: Tensor, side: int) -> Tensor:
    """(1, 1 + L, D) positions of CLS and a square of patches -> (1, 1 + side^2, D), bicubic; CLS stays.

    Raises:
        ValueError: the patches form no square.
    """
    cls, patches = table[:, :1], table[:, 1:]
    given = square_side(patches.shape[1])
    grid = patches.unflatten(1, (given, given)).permute(0, 3, 1, 2)
    resized = F.interpolate(grid, size=(side, side), mode="bicubic", align_corners=False)
    return torch.cat([cls, resized.flatten(2).transpose(1, 2)], 1)


def nearest(given: int, wanted: int) -> Tensor:
    """(wanted,) int64: the place among `given` that each of `wanted` is at, rounded down."""
    return torch.arange(wanted) * given // wanted


def resize_times(table: Tensor, frames: int) -> Tensor:
    """(1, T, D) -> (1, frames, D), by the nearest."""
    return table[:, nearest(table.shape[1], frames).to(table.device)]
