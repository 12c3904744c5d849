"""TESTA-CLIP, the row of TempMe's table: LoRA, and attention over time in some blocks with LoRA of its own.

Built from its cost and number of weights alone: no code or text says how TESTA (EMNLP Findings 2023) was put into CLIP,
so nothing of it is verified.
"""

from __future__ import annotations

from copy import deepcopy
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, cast

from torch import nn

from tempme_vl.backbones.base import BlockAdapter, BlockPlace, S
from tempme_vl.backbones.open_clip_blocks import OpenCLIPBlock
from tempme_vl.state import AttentionContext, TokenState
from tempme_vl.tuning.lora import Lora

if TYPE_CHECKING:
    from collections.abc import Sequence

    from tempme_vl.backbones.base import TowerShape
    from tempme_vl.merging.schedule import MergeSchedule
    from tempme_vl.tuning.model import TunableModel

_USUAL = 4  # blocks with attention over time, from the one before the last


@dataclass(frozen=True)
class TestaClip(Lora):
    """LoRA in both towers, and in some visual blocks, before their own attention, attention of each patch to the same
    places in all frames, as TimeSformer divides space and time. It starts as a frozen copy of the block's norm and
    attention, and only its LoRA trains, as all else: 589,824 weights at ViT-B. CLS tokens take no part.

    Where merging has made clips, patches of the same number in all clips attend to each other, which need not be the
    same places; where one clip is left, there is nothing to attend to.

    Attributes:
        blocks: numbers of the visual blocks with attention over time; default: four before the last one, 7 to 10 of 12.

    Raises:
        ValueError: see `Lora`.
    """

    name: ClassVar[str] = "testa_clip"
    stays: ClassVar[bool] = True  # LoRA is merged into the attention over time, which stays

    blocks: tuple[int, ...] | None = None

    def extend(self, model: TunableModel) -> None:
        """Raises:
        ValueError: a visual tower that is not CLIP's, numbers of blocks that it does not have, or blocks that see all
            frames in one clip.
        """
        tower = model.visual_blocks()
        if not all(isinstance(block, OpenCLIPBlock) for block in tower):
            raise ValueError(
                f"testa_clip copies attention of CLIP's own blocks; got {type(tower[0]).__name__}: choose lora"
            )
        last, numbers = len(tower) - 1, self.numbers(len(tower))
        clips = [count.clips for count in model.frontend.schedule.layer_counts]
        for number in numbers:
            if not 0 <= number <= last:
                raise ValueError(f"testa_clip: expected numbers of blocks from 0 to {last}; got {number}")
            tower[number].tuned = OverTime(cast(OpenCLIPBlock, tower[number]))
        if all(clips[number] == 1 for number in numbers):
            raise ValueError(
                f"testa_clip: method {model.frontend.schedule.method!r} leaves one clip in all of the blocks "
                f"{list(numbers)}, and attention over time needs several: choose other blocks, or lora"
            )

    def numbers(self, layers: int) -> Sequence[int]:
        """Those of the blocks with attention over time."""
        return range(max(0, layers - 1 - _USUAL), layers - 1) if self.blocks is None else self.blocks

    def cost(self, schedule: MergeSchedule, shape: TowerShape, published: bool = False) -> int:
        """As published frames become fewer behind the attention over time, and not in front of it."""
        total = 0
        for number in self.numbers(len(schedule.plan)):
            n = schedule.layer_counts[number]
            clips = n.clips + schedule.plan[number].fewer_clips * published
            total += (n.attention - n.prefix) * shape.block.attention(clips) if clips > 1 else 0
        return total

    def apply(self, model: TunableModel) -> None:
        """Raises:
        ValueError: see `extend`.
        """
        self.extend(model)
        super().apply(model)


class OverTime(BlockPlace):
    """Attention of each patch to those of its number in other clips, in front of the block's own."""

    def __init__(self, block: OpenCLIPBlock):
        super().__init__()
        self.norm: nn.Module = deepcopy(block.ln_1)
        self.attn = deepcopy(block.attn)
        self.requires_grad_(False)

    def attention_step(self, block: BlockAdapter, state: S) -> tuple[S, AttentionContext]:
        tokens = cast(TokenState, state)
        clips, prefix, x = tokens.num_clips, tokens.num_prefix, tokens.x
        if clips > 1:
            videos, patches = x.shape[0] // clips, x.shape[1] - prefix
            by_patch = x[:, prefix:].unflatten(0, (videos, clips)).transpose(1, 2).flatten(0, 1)  # (B*N, C, D)
            delta = self.attn(self.norm(by_patch))[0].unflatten(0, (videos, patches)).transpose(1, 2).flatten(0, 1)
            state = state.add(nn.functional.pad(delta, (0, 0, prefix, 0)))
        return super().attention_step(block, state)
