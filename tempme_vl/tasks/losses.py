"""Losses of text-video pairs: contrastive ones over the features of all ranks, and matching on hard negatives.

Letters: B pairs on this rank, G = B * world size pairs in all, E embedding width.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from tempme_vl.precision import at_least_float32

MAX_LOGIT_SCALE = math.log(100.0)
TEMPERATURE_RANGE = (0.001, 0.5)


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


def gather_pairs(features: Mapping[str, Tensor], batch: Mapping[str, Tensor]) -> tuple[Tensor, ...]:
    """What a contrast needs of all ranks: video, text (G, E), and what `gather_ids` gives."""
    return gather_rows(features["video"]), gather_rows(features["text"]), *gather_ids(batch)


class Pairs(NamedTuple):
    """What a contrastive loss is told of its G pairs, as `contrastive_loss_of` has it."""

    video_ids: Tensor | None = None
    text_ids: Tensor | None = None
    valid: Tensor | None = None
    weights: tuple[float, float] = (0.5, 0.5)


PAIRS = Pairs()  # all real, of videos and captions that all differ


def gather_ids(batch: Mapping[str, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """Of all ranks' pairs video_id, text_id (G,) int64, and valid (G,) bool; in one exchange."""
    own = torch.stack([batch[key].long() for key in ("video_id", "text_id", "valid")], dim=1)
    video_id, text_id, valid = gather_rows(own).unbind(1)
    return video_id, text_id, valid.bool()


def contrastive_loss(
    video: Tensor,
    text: Tensor,
    scale: Tensor,
    video_ids: Tensor | None = None,
    text_ids: Tensor | None = None,
    valid: Tensor | None = None,
    weights: tuple[float, float] = (0.5, 0.5),
) -> Tensor:
    """`contrastive_loss_of` the cosines of videos and captions (CLIP; TempMe section 4).

    Args:
        video, text: (G, E) L2-normalised features of all ranks, row i of both belonging together.
        scale: exp(logit scale), a scalar.
        others: see `contrastive_loss_of`.
    """
    logits_VT = (scale * readable(video, valid)) @ text.T
    return contrastive_loss_of(logits_VT.T, video_ids, text_ids, valid, weights)


def contrastive_loss_of(
    logits_TV: Tensor,
    video_ids: Tensor | None = None,
    text_ids: Tensor | None = None,
    valid: Tensor | None = None,
    weights: tuple[float, float] = (0.5, 0.5),
) -> Tensor:
    """Symmetric cross-entropy between matching videos and captions.

    Pairs of the same video or of the same caption are not each other's negatives: they leave the denominator.

    Args:
        logits_TV: (G, G) of the captions and videos of all ranks, row i and column i belonging together.
        video_ids, text_ids: (G,) int64, equal for the same video or the same caption.
        valid: (G,) bool; pairs whose video could not be read are False: neither positive nor negative.
        weights: of videos that choose among texts, and of texts that choose among videos.

    Returns:
        the scalar sum of both directions' weighted means; 0 if no pair is valid.
    """
    logits_VT = _without(logits_TV.T, _same(logits_TV, video_ids, text_ids), valid)
    target = torch.arange(len(logits_VT), device=logits_VT.device)
    by_video = F.cross_entropy(logits_VT, target, reduction="none")
    by_text = F.cross_entropy(logits_VT.T, target, reduction="none")
    return _mean(weights[0] * by_video + weights[1] * by_text, valid)


def sigmoid_loss(
    logits_TV: Tensor,
    video_ids: Tensor | None = None,
    text_ids: Tensor | None = None,
    valid: Tensor | None = None,
) -> Tensor:
    """-log sigmoid of every pair, of those that do not belong together with the sign turned, a caption (SigLIP).

    Pairs of the same video or of the same caption beside the diagonal do not count.

    Args:
        logits_TV: with the bias; and others as in `contrastive_loss_of`.

    Returns:
        the sum over a caption's pairs, the mean over captions; 0 if no pair is valid.
    """
    own = torch.eye(len(logits_TV), dtype=torch.bool, device=logits_TV.device)
    left = _without(torch.where(own, logits_TV, -logits_TV), _same(logits_TV, video_ids, text_ids), valid)
    return _mean(-F.logsigmoid(left).masked_fill(left.isneginf(), 0.0).sum(dim=1), valid)


