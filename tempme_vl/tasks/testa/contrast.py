"""Contrast with a momentum encoder's features and a queue of earlier ones (MoCo; ALBEF, BLIP, TESTA).

Letters: B pairs on this rank, G on all, E width of an embedding, Q places of the queue.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

NOBODY = -100  # the id of a place of the queue that nothing was put in yet


class Sides(NamedTuple):
    """Features of videos and of texts, L2-normalised, one row each: (B, E)."""

    video: Tensor
    text: Tensor


class FeatureQueue(nn.Module):
    """Features of earlier batches, the oldest of which are replaced.

    Args:
        width: E.
        places: Q, a multiple of the pairs of a step on all ranks.
        numbered: whether features have the ids of their videos; in pre-training they have none.

    Attributes:
        video, text: (E, Q), random and normalised at the start.
        ids: (1, Q) int64, of their videos.
        place: (1,) int64, where the next ones go.
    """

    video: Tensor
    text: Tensor
    ids: Tensor
    place: Tensor

    def __init__(self, width: int, places: int, numbered: bool = True):
        super().__init__()
        self.places = places
        for side in ("video", "text"):
            self.register_buffer(side, F.normalize(torch.randn(width, places), dim=0))
        if numbered:
            self.register_buffer("ids", torch.full((1, places), NOBODY))
        self.register_buffer("place", torch.zeros(1, dtype=torch.int64))

    @torch.no_grad()
    def put(self, features: Sides, ids: Tensor | None = None) -> None:
        """Puts in the features (G, E) of all ranks' pairs, in their order, and their ids (G,) where they are numbered.

        Raises:
            ValueError: pairs that do not divide the queue.
        """
        pairs = len(features.video)
        if self.places % pairs:
            raise ValueError(
                f"expected a queue of a multiple of {pairs} places, the pairs of a step; it has {self.places}"
            )
        first = int(self.place)
        for queue, rows in ((self.video, features.video), (self.text, features.text)):
            queue[:, first : first + pairs] = rows.T.to(queue.dtype)
        if ids is not None:
            self.ids[0, first : first + pairs] = ids
        self.place[0] = (first + pairs) % self.places


def against(features: Tensor, others: Tensor, queue: Tensor) -> Tensor:
    """Cosines of features (B, E) with momentum features of the same batch (B, E) and a queue (E, Q): (B, B + Q)."""
    return features @ torch.cat([others.T, queue.to(others.dtype)], 1)


def positives(ids: Tensor, queued: Tensor) -> Tensor:
    """Whose columns of `against` belong to a row: shares (B, B + Q) that add up to 1, from ids (B,) and (Q,)."""
    same = (ids.unsqueeze(1) == torch.cat([ids, queued])).float()
    return same / same.sum(1, keepdim=True)


class Contrast(NamedTuple):
    """Of both directions, (B, B + Q) each: logits, and the targets of their softmax."""

    logits: Sides
    targets: Sides

    def loss(self, valid: Tensor | None = None) -> Tensor:
        """The mean of both directions' cross-entropies; pairs that are not valid (B,) do not count."""
        parts = zip(self.logits, self.targets, strict=True)
        losses = torch.stack([-(logits.log_softmax(1) * target).sum(1) for logits, target in parts]).mean(0)
        return losses.mean() if valid is None else losses.where(valid, 0.0).sum() / valid.sum().clamp(min=1)


def contrast(
    online: Sides, momentum: Sides, queue: FeatureQueue, temperature: Tensor, labels: Tensor, distill: float | Tensor
) -> Contrast:
    """Videos against texts, and texts against videos.

    The columns of a rank are its own momentum features and the queue; other ranks' of the same step come into the queue
    afterwards.

    Args:
        temperature: divides cosines.
        labels: (B, B + Q), `positives`.
        distill: how much of a target is what the momentum encoders find, 0 to 1.
    """
    logits, targets = [], []
    for own, followed, others, queued in (
        (online.video, momentum.video, momentum.text, queue.text),
        (online.text, momentum.text, momentum.video, queue.video),
    ):
        logits.append(against(own, others, queued) / temperature)
        with torch.no_grad():
            soft = (against(followed, others, queued) / temperature).softmax(1)
            targets.append(distill * soft + (1 - distill) * labels.to(soft.dtype))
    return Contrast(Sides(*logits), Sides(*targets))


class Momentum(nn.Module):
    """Copies of modules that follow them slowly; nothing trains them.

    Args:
        modules: copies, by names.
        rate: m of m * copy + (1 - m) * module.
    """

    def __init__(self, modules: Mapping[str, nn.Module], rate: float = 0.995):
        super().__init__()
        self.copies, self.rate = nn.ModuleDict(modules), rate
        self.requires_grad_(False)

    def fits(self, modules: Mapping[str, nn.Module]) -> bool:
        """Whether modules have weights of the same names as their copies."""
        return all(_names(copy) == _names(modules[name]) for name, copy in self.copies.items())

    @torch.no_grad()
    def follow(self, modules: Mapping[str, nn.Module]) -> None:
        """One step after the modules of the same names.

        Raises:
            ValueError: modules with other weights than the copies, as a tuning's additions make them.
        """
        if not self.fits(modules):
            raise ValueError(
                "the momentum copies have other weights than what they follow: modules were added behind their back; "
                "add them by the model's `tune`, which copies them"
            )
        for name, copy in self.copies.items():
            for path, part in copy.named_modules():
                own, theirs = (list(m.parameters(recurse=False)) for m in (part, modules[name].get_submodule(path)))
                with gathered(theirs), gathered(own, changed=True):
                    for weight, other in zip(own, theirs, strict=True):
                        weight.mul_(self.rate).add_(other, alpha=1 - self.rate)


@contextmanager
def gathered(weights: Sequence[nn.Parameter], changed: bool = False) -> Iterator[None]:
    """Weights whole where ZeRO stage 3 has divided them among the ranks, which all enter; not inside a forward pass,
    where it is fetching weights already.

    Args:
        changed: keeps what becomes of them here, the same on all ranks.
    """
    if "deepspeed" not in sys.modules:  # which alone divides them
        yield
        return
    import deepspeed

    with deepspeed.zero.GatheredParameters(weights, modifier_rank=0 if changed else None):
        yield


def _names(module: nn.Module) -> set[str]:
    return {name for name, _ in module.named_parameters()}


def ramp(epoch: int, step: int, steps: int, epochs: int = 1, most: float = 0.4) -> float:
    """How much is distilled: from 0, linearly over the first epochs; 1 in retrieval, 2 in pre-training.

    Args:
        step, steps: in the epoch.
    """
    return most * min(1.0, (epoch * steps + step) / (epochs * steps))


class _GatherShared(torch.autograd.Function):
    """All ranks' rows, which each rank uses in a loss of its own: their gradients add up."""

    @staticmethod
    def forward(ctx, rows: Tensor) -> Tensor:
        parts = [torch.empty_like(rows) for _ in range(dist.get_world_size())]
        dist.all_gather(parts, rows.contiguous())
        ctx.first, ctx.count = rank() * len(rows), len(rows)
        return torch.cat(parts)

    @staticmethod
    def backward(ctx, grad: Tensor) -> Tensor:
        grad = grad.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(grad)
        return grad[ctx.first : ctx.first + ctx.count]


def rank() -> int:
    """This process's number among all that train."""
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0


def gather_shared(rows: Tensor) -> Tensor:
    """(B, ...) -> (G, ...) on every rank, for losses that are each rank's own; alone, the rows themselves.

    All ranks must hold the same number of rows.
    """
    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
        return rows
    return _GatherShared.apply(rows)
