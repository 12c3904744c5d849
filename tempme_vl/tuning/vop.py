"""VoP (Text-Video Co-operative Prompt Tuning, CVPR 2023), the basic method: deep prompts in both of CLIP's towers."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar, cast

import torch
from torch import Tensor, nn

from tempme_vl.backbones.base import BlockAdapter, BlockPlace, S
from tempme_vl.state import AttentionContext
from tempme_vl.text.base import TextState
from tempme_vl.text.clip import WordPlace
from tempme_vl.tuning.base import AddedModules, Tuning
from tempme_vl.tuning.prompt import Prompted, Rows, cost_of_prompts

if TYPE_CHECKING:
    from tempme_vl.backbones.base import TowerShape
    from tempme_vl.merging.schedule import MergeSchedule
    from tempme_vl.tuning.model import TunableModel


@dataclass(frozen=True)
class Vop(AddedModules):
    """Prompts of every block behind the CLS token; those of the first pass the norm in front of the blocks. In texts a
    prefix behind the start token and a suffix before the last place, replaced in front of every block. Positions are
    added after the first ones are there, so that words move to later ones.

    Captions have `prefix + suffix` places fewer. With a suffix they always have all of them, and as in the released
    code a text is read at the place of its end token + `suffix`, where in shorter captions padding stands.

    The released code is ModelScope's, for the basic method alone and without training; VoP^F, VoP^C and VoP^P are in
    no public code.

    Attributes:
        visual, prefix, suffix: prompts of a block.

    Raises:
        ValueError: counts below 0, or none at all.
    """

    name: ClassVar[str] = "vop"

    visual: int = 8
    prefix: int = 4
    suffix: int = 4

    def __post_init__(self) -> None:
        counts = self.visual, self.prefix, self.suffix
        if min(counts) < 0 or not any(counts):
            raise ValueError(f"expected numbers of prompts from 0, and not only 0; got {self}")

    def extend(self, model: TunableModel) -> None:
        """Raises:
        ValueError: a model without a text tower of open_clip, or more prompts than a text has places for.
        """
        text, width, texts = model.clip_text(), model.frontend.shape.width, self.prefix + self.suffix
        if self.visual:
            norm = getattr(model.frontend.embed, "ln_pre", nn.Identity())
            for layer, block in enumerate(model.visual_blocks()):
                block.tuned = Prompted(Rows(self.visual, width) if layer else NormedRows(self.visual, width, norm))
        if texts:
            text.embed.tuned = PromptedWords(self.prefix, self.suffix, text.width)
            for block in text.adapters()[1:]:
                block.tuned = ReplacedWords(self.prefix, self.suffix, text.width)
            text.shorten(texts, fixed_length=self.suffix > 0)

    def cost(self, schedule: MergeSchedule, shape: TowerShape, published: bool = False) -> int:
        return cost_of_prompts(self.visual, schedule, shape, published)

    def learnt_tokens(self, frames: int) -> int:
        return self.visual


@dataclass(frozen=True)
class VopFrameAndContext(Tuning):
    """VoP^F+C, the paper's best: what it costs, and no more. Its prompts' module is in no public code, and 14.10 M
    weights are more than its text gives; prompts in every block, of which the first see a frame each and the last all
    tokens of a video, cost what the paper says.

    Attributes:
        visual: prompts of a frame, or of a video.
        joint: blocks that see all frames.
    """

    name: ClassVar[str] = "vop"
    runs: ClassVar[bool] = False

    visual: int = 4
    joint: int = 4

    def apply(self, model: TunableModel) -> None:
        """Raises:
        ValueError: always.
        """
        raise ValueError("VoP^F+C has no public code: choose vop, the basic method")

    def cost(self, schedule: MergeSchedule, shape: TowerShape, published: bool = False) -> int:
        block, total = shape.block, 0
        for layer, n in enumerate(schedule.layer_counts):
            clips = 1 if layer >= len(schedule.plan) - self.joint else n.clips
            tokens = n.clips // clips * n.attention + self.visual
            total += clips * block.whole(tokens) - n.clips * (block.attention(n.attention) + block.mlp(n.mlp))
        return total

    def learnt_tokens(self, frames: int) -> int:
        return self.visual


class NormedRows(Rows):
    """Learnt tokens after a norm of the tower: () -> (n, D)."""

    def __init__(self, count: int, width: int, norm: nn.Module):
        super().__init__(count, width)
        self.norm = (norm,)  # the tower's own, which has its place there

    def forward(self) -> Tensor:
        return self.norm[0](self.weight)


class PromptedWords(WordPlace):
    """The first block's prompts among the words: behind the first word, and before the last."""

    def __init__(self, prefix: int, suffix: int, width: int):
        super().__init__()
        self.prefix, self.suffix, self.prompts = prefix, suffix, Rows(prefix + suffix, width)

    def forward(self, words: Tensor, end: Tensor) -> tuple[Tensor, Tensor]:
        prompts = self.prompts().to(words.dtype).expand(len(words), -1, -1)
        before, behind = prompts[:, : self.prefix], prompts[:, self.prefix :]
        x = torch.cat([words[:, :1], before, words[:, 1:-1], behind, words[:, -1:]], dim=1)
        return x, end + self.prefix + self.suffix


class ReplacedWords(BlockPlace):
    """A later block's prompts in the places of those before."""

    def __init__(self, prefix: int, suffix: int, width: int):
        super().__init__()
        self.prefix, self.suffix, self.prompts = prefix, suffix, Rows(prefix + suffix, width)

    def attention_step(self, block: BlockAdapter, state: S) -> tuple[S, AttentionContext]:
        x, last = state.x, state.x.shape[1] - 1
        prompts = self.prompts().to(x.dtype).expand(x.shape[0], -1, -1)
        before, behind = prompts[:, : self.prefix], prompts[:, self.prefix :]
        words = x[:, 1 + self.prefix : last - self.suffix]
        x = torch.cat([x[:, :1], before, words, behind, x[:, last:]], dim=1)
        return super().attention_step(block, cast(S, replace(cast(TextState, state), x=x)))