def _same(logits: Tensor, *ids: Tensor | None) -> Tensor:
    """`same_pairs` of the ids that there are; each row is its own."""
    rows = torch.arange(len(logits), device=logits.device)
    return same_pairs(rows, *(one for one in ids if one is not None))


def same_pairs(*ids: Tensor) -> Tensor:
    """(G,) int64 each -> (G, G) bool: pairs of which one of the ids is equal, such as the video's or the caption's."""
    return torch.stack([one[:, None] == one[None, :] for one in ids]).any(dim=0)


def soft_contrastive_loss(
    video: Tensor, text: Tensor, temperature: Tensor, same: Tensor, valid: Tensor | None = None
) -> Tensor:
    """Symmetric cross-entropy whose targets are uniform over the pairs that are the same (UMT's VTC).

    Args:
        video: (G, E) features of all ranks, each the mean over frames of L2-normalised features, itself not
            normalised again: the product with a caption is then its mean cosine over the frames.
        text: (G, E) L2-normalised, row i of both belonging together.
        temperature: a scalar by which similarities are divided.
        same: (G, G) bool, symmetric: pairs that are each other's positives, themselves among them (`same_pairs`).
        valid: (G,) bool; pairs whose video could not be read are False: neither positive nor negative.

    Returns:
        the scalar mean of both directions; 0 if no pair is valid.
    """
    logits_VT = _without((readable(video, valid) / temperature) @ text.T, torch.zeros_like(same), valid)
    positives = same & ~logits_VT.isneginf()
    counts = positives.sum(1)
    # both masks are symmetric, so the transposed logits have the same targets
    likelihoods = (logits.log_softmax(1).masked_fill(~positives, 0.0).sum(1) for logits in (logits_VT, logits_VT.T))
    return _mean(-0.5 * sum(likelihoods) / counts, valid)


def readable(rows: Tensor, valid: Tensor | None) -> Tensor:
    """(G, ...), zeros for unreadable videos: whatever their features are, even NaN, they must not spread."""
    return rows if valid is None else rows.where(valid.view(-1, *[1] * (rows.ndim - 1)), torch.zeros_like(rows))


def readable_video(batch: Mapping[str, Tensor]) -> Tensor:
    """The videos (B, F, 3, H, W) of a batch, of the same dtype: the front end normalises uint8 frames, and takes floats
    for normalised ones. Whatever an unreadable one holds, even NaN, must not reach the gradients."""
    return readable(batch["video"], batch["valid"].bool() if "valid" in batch else None)


def _without(logits: Tensor, excluded: Tensor, valid: Tensor | None) -> Tensor:
    """(G, G), -inf beside the diagonal where `excluded` or where one of both videos is unreadable."""
    if valid is not None:
        excluded = excluded | ~valid[:, None] | ~valid[None, :]
    diagonal = torch.eye(len(logits), dtype=torch.bool, device=logits.device)
    return logits.masked_fill(excluded & ~diagonal, -torch.inf)


def _mean(values: Tensor, valid: Tensor | None) -> Tensor:
    return values.mean() if valid is None else (values * valid).sum() / valid.sum().clamp(min=1)


