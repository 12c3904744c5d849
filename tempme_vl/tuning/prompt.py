"""Deep prompts (VPT, ECCV 2022) in both of CLIP's towers: learnt tokens that every block attends to."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tempme_vl.backbones.base import BlockAdapter, BlockPlace, S
from tempme_vl.state import AttentionContext
from tempme_vl.tuning.base import AddedModules

if TYPE_CHECKING:
    from tempme_vl.backbones.base import TowerShape
    from tempme_vl.merging.schedule import MergeSchedule
    from tempme_vl.tuning.model import TunableModel

STD = 0.02  # of prompts at the start


@dataclass(frozen=True)
class Prompt(AddedModules):
    """VPT-deep: in front of every block of both towers stand prompts of its own, which the next block does not see.

    Where a block's prompts are dropped after it, only its attention to them is left of them: so they are keys and
    values here, and pass neither the MLP nor any merging. In texts they stand behind the start token, whose place sees
    none of them. TempMe's table has 5 prompts a block; where they stand and how they start is in no public code.

    Attributes:
        tokens: prompts of a block in either tower.

    Raises:
        ValueError: no prompt.
    """

    name: ClassVar[str] = "prompt"

    tokens: int = 5

    def __post_init__(self) -> None:
        if self.tokens < 1:
            raise ValueError(f"expected at least 1 prompt a block; got {self.tokens}")

    def extend(self, model: TunableModel) -> None:
        """Raises:
        ValueError: a model without a text tower of open_clip.
        """
        width = model.clip_text().width
        for block in model.visual_blocks():
            block.tuned = Prompted(Rows(self.tokens, model.frontend.shape.width))
        for block in model.clip_text().adapters():
            block.tuned = Prompted(Rows(self.tokens, width))

    def cost(self, schedule: MergeSchedule, shape: TowerShape, published: bool = False) -> int:
        return cost_of_prompts(self.tokens, schedule, shape, published)

    def learnt_tokens(self, frames: int) -> int:
        return self.tokens


def cost_of_prompts(count: int, schedule: MergeSchedule, shape: TowerShape, published: bool) -> int:
    """What so many prompts in every block cost; as published they pass its MLP too, and are dropped behind it."""
    block, total = shape.block, 0
    for n in schedule.layer_counts:
        total += n.clips * (block.attention(n.attention + count) - block.attention(n.attention))
        total += n.clips * block.mlp(count) if published else 0
    return total


class Rows(nn.Module):
    """Learnt tokens: () -> (n, D)."""

    def __init__(self, count: int, width: int, std: float = STD):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(count, width))
        nn.init.normal_(self.weight, std=std)

    def forward(self) -> Tensor:
        return self.weight


class Prompted(BlockPlace):
    """Prompts of a block.

    Args:
        prompts: () -> (n, D).
    """

    def __init__(self, prompts: nn.Module):
        super().__init__()
        self.prompts = prompts

    def attention_step(self, block: BlockAdapter, state: S) -> tuple[S, AttentionContext]:
        return attend_to(block, state, self.prompts())


def attend_to(block: BlockAdapter, state: S, prompts: Tensor) -> tuple[S, AttentionContext]:
    """A block's attention, its tokens attending to prompts as well; what the prompts attend to is dropped.

    Args:
        prompts: (n, D), or (R, n, D) for each row of the state its own; behind the first word where the state is
            causal, so that all words but that one see them.
    """
    rows, n = len(state.x), prompts.shape[-2]
    x = torch.cat([state.x, prompts.to(state.x.dtype).expand(rows, -1, -1)], dim=1)
    bias = state.attention_bias
    if bias is not None:
        causal = bias.shape[2] > 1
        bias = F.pad(bias, (0, n, 0, n if causal else 0))
        if causal:
            hidden = torch.zeros_like(bias, dtype=torch.bool)
            hidden[:, :, 0, -n:] = True
            bias = bias.masked_fill(hidden, float("-inf"))
    delta, attention = block.attention_branch(x, bias)
    return state.add(delta[:, :-n]), attention.without_last(n)
