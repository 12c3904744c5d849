"""DoRA (ICML 2024) on the layers of LoRA: a learnt length of each row of a weight, beside LoRA of its direction."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tempme_vl.precision import at_least_float32
from tempme_vl.tuning.lora import Lora

if TYPE_CHECKING:
    from tempme_vl.tuning.model import TunableModel

_A, _B, _MAGNITUDE = ".lora_A", ".lora_B", ".lora_magnitude"


@dataclass(frozen=True)
class Dora(Lora):
    """y = x (m W' / |W'|)^T + b, W' = W + alpha / rank * B A, |.| of each row, whose gradient is left out (section
    4.3); m starts as |W|, A and B as in LoRA, and the three train.

    The same numbers as peft's, whose layers a graph without breaks does not hold.

    Raises:
        ValueError: see `Lora`.
    """

    name: ClassVar[str] = "dora"
    magnitudes: ClassVar[bool] = True

    def inject(self, model: TunableModel, layers: Sequence[str]) -> None:
        """Raises:
        ValueError: a layer that is not linear.
        """
        for name in layers:
            layer = model.get_submodule(name)
            if not isinstance(layer, nn.Linear):
                raise ValueError(f"dora works on linear layers; {name} is {type(layer).__name__}: choose other targets")
            parent, _, last = name.rpartition(".")
            setattr(model.get_submodule(parent), last, DoraLinear(layer, self.rank, self.scale, self.dropout))

    def published(self) -> dict[str, Any]:
        return {}  # nobody has trained retrieval with it

    def plain(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """m W' / |W'|, in float32."""
        merged = {name: value for name, value in state.items() if not self.is_new(name)}
        for layer in [name.removesuffix(_A) for name in state if name.endswith(_A)]:
            weight, a, b, magnitude = (state[layer + last] for last in (".weight", _A, _B, _MAGNITUDE))
            turned = weight.float() + self.scale * (b.float() @ a.float())
            scaled = turned * (magnitude.float() / turned.norm(dim=1)).unsqueeze(1)
            merged[f"{layer}.weight"] = scaled.to(weight.dtype)
        return merged


class DoraLinear(nn.Module):
    """A linear layer whose weight W (D_out, D) and bias keep their names, with A (rank, D), B (D_out, rank) and the
    magnitudes m (D_out,) beside them."""

    def __init__(self, linear: nn.Linear, rank: int, scale: float, dropout: float):
        super().__init__()
        self.scale, self.dropout = scale, nn.Dropout(dropout)
        self.weight, self.bias = linear.weight, linear.bias
        self.lora_A = nn.Parameter(linear.weight.new_empty(rank, linear.in_features))
        self.lora_B = nn.Parameter(linear.weight.new_zeros(linear.out_features, rank))
        nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))
        self.lora_magnitude = nn.Parameter(self.lengths())

    @torch.no_grad()
    def lengths(self) -> Tensor:
        """|W'|, (D_out,), at least float32."""
        weight, a, b = (at_least_float32(each) for each in (self.weight, self.lora_A, self.lora_B))
        # a model on the meta device, whose weights are counted, has no autocast
        with nullcontext() if weight.is_meta else torch.autocast(weight.device.type, enabled=False):
            return (weight + self.scale * (b @ a)).norm(dim=1)

    def forward(self, x: Tensor) -> Tensor:
        """(..., D) -> (..., D_out); dropout is on what is turned and scaled, as peft has it."""
        by_weight = F.linear(x, self.weight)
        dropping = self.training and self.dropout.p > 0
        given = self.dropout(x) if dropping else x
        straight = F.linear(given, self.weight) if dropping else by_weight
        turned = self.scale * F.linear(F.linear(given, self.lora_A), self.lora_B)
        factor = self.lora_magnitude / self.lengths()
        y = by_weight + (factor - 1).to(x.dtype) * straight + factor.to(x.dtype) * turned
        return y if self.bias is None else y + self.bias
