"""Merging with a text in mind: what is near the text is taken to be less alike, so that others merge in its place.

TESTA names it among its limitations; no paper measures it. A pair loses `guidance` of its cosine for each standard
deviation by which its two are nearer to the text, on average, than all patches of the frame, or frames of the video.
"""

from __future__ import annotations

from torch import Tensor
from torch.nn.functional import cosine_similarity, pad

from tempme_vl.precision import at_least_float32
from tempme_vl.state import TokenState


def less_alike_patches(state: TokenState, guidance: float) -> Tensor | None:
    """(B*C, N) what each token takes from its pairs, 0 for the prefix; None without guidance."""
    return pad(_half(_nearness(state), guidance), (state.num_prefix, 0)) if guidance else None


def less_alike_frames(state: TokenState, guidance: float) -> Tensor | None:
    """(B, C) what each clip takes from its pairs, as near as its patches are on average; None without guidance."""
    return _half(_nearness(state).mean(1).unflatten(0, (-1, state.num_clips)), guidance) if guidance else None


def _nearness(state: TokenState) -> Tensor:
    """(B*C, N - P) float, without gradient: the cosine of each patch with the direction that leads to the text."""
    assert state.guide is not None
    x = at_least_float32(state.x.detach()[:, state.num_prefix :])
    guide = state.guide.to(x.dtype).repeat_interleave(state.num_clips, 0).unsqueeze(1)
    return cosine_similarity(x, guide, dim=-1)


def _half(near: Tensor, guidance: float) -> Tensor:
    centred = near - near.mean(1, keepdim=True)
    deviation = centred.square().mean(1, keepdim=True).sqrt()
    return guidance / 2 * centred / deviation.clamp(min=1e-6)
