"""How the embeddings of frames become that of a video."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tempme_vl.precision import at_least_float32


class FramePlace(nn.Module):
    """The place where frames become a video, and a tuning may do otherwise. As it is here: the mean of the real frames'
    normalised embeddings."""

    def forward(
        self, frames: Tensor, frame_mask: Tensor | None, video: Tensor | None, clip_of: Tensor | None = None
    ) -> Tensor:
        """Args:
            frames: (B, F, E), or (B, C, E) where an embedding stands for several frames; not normalised.
            frame_mask: (B, F), nonzero for real frames.
            video: (B, G, E), `TokenState.video_tokens` normed and projected, where there are such.
            clip_of: (B, F), see `TokenState`.

        Returns:
            (B, E).
        """
        return masked_mean(F.normalize(at_least_float32(frames), dim=-1), frame_mask, clip_of)


def mean_by_clip(values: Tensor, clips: int, clip_of: Tensor | None = None) -> Tensor:
    """What a value of each frame is for embeddings that stand for several: their mean. (F, E) -> (C, E), or with
    `clip_of` (B, C, E).

    Args:
        clips: C; where it is F, the values stay.
        clip_of: (B, F), see `TokenState`.
    """
    if clip_of is None:
        return values.unflatten(0, (clips, -1)).mean(dim=1)
    held = (clip_of.unsqueeze(1) == torch.arange(clips, device=clip_of.device).unsqueeze(-1)).to(values.dtype)
    return held @ values / held.sum(dim=2, keepdim=True)  # a clip that is left holds a frame


def masked_mean(frames: Tensor, frame_mask: Tensor | None, clip_of: Tensor | None = None) -> Tensor:
    """Mean over the real frames, zero where there is none: (B, C, E), (B, F) -> (B, E).

    Where C < F an embedding stands for F / C neighbouring frames, or for those that `clip_of` says, and counts if one
    of them is real.

    Args:
        clip_of: (B, F), see `TokenState`.
    """
    if frame_mask is None:
        return frames.mean(dim=1)
    weight = real_frames(frame_mask, frames.shape[1], clip_of).to(frames.dtype).unsqueeze(-1)
    return (frames * weight).sum(dim=1) / weight.sum(dim=1).clamp(min=1)


def real_frames(frame_mask: Tensor, count: int, clip_of: Tensor | None = None) -> Tensor:
    """(B, F) -> (B, C) bool: which of C embeddings stand for a real frame.

    Args:
        count: C; others as in `masked_mean`.
    """
    if clip_of is None:
        return frame_mask.bool().unflatten(1, (count, -1)).any(dim=2)
    held = frame_mask.bool() & (clip_of >= 0)
    return clip_of.new_zeros(len(clip_of), count).scatter_add(1, clip_of.clamp(min=0), held.long()) > 0
