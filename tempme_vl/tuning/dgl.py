"""DGL (Dynamic Global-Local Prompt Tuning, AAAI 2024): prompts of frames and of the whole video, made of the same
learnt rows as those of the text.

Letters beside those of `tempme_vl.state`: G prompts of a video, n of a frame.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar, Literal, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tempme_vl.backbones.attention import attend
from tempme_vl.backbones.base import BlockAdapter, BlockPlace, QuickGELU, S
from tempme_vl.backbones.open_clip_blocks import OpenCLIPBlock
from tempme_vl.costs import attention as products
from tempme_vl.costs import linear, norm
from tempme_vl.pooling import FramePlace
from tempme_vl.precision import at_least_float32
from tempme_vl.state import AttentionContext, TokenState
from tempme_vl.tuning.base import AddedModules
from tempme_vl.tuning.block import Block
from tempme_vl.tuning.prompt import STD, Rows, attend_to

if TYPE_CHECKING:
    from tempme_vl.backbones.base import TowerShape
    from tempme_vl.merging.schedule import MergeSchedule
    from tempme_vl.tuning.model import TunableModel

Feature = Literal["global_prompt0", "average_global_prompt", "average_frame_cls_token", "average_both"]


@dataclass(frozen=True)
class Dgl(AddedModules):
    """Every block has local prompts of each frame, and prompts of the text behind its start token. Global prompts of
    the video enter once and go through all blocks: frames attend to them and to their own tokens, they attend to
    themselves and to all tokens of all frames, padding frames among them. A video is what the first of them becomes.

    The public code also has prompts behind the end token of a text, which no word sees in CLIP: their projection
    (393,728 of the 827,392 weights of "linear" at ViT-B) is counted here and never learns. It computes keys and values
    of global prompts anew in every frame, and those of all tokens for the global prompts; here they are shared.

    Attributes:
        prompts: "linear" has local prompts as weights, those of texts being linear functions of them; "transformer"
            makes both by one block and an MLP of learnt rows, and each frame has its own.
        tokens: local prompts of a frame, and global ones of a video; "linear" has as many before the words of a text.
        text_tokens: of "transformer": half of them stand before the words, half behind.
        feature: what a video is: the first global prompt, the mean of them, the mean of the frames' CLS tokens, or the
            mean of both means.

    Raises:
        ValueError: no tokens, or an odd number of those of a text.
    """

    name: ClassVar[str] = "dgl"

    prompts: Literal["linear", "transformer"] = "linear"
    tokens: int = 4
    text_tokens: int = 8
    feature: Feature = "global_prompt0"

    def __post_init__(self) -> None:
        if self.tokens < 1 or self.text_tokens < 2 or self.text_tokens % 2:
            raise ValueError(f"expected tokens from 1 and an even number of text_tokens from 2; got {self}")

    def extend(self, model: TunableModel) -> None:
        """Raises:
        ValueError: a model whose towers are not both CLIP's, or whose text tower is the deeper one; of "transformer",
            merging that leaves fewer frames.
        """
        text, blocks, shape = model.clip_text(), model.visual_blocks(), model.frontend.shape
        if not all(isinstance(block, OpenCLIPBlock) for block in blocks) or len(text.blocks) > len(blocks):
            raise ValueError(
                "dgl reads queries, keys and values of CLIP's own visual tower, whose blocks have prompts for those of "
                f"the text; got {type(blocks[0]).__name__} x {len(blocks)} with {len(text.blocks)} of the text: choose "
                "prompt or vop"
            )
        sizes = len(blocks), shape.width, text.width
        made: LinearPrompts | TransformedPrompts
        if self.prompts == "linear":
            made = LinearPrompts(*sizes, self.tokens)
        else:
            model.check_every_frame(self.name)
            frames = model.frontend.schedule.frames
            made = TransformedPrompts(*sizes, self.tokens, self.text_tokens, frames, shape.heads)
        model.frontend.tuned = VideoFeature(self.feature, made, Rows(self.tokens, shape.width))
        for layer, block in enumerate(blocks):
            start = model.frontend.tuned.video if layer == 0 else None
            block.tuned = GlobalAndLocal(made, layer, start)
        for layer, word_block in enumerate(text.adapters()):
            word_block.tuned = BehindStart(made, layer)

    def cost(self, schedule: MergeSchedule, shape: TowerShape, published: bool = False) -> int:
        """As published local prompts are queries and pass the MLP too, keys and values are computed anew wherever they
        are attended to, and one token alone is projected in the end."""
        block, width, g = shape.block, shape.width, self.tokens
        total = 0
        for n in schedule.layer_counts:
            local = self.tokens if self.prompts == "linear" else self.tokens * schedule.frames // n.clips
            keys = n.attention + local  # of a clip
            queries = keys if published else n.attention
            every = n.clips * keys + g
            if published:
                projected = n.clips * (linear(queries, width, 2 * width) + linear(keys + g, width, 2 * width))
                projected += linear(g, width, 2 * width) + linear(every, width, 2 * width)
            else:
                projected = linear(every, width, 3 * width) + linear(n.clips * queries + g, width, width)
            total += norm(every, width) + projected
            total += n.clips * products(queries, keys + g, width, shape.heads) + products(g, every, width, shape.heads)
            total += block.mlp(n.clips * (n.mlp + local * published) + g)
            total -= n.clips * (block.attention(n.attention) + block.mlp(n.mlp))
        embedded = 1 - schedule.pooled_prefixes if published else g  # beside those of frames
        return total + norm(embedded, width) + linear(embedded, width, shape.embed_dim, bias=False)

    def learnt_tokens(self, frames: int) -> int:
        return self.tokens * frames + self.tokens

    def published(self) -> dict[str, Any]:
        lr = 5e-3 if self.prompts == "linear" else 2e-3
        return {"lr_new": lr, "optimizer": "adamw", "beta2": 0.98, "weight_decay": 0.2, "schedule": "cosine"}


class LinearPrompts(nn.Module):
    """Local prompts of every block, and linear functions of them for its text."""

    def __init__(self, layers: int, width: int, text_width: int, tokens: int):
        super().__init__()
        self.local = nn.Parameter(torch.empty(tokens, layers, width))
        nn.init.normal_(self.local, std=STD)
        self.before = nn.Linear(width, text_width)
        self.behind = nn.Linear(width, text_width)  # no word sees what it gives

    def forward(self, layer: int, of_text: bool) -> Tensor:
        """The prompts of a block: (n, D) of every frame, or (n, D_text) before the words of a text."""
        local = self.local[:, layer]
        return self.before(local) if of_text else local


class TransformedPrompts(nn.Module):
    """Rows of every block, those of its text and those of each frame, that have attended to each other."""

    def __init__(
        self, layers: int, width: int, text_width: int, tokens: int, text_tokens: int, frames: int, heads: int
    ):
        super().__init__()
        self.tokens, self.text_tokens = tokens, text_tokens
        self.rows = nn.Parameter(torch.empty(text_tokens + tokens * frames, layers, width))
        nn.init.normal_(self.rows, std=STD)
        self.block = Block(width, heads)
        self.to_text = nn.Sequential(nn.Linear(width, 2 * width), QuickGELU(), nn.Linear(2 * width, text_width))

    def forward(self, layer: int, of_text: bool) -> Tensor:
        """The prompts of a block: (F, n, D) of every frame, or (P / 2, D_text) before the words of a text."""
        rows = self.block(self.rows[:, layer].unsqueeze(0)).squeeze(0)
        if of_text:
            return self.to_text(rows[: self.text_tokens // 2])
        return rows[self.text_tokens :].unflatten(0, (-1, self.tokens))


class BehindStart(BlockPlace):
    """Prompts of a block behind the start token of texts."""

    def __init__(self, prompts: nn.Module, layer: int):
        super().__init__()
        self.made, self.layer = (prompts,), layer  # `VideoFeature` owns them

    def attention_step(self, block: BlockAdapter, state: S) -> tuple[S, AttentionContext]:
        return attend_to(block, state, self.made[0](self.layer, of_text=True))


class GlobalAndLocal(BlockPlace):
    """Prompts of a block for frames and for the video.

    Args:
        start: () -> (G, D), the prompts of the video where this is the first block.
    """

    def __init__(self, prompts: nn.Module, layer: int, start: nn.Module | None):
        super().__init__()
        self.made, self.layer, self.start = (prompts,), layer, (start,)  # `VideoFeature` owns them

    def attention_step(self, block: BlockAdapter, state: S) -> tuple[S, AttentionContext]:
        done, attention = self._attend(cast(OpenCLIPBlock, block), cast(TokenState, state))
        return cast(S, done), attention

    def _attend(self, block: OpenCLIPBlock, state: TokenState) -> tuple[TokenState, AttentionContext]:
        rows, n, _ = state.x.shape
        videos, clips = rows // state.num_clips, state.num_clips
        video = state.video_tokens
        if video is None:
            start = self.start[0]
            assert start is not None
            video = start().to(state.x.dtype).expand(videos, -1, -1)
        local = self.made[0](self.layer, of_text=False).to(state.x.dtype)
        if local.ndim == 3:  # each frame's own, of all the frames of a clip
            local = local.unflatten(0, (clips, -1)).flatten(1, 2).repeat(videos, 1, 1)
        x = torch.cat([state.x, local.expand(rows, -1, -1)], dim=1)
        q, k, v = block.attn.project(block.ln_1(x))
        q_G, k_G, v_G = block.attn.project(block.ln_1(video))
        others, bias = x.shape[1] - n + video.shape[1], state.attention_bias

        of_clips, of_videos = _repeated(clips), _joined(clips)
        bias_frames = None if bias is None else F.pad(bias, (0, others))
        keys, values = (torch.cat([own, of_clips(g)], dim=2) for own, g in ((k, k_G), (v, v_G)))
        attended = attend(q[:, :, :n], keys, values, bias_frames)

        keys_G, values_G = (torch.cat([of_videos(own), g], dim=2) for own, g in ((k, k_G), (v, v_G)))
        bias_G = None
        if bias is not None:
            own = F.pad(bias, (0, x.shape[1] - n)).unflatten(0, (-1, clips)).flatten(1)  # (B, C (N + n))
            bias_G = F.pad(own, (0, video.shape[1])).unsqueeze(1).unsqueeze(1)
        attended_G = attend(q_G, keys_G, values_G, bias_G)

        video = video + block.ls_1(block.attn.proj(attended_G))
        done = replace(state.add(block.ls_1(block.attn.proj(attended))), video_tokens=video)
        return done, AttentionContext(k[:, :, :n], q[:, :, :n], bias, other_keys=keys[:, :, n:])

    def mlp_step(self, block: BlockAdapter, state: S) -> S:
        tokens = cast(TokenState, state)
        assert tokens.video_tokens is not None
        video = tokens.video_tokens + block.mlp_branch(tokens.video_tokens)
        return cast(S, replace(tokens.add(block.mlp_branch(tokens.x)), video_tokens=video))


def _repeated(clips: int) -> Callable[[Tensor], Tensor]:
    """(B, heads, G, D_head) of videos -> (B*C, heads, G, D_head), the same for every clip."""
    return lambda x: x.repeat_interleave(clips, dim=0)


def _joined(clips: int) -> Callable[[Tensor], Tensor]:
    """(B*C, heads, N, D_head) of clips -> (B, heads, C*N, D_head)."""
    return lambda x: x.unflatten(0, (-1, clips)).transpose(1, 2).flatten(2, 3)


class VideoFeature(FramePlace):
    """What stands for a video, and the learnt weights of all places: (B, E).

    Args:
        video: () -> (G, D), the global prompts.
    """

    def __init__(self, feature: Feature, prompts: nn.Module, video: nn.Module):
        super().__init__()
        self.feature, self.prompts, self.video = feature, prompts, video

    def forward(
        self, frames: Tensor, frame_mask: Tensor | None, video: Tensor | None, clip_of: Tensor | None = None
    ) -> Tensor:
        assert video is not None
        frames, video = at_least_float32(frames), at_least_float32(video)
        if self.feature == "global_prompt0":
            return video[:, 0]
        if self.feature == "average_global_prompt":
            return video.mean(1)
        if self.feature == "average_frame_cls_token":
            return frames.mean(1)
        return (video.mean(1) + frames.mean(1)) / 2
