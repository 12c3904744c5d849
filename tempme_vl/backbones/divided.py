"""Divided space-time attention (TimeSformer, ICML 2021): frames attend to each other at each place, then within
themselves.

The CLS token is the video's. Every frame has a copy of it, as attention within frames wants it; the copies are equal in
front of a block and behind it, and what counts tokens counts one.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from einops import rearrange
from torch import Tensor, nn

from tempme_vl.backbones.base import BlockAdapter, SelfAttention
from tempme_vl.state import AttentionContext, TokenState


def once(x: Tensor, clips: int, prefix: int) -> Tensor:
    """(B*C, N, ...) of clips with copies of their prefix -> (B, P + C * (N - P), ...): the first copy, then the rest of
    each clip in order."""
    by_clip = x.unflatten(0, (-1, clips))
    return torch.cat([by_clip[:, 0, :prefix], by_clip[:, :, prefix:].flatten(1, 2)], 1)


def copied(x: Tensor, clips: int, prefix: int) -> Tensor:
    """The way back: (B, P + C * (N - P), D) -> (B*C, N, D)."""
    shared, rest = x[:, :prefix], x[:, prefix:].unflatten(1, (clips, -1))
    return torch.cat([shared.unsqueeze(1).expand(-1, clips, -1, -1), rest], 2).flatten(0, 1)


def held_once(source: Tensor, clips: int, tokens: int, prefix: int, inputs: int) -> Tensor:
    """Which token of `once` holds which input token, those of the prefix counted once, too.

    Args:
        source: (B, F * N0) the token of the C clips of N tokens, one after the other, that holds each input token of
            F frames of N0 tokens, -1 for none.
        tokens, inputs: N, N0.

    Returns:
        (B, P + F * (N0 - P)).
    """
    clip, number = source.div(tokens, rounding_mode="floor"), source % tokens
    number = torch.where(number < prefix, number, number + clip * (tokens - prefix))
    number = torch.where(source < 0, source, number).unflatten(1, (-1, inputs))
    # a frame that was dropped takes its copy along, not the token
    first = torch.arange(prefix, device=source.device).expand(len(source), -1)
    return torch.cat([first, number[:, :, prefix:].flatten(1)], 1)


class TimeScale(nn.Module):
    """A learnt factor of each frame, 1 at the start: x (R, T, D) -> (R, T, D).

    Raises:
        ValueError: another number of frames.
    """

    def __init__(self, frames: int):
        super().__init__()
        self.temporal_scaling = nn.Parameter(torch.zeros(1, frames, 1))

    def forward(self, x: Tensor) -> Tensor:
        frames = self.temporal_scaling.shape[1]
        if x.shape[1] != frames:
            raise ValueError(
                f"each of {frames} frames has a factor of its own, and {x.shape[1]} are left: frames of a tower with "
                "temporal scaling cannot merge; merge patches alone, or build the tower without it"
            )
        return x * (self.temporal_scaling.tanh() + 1)


class ImageBlock(BlockAdapter):
    """A pre-norm block of a ViT for images, such as BLIP's: LayerNorm of eps 1e-6, exact GELU."""

    def __init__(self, width: int, heads: int, mlp_width: int):
        super().__init__()
        self.norm1, self.norm2 = (nn.LayerNorm(width, eps=1e-6) for _ in range(2))
        self.attn = SelfAttention(width, heads)
        self.mlp = nn.Sequential(nn.Linear(width, mlp_width), nn.GELU(), nn.Linear(mlp_width, width))

    def attention_branch(self, x: Tensor, bias: Tensor | None) -> tuple[Tensor, AttentionContext]:
        return self.attn(self.norm1(x), bias)

    def mlp_branch(self, x: Tensor) -> Tensor:
        return self.mlp(self.norm2(x))


class DividedBlock(ImageBlock):
    """The same with attention over time in front.

    Args:
        scaled: frames that have factors of their own, which nothing may merge; 0 for none.
    """

    def __init__(self, width: int, heads: int, mlp_width: int, scaled: int = 0):
        super().__init__(width, heads, mlp_width)
        self.temporal_norm1 = nn.LayerNorm(width, eps=1e-6)
        self.temporal_attn = SelfAttention(width, heads)
        self.scale = TimeScale(scaled) if scaled else nn.Identity()
        self.temporal_fc = nn.Linear(width, width)

    def time_step(self, state: TokenState) -> tuple[TokenState, AttentionContext]:
        """Attention over time, without the CLS token. The context has a row for each place of each video."""
        shared, frames = state.x[:, : state.num_prefix], state.x[:, state.num_prefix :]
        y = rearrange(frames, "(b t) l d -> (b l) t d", t=state.num_clips)
        attended, context = self.temporal_attn(self.temporal_norm1(y))
        y = y + self.temporal_fc(self.scale(attended))
        x = torch.cat([shared, rearrange(y, "(b l) t d -> (b t) l d", l=frames.shape[1])], 1)
        return replace(state, x=x), context

    # a block of frames apart takes any state; this one wants the CLS tokens of one that has clips
    def attention_step(self, state: TokenState) -> tuple[TokenState, AttentionContext]:  # type: ignore[override]
        """Attention within each frame; the CLS token becomes the mean of what it is in each."""
        state, attention = super().attention_step(state)
        shared, rest = state.x[:, : state.num_prefix], state.x[:, state.num_prefix :]
        mean = shared.unflatten(0, (-1, state.num_clips)).mean(1, keepdim=True)
        shared = mean.expand(-1, state.num_clips, -1, -1).flatten(0, 1)
        return replace(state, x=torch.cat([shared, rest], 1)), attention

    def mlp_step(self, state: TokenState) -> TokenState:  # type: ignore[override]
        """The MLP, of the CLS token once."""
        shape = state.num_clips, state.num_prefix
        whole = super().mlp_step(replace(state, x=once(state.x, *shape)))
        return replace(state, x=copied(whole.x, *shape))
