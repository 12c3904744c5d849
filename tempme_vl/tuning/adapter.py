"""Adapters (ICML 2019) in both of CLIP's towers: one bottleneck a block, behind its MLP."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch.nn.functional as F
from torch import Tensor, nn

from tempme_vl.backbones.base import BlockAdapter, BlockPlace, S
from tempme_vl.costs import linear
from tempme_vl.tuning.base import AddedModules

if TYPE_CHECKING:
    from tempme_vl.backbones.base import TowerShape
    from tempme_vl.merging.schedule import MergeSchedule
    from tempme_vl.tuning.model import TunableModel


@dataclass(frozen=True)
class Adapter(AddedModules):
    """A bottleneck on what each block's MLP gives: x + z + up(GELU(down(z))), z = MLP(x); `up` starts at zero.

    TempMe's table has a width of 8; where in a block the bottleneck stands is in no public code.

    Attributes:
        width: of the bottleneck.

    Raises:
        ValueError: a width below 1.
    """

    name: ClassVar[str] = "adapter"

    width: int = 8

    def __post_init__(self) -> None:
        if self.width < 1:
            raise ValueError(f"expected a width of at least 1; got {self.width}")

    def extend(self, model: TunableModel) -> None:
        """Raises:
        ValueError: a model without a text tower of open_clip.
        """
        text = model.clip_text()
        for block in model.visual_blocks():
            block.tuned = Adapted(model.frontend.shape.width, self.width)
        for block in text.adapters():
            block.tuned = Adapted(text.width, self.width)

    def cost(self, schedule: MergeSchedule, shape: TowerShape, published: bool = False) -> int:
        tokens = sum(n.clips * n.mlp for n in schedule.layer_counts)
        layers = linear(tokens, shape.width, self.width) + linear(tokens, self.width, shape.width)
        return layers + tokens * self.width  # and GELU


class Bottleneck(nn.Module):
    """(..., D) -> (..., D), zero at the start."""

    def __init__(self, width: int, inner: int):
        super().__init__()
        self.down, self.up = nn.Linear(width, inner), nn.Linear(inner, width)
        nn.init.zeros_(self.up.weight)
        nn.init.zeros_(self.up.bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.up(F.gelu(self.down(x)))


class Adapted(BlockPlace):
    """The bottleneck of a block."""

    def __init__(self, width: int, inner: int):
        super().__init__()
        self.bottleneck = Bottleneck(width, inner)

    def mlp_step(self, block: BlockAdapter, state: S) -> S:
        delta = block.mlp_branch(state.x)
        return state.add(delta + self.bottleneck(delta))