def negative_weights(similarity: Tensor, same: Tensor, valid: Tensor | None = None) -> Tensor:
    """How likely each candidate is drawn as a query's hard negative: the more similar, the likelier (UMT).

    Args:
        similarity: (B, B) logits, already divided by the temperature; rows are queries, columns candidates.
        same: (B, B) bool: candidates that are no negatives of a query, its own among them (`same_pairs`).
        valid: (B,) bool; pairs whose video could not be read are False: they are no negatives and have none.

    Returns:
        (B, B) float32 or float64 rows for `draw_negatives`, not normalised, without gradient. The row of a query
        that has no negative (all ids equal, say) is zero throughout.
    """
    logits = at_least_float32(similarity.detach())
    excluded = same
    if valid is not None:
        unreadable = ~valid[:, None] | ~valid[None, :]
        # not -inf: a row of nothing else would be NaN
        logits = logits.masked_fill(unreadable, torch.finfo(logits.dtype).min)
        excluded = excluded | unreadable
    # UMT adds 1e-4 within the softmax, which changes nothing; what keeps a row drawable when all of its softmax is on
    # the positive is a floor far below any weight that counts
    return logits.softmax(1).clamp(min=1e-30).masked_fill(excluded, 0.0)


def draw_negatives(weights: Tensor, generator: torch.Generator | None = None, own: Tensor | None = None) -> Tensor:
    """One candidate per query, drawn in proportion to the rows of `negative_weights`.

    Args:
        weights: (B, B), or (B, G) where candidates are those of all ranks.
        generator: on the device of `weights`.
        own: (B,), the number of each query's own candidate; default: 0 to B - 1.

    Returns:
        (B,) int64. A query without a negative draws its own number, and only such a query does: leave its pair
        out by `valid` of `matching_loss`.
    """
    own = torch.arange(len(weights), device=weights.device) if own is None else own
    itself = F.one_hot(own, weights.shape[1]).to(weights.dtype)
    rows = torch.where(weights.any(dim=1, keepdim=True), weights, itself)
    return torch.multinomial(rows, 1, generator=generator).squeeze(1)


def matching_loss(logits: Tensor, valid: Tensor | None = None) -> Tensor:
    """Cross-entropy of "these two belong together" (UMT's VTM).

    Args:
        logits: (3 B, 2), index 1 meaning a match: B matching pairs, then each caption with a negative video, then
            each video with a negative caption.
        valid: (3 B,) bool in the same order; pairs that do not count are False.

    Returns:
        the scalar mean over valid pairs; 0 if there is none.

    Raises:
        ValueError: logits of another shape.
    """
    if logits.ndim != 2 or logits.shape[1] != 2 or len(logits) % 3:
        raise ValueError(f"expected (3 B, 2) logits: positives and two negatives each; got {tuple(logits.shape)}")
    labels = torch.zeros(len(logits), dtype=torch.int64, device=logits.device)
    labels[: len(logits) // 3] = 1
    logits = at_least_float32(readable(logits, valid))
    return _mean(F.cross_entropy(logits, labels, reduction="none"), valid)


def clamp_value(x: Tensor, low: float | None, high: float | None) -> Tensor:
    """x clamped in value, with the gradient of x: clamp has none beyond a limit, so what got there could not return."""
    return x.detach().clamp(low, high) + (x - x.detach())


class LogitScale(nn.Module):
    """The learnable factor of similarities, clamped to 100 at most (CLIP).

    Args:
        initial: its logarithm.
    """

    def __init__(self, initial: float = math.log(1 / 0.07)):
        super().__init__()
        self.log_scale = nn.Parameter(torch.tensor([initial]))

    def forward(self) -> Tensor:
        return clamp_value(at_least_float32(self.log_scale), None, MAX_LOGIT_SCALE).exp().squeeze(0)


class Temperature(nn.Module):
    """The learnable divisor of similarities, kept within [0.001, 0.5] (UMT).

    UMT writes the limits into the parameter before each step; here they hold for the value alone, which also works
    where an optimizer keeps its own copy of the weights. Within the limits both are one.
    """

    def __init__(self, initial: float = 0.07):
        super().__init__()
        self.temperature = nn.Parameter(torch.tensor([initial]))

    def forward(self) -> Tensor:
        return clamp_value(at_least_float32(self.temperature), *TEMPERATURE_RANGE).squeeze(0)
