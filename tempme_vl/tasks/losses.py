"""Contrastive loss over the features of all ranks.

Letters: B pairs on this rank, G = B * world size pairs in all.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor


class _GatherRows(torch.autograd.Function):
    """All ranks' rows; the gradient of a rank's own rows is scaled by the world size.

    Every rank computes the whole loss from the same gathered rows, so its own slice of the gradient is already
    complete. Data-parallel training then *averages* over ranks; the factor turns that average back into the
    sum over slices, which is the full batch's gradient.
    """

    @staticmethod
    def forward(ctx, rows: Tensor) -> Tensor:
        world = dist.get_world_size()
        parts = [torch.empty_like(rows) for _ in range(world)]
        dist.all_gather(parts, rows.contiguous())
        ctx.rank, ctx.world, ctx.count = dist.get_rank(), world, rows.shape[0]
        return torch.cat(parts)

    @staticmethod
    def backward(ctx, grad: Tensor) -> Tensor:
        start = ctx.rank * ctx.count
        return grad[start : start + ctx.count] * ctx.world


def gather_rows(rows: Tensor) -> Tensor:
    """(B, ...) on every rank -> (G, ...) on every rank, differentiable; alone, the rows themselves.

    All ranks must hold the same number of rows.
    """
    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
        return rows
    return _GatherRows.apply(rows)


def contrastive_loss(
    video: Tensor,
    text: Tensor,
    scale: Tensor,
    video_ids: Tensor | None = None,
    text_ids: Tensor | None = None,
    valid: Tensor | None = None,
) -> Tensor:
    """Symmetric cross-entropy between matching videos and captions (CLIP; TempMe section 4).

    Pairs of the same video or of the same caption are not each other's negatives: they leave the denominator.

    Args:
        video, text: (G, E) L2-normalised features of all ranks, row i of both belonging together.
        scale: exp(logit scale), a scalar.
        video_ids, text_ids: (G,) int64, equal for the same video or the same caption.
        valid: (G,) bool; pairs whose video could not be read are False: neither positive nor negative.

    Returns:
        the scalar mean of both directions; 0 if no pair is valid.
    """
    if valid is not None:  # whatever an unreadable video's features are, even NaN, they must not spread
        video = torch.where(valid[:, None], video, torch.zeros_like(video))
    logits_VT = scale * video @ text.T
    count = len(logits_VT)
    excluded = torch.zeros(count, count, dtype=torch.bool, device=logits_VT.device)
    for ids in (video_ids, text_ids):
        if ids is not None:
            excluded |= ids[:, None] == ids[None, :]
    if valid is not None:
        excluded |= ~valid[:, None] | ~valid[None, :]
    excluded = excluded & ~torch.eye(count, dtype=torch.bool, device=logits_VT.device)
    logits_VT = logits_VT.masked_fill(excluded, float("-inf"))
    target = torch.arange(count, device=logits_VT.device)
    per_pair = 0.5 * (
        F.cross_entropy(logits_VT, target, reduction="none") + F.cross_entropy(logits_VT.T, target, reduction="none")
    )
    if valid is None:
        return per_pair.mean()
    return (per_pair * valid).sum() / valid.sum().clamp(min=1)
