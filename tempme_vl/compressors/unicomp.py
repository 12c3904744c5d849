"""UniComp (arXiv 2512.03575, "UniComp: Rethinking Video Compression Through Informational Uniqueness"): frames that are
like the first of their group become its mean; the more a group differs from the others the more tokens it may keep; of
those, tokens that are unlike the rest of the group's come first, and others that are like them go into them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import normalize

from tempme_vl.compressors.base import Clip, Compressor, FrameFeatures, Grid, KeptFeatures, require
from tempme_vl.compressors.separators import kept_between
from tempme_vl.merging.method import checked
from tempme_vl.precision import at_least_float32
from tempme_vl.schema import Portion, Range, Size

_Distance = Annotated[float, Range(0, 2)]


@dataclass(frozen=True)
class Options:
    """retention: share of the tokens that is left at most.
    frame_distance: a frame is of a group where 1 - cosine of its mean and of that of the group's first frame is not
        above it.
    token_distance: a token goes into another where 1 - cosine of their keys is below it.
    longest: frames of a group that another may still join; None for 1 / retention, rounded down.
    public_code: as the published code does it for towers without a vector for each frame. It compares groups by their
        tokens' means over channels; otherwise by their mean token.
    """

    retention: Portion = 0.25
    frame_distance: _Distance = 0.005
    token_distance: _Distance = 0.2
    longest: Size | None = None
    public_code: bool = False


class Chosen(NamedTuple):
    """tokens: (M,) int64, of a group, the most unique first. x: (M, D), what they and those that go into them are."""

    tokens: Tensor
    x: Tensor


def groups(x: Tensor, distance: float, longest: int) -> list[range]:
    """Frames that follow each other and are like their first.

    Args:
        x: (T, S, D).
    """
    unit = normalize(x.mean(1), dim=-1)
    apart = 1 - unit @ unit.T
    starts = [0]
    for t in range(1, len(x)):
        if not (apart[t, starts[-1]] <= distance and t - starts[-1] <= longest):
            starts.append(t)
    return [range(start, stop) for start, stop in zip(starts, [*starts[1:], len(x)], strict=True)]


def budgets(summary: Tensor, total: int, tokens: int) -> list[int]:
    """How many tokens each group may keep; what the limit of one leaves the others share.

    Args:
        summary: (G, C).
        total: of all groups.
        tokens: S, of each before.
    """
    count = len(summary)
    limit = min(tokens, max(1, total // count * 2))
    if count <= total // limit:
        return [limit] * count
    unit = normalize(summary, dim=-1)
    similarity = (unit @ unit.T).mean(-1)
    weight = ((similarity.mean() - similarity) * count**0.5).softmax(-1)
    given = [int(value) for value in (weight * total).floor().tolist()]
    full = [value > limit for value in given]
    given = [min(value, limit) for value in given]
    while any(full) and not all(full) and (more := max(0, total - sum(given)) // full.count(False)):
        given = [value if at_limit else value + more for value, at_limit in zip(given, full, strict=True)]
        full = [value > limit for value in given]
        given = [min(value, limit) for value in given]
    return given


def choose(x: Tensor, keys: Tensor, distance: float) -> Chosen:
    """Of one group: the tokens that are no neighbour of a more unique one that stays, each the mean of itself and the
    mean of its neighbours.

    Args:
        x: (S, D).
        keys: (S, K).
    """
    unit = normalize(keys, dim=-1)
    similarity = unit @ unit.T
    near = (1 - similarity < distance).fill_diagonal_(True)
    gone, tokens = torch.zeros(len(x), dtype=torch.bool, device=x.device), []
    for token in similarity.mean(-1).argsort(stable=True).tolist():
        if not gone[token]:
            tokens.append(token)
            gone |= near[token]
    found = torch.tensor(tokens, device=x.device)
    weight = near[found].to(x.dtype)
    return Chosen(found, (weight @ x / weight.sum(1, keepdim=True) + x[found]) / 2)


def shared(budget: list[int], wanted: list[int]) -> list[int]:
    """The same where groups that want less than they may keep leave it to the others, in equal parts."""
    small = [want < may for want, may in zip(wanted, budget, strict=True)]
    if sum(wanted) <= sum(budget):
        return budget
    spare = sum(may - want for want, may in zip(wanted, budget, strict=True) if want < may)
    return [may if less else may + spare // small.count(False) for may, less in zip(budget, small, strict=True)]


def group_summary(features: FrameFeatures, fused: Tensor, starts: list[int], public_code: bool) -> Tensor:
    """(G, C), what groups are compared by: the tower's vector for their first frame, where it has one.

    Args:
        fused: (G, S, D).
    """
    if features.summary is not None:
        return at_least_float32(features.summary[0])[starts]
    return fused.mean(-1 if public_code else 1)


def compress(features: FrameFeatures, options: Options) -> KeptFeatures:
    """Group by group, tokens in ascending order and then the host's separator, if it has one; where the means of groups
    are few enough, all of them and no separator.

    Raises:
        ValueError: options out of bounds, features without `keys`, or a share so small that nothing is left.
    """
    options = checked("unicomp", options)
    require(features, "keys")
    assert features.keys is not None  # for type checkers
    x, (frames, tokens, _) = at_least_float32(features.x), features.x.shape
    longest = options.longest or int(1 / options.retention)
    parts, total = groups(x, options.frame_distance, longest), int(options.retention * frames * tokens)
    starts = [part.start for part in parts]
    fused = torch.stack([x[part.start : part.stop].mean(0) for part in parts])
    if len(parts) * tokens <= total:
        chosen = [Chosen(torch.arange(tokens, device=x.device), group) for group in fused]
        return _left(features, parts, chosen, None)
    given = budgets(group_summary(features, fused, starts, options.public_code), total, tokens)
    if not sum(given):
        raise ValueError(
            f"expected a retention that leaves some of {frames} x {tokens} tokens in {len(parts)} groups; got "
            f"{options.retention}: choose a larger one"
        )
    keys = at_least_float32(features.keys)[starts]
    unique = [choose(*group, options.token_distance) for group in zip(fused, keys, strict=True)]
    given = shared(given, [len(group.tokens) for group in unique])
    unique = [Chosen(*(part[:count] for part in group)) for group, count in zip(unique, given, strict=True)]
    return _left(features, parts, unique, features.separator)


def _left(features: FrameFeatures, parts: list[range], chosen: list[Chosen], separator: Tensor | None) -> KeptFeatures:
    tokens: list[Tensor] = []
    sources: list[Tensor] = []
    clips: list[Clip] = []
    for part, group in zip(parts, chosen, strict=True):
        number, order = group.tokens.sort()
        x, source = group.x[order], number + part.start * features.x.shape[1]
        if separator is not None:
            x = torch.cat([x, separator.to(x).unsqueeze(0)])
            source = torch.cat([source, source.new_full((1,), -1)])
        tokens.append(x)
        sources.append(source)
        clips.append(Clip(len(x), part.start, part.stop - 1))
    some = tuple(clip for clip in clips if clip.tokens)
    return kept_between(features, torch.cat(sources), torch.cat(tokens), some)


def keep(share: float, frames: int, grid: Grid) -> dict[str, Any]:
    """At most this share; separators come on top."""
    return {"retention": share}


COMPRESSOR = Compressor(Options, compress, keep=keep, reads=("keys", "summary"))
