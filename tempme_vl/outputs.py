"""What leaves a tower behind its last block: tokens, embeddings, and where each input token went.

Letters: B videos of F frames, C clips that are left, N tokens of a clip, M of a video; D wide, E in embeddings.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from einops import rearrange
from torch import Tensor, nn

from tempme_vl.backbones.base import TowerShape
from tempme_vl.backbones.divided import held_once, once
from tempme_vl.merging import MergeSchedule
from tempme_vl.pooling import FramePlace, real_frames
from tempme_vl.state import FrontendOutput, TokenState


class Readout(NamedTuple):
    """What stands behind the blocks of a tower, and how many tokens there were."""

    norm: nn.Module
    head: nn.Module
    shape: TowerShape
    schedule: MergeSchedule


def direction_of(text: Tensor, norm: nn.Module, head: nn.Module, width: int) -> Tensor:
    """The direction among a tower's tokens that leads to embeddings: (B, E) -> (B, D), without gradient.

    What a token's projection has in common with an embedding is, but for its length, what the token has in common with
    this: the projection's transpose, and the scale and the mean of a LayerNorm in front of it.
    """
    direction = torch.autograd.functional.vjp(head, text.new_zeros(len(text), width), text)[1]
    if not isinstance(norm, nn.LayerNorm):
        return direction
    direction = direction * norm.weight.detach()
    return direction - direction.mean(1, keepdim=True)


def read_out(state: TokenState, frame_mask: Tensor | None, tower: Readout, place: FramePlace) -> FrontendOutput:
    """The output of a batch of videos.

    Args:
        state: behind the last block.
        frame_mask: (B, F), nonzero for real frames; None for all.
        place: where frames become a video.
    """
    if tower.shape.pooling == "all":
        return _with_one_prefix(state, frame_mask, tower, place)
    tokens, size = (rearrange(t, "(b c) n d -> b (c n) d", c=state.num_clips) for t in (state.x, state.size))
    frames = embed_frames(state, tower)
    video = None if state.video_tokens is None else tower.head(tower.norm(state.video_tokens))
    pooled = place(frames, frame_mask, video, state.clip_of)
    real = None if frame_mask is None else real_frames(frame_mask, frames.shape[1], state.clip_of)
    return FrontendOutput(tokens, pooled, size, frames, source_of_video(state), real)


def _with_one_prefix(state: TokenState, frame_mask: Tensor | None, tower: Readout, place: FramePlace) -> FrontendOutput:
    """With the video's CLS token once, and one embedding, of the mean of all tokens whose frames are real."""
    clips, prefix = state.num_clips, state.num_prefix
    tokens, size = once(state.x, clips, prefix), once(state.size, clips, prefix)
    size = torch.cat([torch.ones_like(size[:, :prefix]), size[:, prefix:]], 1)
    x = tower.norm(tokens)
    if frame_mask is None:
        video = x.mean(1, keepdim=True)
    else:
        real = real_frames(frame_mask, clips, state.clip_of).repeat_interleave(state.x.shape[1] - prefix, 1)
        counted = torch.cat([real.new_ones(len(real), prefix), real], 1).unsqueeze(2).to(x.dtype)
        video = (x * counted).sum(1, keepdim=True) / counted.sum(1, keepdim=True)
    frames, source = tower.head(video), source_of_video(state)
    if source is not None and tower.shape.divided:
        source = held_once(source, clips, state.x.shape[1], prefix, tower.schedule.tokens)
    elif source is not None:  # patch by patch, the frames of each
        places = source[:, prefix:].unflatten(1, (-1, tower.schedule.frames))
        source = torch.cat([source[:, :prefix], places.transpose(1, 2).flatten(1)], 1)
    return FrontendOutput(tokens, place(frames, None, None), size, frames, source)


def embed_frames(state: TokenState, tower: Readout) -> Tensor:
    """Projected embeddings, one a frame: (B, F, E), or (B, C, E) where clips hold several frames.

    Each frame's CLS token in a tower that pools by it, however much was merged. Else the clip's normed tokens, CLS and
    registers left out, by their mean or by attention, where a token of size s counts as s tokens.
    """
    clips, prefix, shape = state.num_clips, state.num_prefix, tower.shape
    if shape.pooling == "cls":
        frames = prefix - state.num_inserted
        cls = state.x[:, : frames : shape.num_prefix]  # registers stand behind their frame's CLS token
        return tower.head(rearrange(tower.norm(cls), "(b c) f d -> b (c f) d", c=clips))
    x, size = tower.norm(state.x[:, prefix:]), state.size[:, prefix:]
    parts, whole = clips, tower.schedule.frames * (shape.tokens - shape.num_prefix)
    if clips * x.shape[1] == whole:  # every frame still has its own tokens, whether or not it attended to others
        parts = tower.schedule.frames
        x, size = (rearrange(t, "r (f n) d -> (r f) n d", f=parts // clips) for t in (x, size))
    if shape.pooling == "attention":
        return tower.head(x, size if state.merged else None).unflatten(0, (-1, parts))
    size = size.to(x.dtype)
    return tower.head(((x * size).sum(dim=1) / size.sum(dim=1)).unflatten(0, (-1, parts)))


def source_of_video(state: TokenState) -> Tensor | None:
    """Which of a video's tokens, its clips' one after the other, holds each input token, -1 for none: (B, S)."""
    if state.source is None:
        return None
    clip = torch.arange(state.num_clips, device=state.source.device).view(1, -1, 1)
    source = state.source.unflatten(0, (-1, state.num_clips))
    source = torch.where(source < 0, source, source + clip * state.x.shape[1])
    return source.flatten(1, 2) if state.clip_of is None else source.amax(1)
