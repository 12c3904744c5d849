"""Bipartite soft matching: which tokens merge, as pure functions on tensors (ToMe, ICLR 2023; TempMe, section 3).

Shapes: R rows (clips) of N tokens, r merged pairs, N - r tokens remain.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from tempme_vl import kernels
from tempme_vl.precision import at_least_float32


@dataclass(frozen=True)
class MergeMap:
    """One match: which input token each output token continues, and which tokens are added to them.

    Attributes:
        base: (R, N - r) int64, the input token that each output token continues.
        src: (R, r) int64, input tokens that merge into another.
        dst: (R, r) int64, the *output* token that takes each `src`.
    """

    base: Tensor
    src: Tensor
    dst: Tensor

    @property
    def assignment(self) -> Tensor:
        """(R, N) int64: the output token of each input token."""
        rows, kept = self.base.shape
        out = self.base.new_empty(rows, kept + self.src.shape[1])
        positions = torch.arange(kept, device=out.device).expand(rows, -1)
        return out.scatter(1, self.base, positions).scatter(1, self.src, self.dst)

    def sum(self, x: Tensor) -> Tensor:
        """Adds merged tokens up: (R, N, D) -> (R, N - r, D)."""
        return take(x, self.base).scatter_add(1, _wide(self.dst, x), take(x, self.src))

    def mean(self, x: Tensor) -> Tensor:
        """Unweighted mean over the tokens that merge: (R, N, D) -> (R, N - r, D)."""
        return self.sum(x) / self.sum(torch.ones_like(x[..., :1]))

    def weighted_mean(self, x: Tensor, size: Tensor) -> tuple[Tensor, Tensor]:
        """Size-weighted mean (TempMe section 3.2) and the summed sizes.

        The mean of a token and those that merge into it is the token and, of each of these, its share of the way there;
        so only tokens that take others are computed, and the rest stay as they are to the bit. (The kernel of a GPU
        multiplies and divides them all: the same but for rounding.)

        Args:
            x: (R, N, D) tokens, any floating dtype; the result has the same. Half precision is added up in float32.
            size: (R, N, 1) sizes.

        Returns:
            (R, N - r, D) tokens and (R, N - r, 1) sizes.
        """
        if kernels.usable(x) and not size.requires_grad:
            from tempme_vl.kernels import merging

            return merging.weighted_mean(x, size, self.base, self.src, self.dst)
        base, src, dst = (index.unsqueeze(-1) for index in (self.base, self.src, self.dst))
        added = size.gather(1, src)
        new_size = size.gather(1, base).scatter_add(1, dst, added)
        mean = at_least_float32(take(x, self.base))
        step = added / new_size.gather(1, dst) * (take(x, self.src) - take(mean, self.dst))
        return mean.scatter_add_(1, _wide(self.dst, mean), step.to(mean.dtype)).to(x.dtype), new_size

    def unmerge(self, y: Tensor) -> Tensor:
        """Gives every input token the value of its output token: (R, N - r, D) -> (R, N, D)."""
        return take(y, self.assignment)

    def trace(self, source: Tensor) -> Tensor:
        """Follows input tokens through this match: (R, S) token numbers before -> after; -1 stays -1."""
        return follow(source, self.assignment)


def follow(numbers: Tensor, through: Tensor) -> Tensor:
    """Token numbers (R, S) looked up in (R, N), row by row: through[numbers]; -1 stays -1."""
    return torch.where(numbers < 0, numbers, through.gather(1, numbers.clamp(min=0)))


def bipartite_match(
    metric: Tensor,
    r: int,
    num_prefix: int = 1,
    order: Literal["position", "similarity"] = "position",
    less: Tensor | None = None,
) -> MergeMap:
    """Matches the r most similar pairs between alternating tokens.

    The first `num_prefix` tokens stay out. Of the rest, set A holds the even positions of the whole sequence
    and B the odd ones; each A token takes its most similar B token (cosine), the r best pairs merge into
    their B token. Output order: prefix, unmerged A, all B. Indices carry no gradient.

    Args:
        metric: (R, N, D_metric) features to compare.
        r: pairs to merge, 0 <= r <= (N - num_prefix) // 2.
        num_prefix: P leading tokens that never merge (CLS).
        order: unmerged A tokens by ascending position, or by descending similarity of their best match, as
            ToMe leaves them when there is no CLS token.
        less: (R, N) how much less alike a token and any other are taken to be; None: not at all.

    Raises:
        ValueError: if r is outside its range.
    """
    _, num_tokens, _ = metric.shape
    limit = (num_tokens - num_prefix) // 2
    if not 0 <= r <= limit:
        raise ValueError(f"{num_tokens} tokens with {num_prefix} CLS can merge at most {limit} pairs; got r={r}")
    rows = metric.shape[0]
    if r == 0:  # nothing merges, and nothing is reordered either
        everything = torch.arange(num_tokens, device=metric.device).expand(rows, -1)
        return MergeMap(everything, everything[:, :0], everything[:, :0])
    # half precision would tie most similarities near 1, so they are always compared in at least float32
    with torch.no_grad(), torch.autocast(metric.device.type, enabled=False):
        if less is None and kernels.usable(metric):
            from tempme_vl.kernels import merging

            if num_tokens <= 2 * merging.MOST_RANKED:
                return MergeMap(*merging.match(metric, r, num_prefix, order == "position"))
        return _match(at_least_float32(metric), r, num_prefix, order, less)


def _match(
    metric: Tensor, r: int, num_prefix: int, order: Literal["position", "similarity"], less: Tensor | None
) -> MergeMap:
    """The plain form of `bipartite_match`, for r > 0."""
    rows, num_tokens, _ = metric.shape
    a, b = slice(num_prefix + num_prefix % 2, None, 2), slice(num_prefix + 1 - num_prefix % 2, None, 2)
    unit = F.normalize(metric, dim=-1)
    similarity_RAB = unit[:, a] @ unit[:, b].transpose(1, 2)
    if less is not None:
        similarity_RAB = similarity_RAB - less[:, a, None] - less[:, None, b]
    best, partner = similarity_RAB.max(dim=-1)
    ranked = descending(best)
    merged, kept = ranked[:, :r], ranked[:, r:]
    if order == "position":
        kept = kept.sort(dim=-1).values

    numbers = torch.arange(num_tokens, device=metric.device).expand(rows, -1)
    base = torch.cat([numbers[:, :num_prefix], a.start + 2 * kept, numbers[:, b]], dim=1)
    dst = num_prefix + kept.shape[1] + partner.gather(1, merged)
    return MergeMap(base, a.start + 2 * merged, dst)


def match_last(metric: Tensor, r: int, num_prefix: int = 1) -> tuple[MergeMap, Tensor]:
    """Matches each of the last r tokens with the most similar of those in front of them, the prefix left out.

    Several may go into the same one. Neither carries a gradient.

    Args:
        metric: (R, N, D_metric) features to compare by cosine.
        r: 0 <= r < N - num_prefix.

    Returns:
        the match, whose output are the first N - r tokens in their order, and (R, r) float cosines of the matches.
    """
    rows, tokens, _ = metric.shape
    with torch.no_grad(), torch.autocast(metric.device.type, enabled=False):
        unit = F.normalize(at_least_float32(metric), dim=-1)
        kept = tokens - r
        similarity, partner = (unit[:, kept:] @ unit[:, num_prefix:kept].transpose(1, 2)).max(dim=-1)
        numbers = torch.arange(tokens, device=metric.device).expand(rows, -1)
        return MergeMap(numbers[:, :kept], numbers[:, kept:], partner + num_prefix), similarity


def descending(values: Tensor) -> Tensor:
    """(R, A) -> (R, A) int64: places of the values, largest first (NaN above all), equal ones in ascending order."""
    return values.argsort(dim=-1, descending=True, stable=True)


def _wide(index: Tensor, x: Tensor) -> Tensor:
    return index.unsqueeze(-1).expand(-1, -1, x.shape[-1])


def take(x: Tensor, index: Tensor) -> Tensor:
    """The tokens of each row that an index (R, K) names: (R, N, D) -> (R, K, D).

    As rows of one long table: on CPU four times as fast as `gather`, forwards and backwards.
    """
    rows, tokens, width = x.shape
    first = tokens * torch.arange(rows, device=x.device).unsqueeze(1)
    return x.reshape(-1, width).index_select(0, (index + first).flatten()).view(*index.shape, width)
