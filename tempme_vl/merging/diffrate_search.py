"""DiffRate's search: how many tokens each block keeps, learnt by gradient under a target of FLOPs.

All tokens stay. Which of them a block would drop or merge is a mask, which attention sees as tokens of next to no
weight; the mask is 0 or 1, and its gradient that of the probability with which a learnt choice keeps the token
(straight-through). Train the choices alone, at a rate of about 0.01:

    frontend = create_frontend(name, pretrained, method="diffrate", merge_kept="search")
    rates = search_parameters(frontend)
    ...
    loss = task_loss + (search_flops(frontend) / 1e9 - target).square()
    ...
    fast = create_frontend(name, pretrained, method="diffrate", **found(frontend))
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from tempme_vl.matching import descending, match_last
from tempme_vl.merging.base import TokenMerger, attention_of_cls
from tempme_vl.precision import at_least_float32
from tempme_vl.state import AttentionContext, TokenState

# What a token that is gone counts for in attention: its gradient needs more than nothing.
GONE = 1e-6
# The probability of keeping all that every choice starts with.
_START = 0.9


class Choice(nn.Module):
    """How many of n patches a block keeps: a distribution over n, n - granularity, ..., down to at least 1.

    The number in use is the mean, rounded down.
    """

    def __init__(self, patches: int, granularity: int):
        super().__init__()
        self.patches, self.granularity = patches, granularity
        others = len(range(patches, 0, -granularity)) - 1
        self.logits = nn.Parameter(torch.tensor([math.log(_START / (1 - _START) * max(1, others))] + [0.0] * others))

    def forward(self) -> tuple[Tensor, Tensor]:
        """The mean number, () with gradient, and (n,) the probability that the patch of each rank is kept."""
        probability = self.logits.float().softmax(0)
        rank = torch.arange(self.patches, device=probability.device)
        candidates = torch.arange(self.patches, 0, -self.granularity, device=probability.device)
        kept = (probability * (candidates > rank.unsqueeze(1))).sum(1)
        return (probability * candidates).sum(), kept


class SearchStep(TokenMerger):
    """What `PruneMerge` does, on masks: tokens are sorted, and those that it would drop or merge away stay behind."""

    def __init__(self, patches: int, granularity: int):
        super().__init__()
        self.prune, self.merge = Choice(patches, granularity), Choice(patches, granularity)

    def kept(self) -> tuple[Tensor, Tensor]:
        """The mean numbers of patches that pruning and merging leave, () with gradient."""
        return self.prune()[0], self.merge()[0]

    def forward(self, state: TokenState, context: AttentionContext) -> TokenState:
        p = state.num_prefix
        weight = state.size if state.weight is None else state.weight
        there = weight[:, p:, 0] > 0.5  # as many in every frame
        ranked = descending(attention_of_cls(state, context).detach().masked_fill(~there, -1.0))
        state = replace(state, weight=weight).keep(ranked + p)
        assert state.weight is not None
        alive, weight = int(there[0].sum()), state.weight

        mean, probability = self.prune()
        pruned = min(alive, max(1, int(mean)))
        weight = _masked(weight, probability, p, pruned, alive)
        mean, probability = self.merge()
        merged = min(pruned, max(1, int(mean)))
        if merged < pruned:
            x, weight = _merged(state.x, weight, p, merged, pruned)
            state = replace(state, x=x)
        return replace(state, weight=_masked(weight, probability, p, merged, pruned), merged=True)


def _masked(weight: Tensor, probability: Tensor, prefix: int, kept: int, alive: int) -> Tensor:
    """Takes the patches of the ranks kept..alive-1 out, with the gradient of their probability and of those before."""
    rank = torch.arange(len(probability), device=weight.device)
    hard = torch.where((rank >= kept) & (rank < alive), GONE, 1.0)
    soft = torch.where(rank < alive, probability, 1.0)
    mask = (hard + soft - soft.detach()).to(weight.dtype)
    return torch.cat([weight[:, :prefix], weight[:, prefix:] * mask.unsqueeze(-1)], dim=1)


def _merged(x: Tensor, weight: Tensor, prefix: int, kept: int, alive: int) -> tuple[Tensor, Tensor]:
    """Means and weights of the first patches once those of the ranks kept..alive-1 went into them; all others stay."""
    first, last = prefix + kept, prefix + alive
    match, cosine = match_last(x[:, :last], last - first, prefix)
    means = match.mean(at_least_float32(x[:, :last])).to(x.dtype)
    given = torch.cat([weight[:, :first], weight[:, first:last] * cosine.unsqueeze(-1)], dim=1).clamp(min=1)
    return torch.cat([means, x[:, first:]], dim=1), torch.cat([match.sum(given), weight[:, first:]], dim=1)


def search_steps(model: nn.Module) -> list[SearchStep | None]:
    """The step of every block of a front end that searches; None in the first, which keeps all."""
    blocks: Any = model.blocks
    return [step if isinstance(step := block.after_attention, SearchStep) else None for block in blocks]


def search_parameters(model: nn.Module) -> list[nn.Parameter]:
    """What a search trains."""
    return [parameter for step in search_steps(model) if step is not None for parameter in step.parameters()]


def flops(
    prune_kept: Sequence[int | Tensor],
    merge_kept: Sequence[int | Tensor],
    tokens: int,
    width: int,
    patch_values: int,
    outputs: int,
) -> Tensor:
    """Multiply-accumulates of a ViT for one image as DiffRate's code counts them, () float64, with gradient.

    Args:
        prune_kept, merge_kept: tokens, CLS included, that each block has left behind pruning and merging.
        tokens: N at the start.
        patch_values: numbers of a patch, 3 channels of it.
        outputs: width of what the CLS token becomes.
    """
    n = torch.tensor(float(tokens), dtype=torch.float64)
    total = n * width * patch_values + width * outputs
    for pruned, merged in zip(prune_kept, merge_kept, strict=True):
        total = total + 4 * n * width**2 + 2 * n**2 * width
        for kept in (pruned, merged):
            n = torch.minimum(n.to(torch.as_tensor(kept).device), torch.as_tensor(kept).double())
        total = total.to(n.device) + 8 * n * width**2
    return total


def search_flops(frontend: Any) -> Tensor:
    """`flops` of a frame of a front end that searches, at the mean of its choices: () with gradient."""
    shape = frontend.shape
    pruned, merged = zip(*_means(frontend), strict=True)
    return flops(pruned, merged, shape.tokens, shape.width, 3 * shape.patch_size**2, shape.embed_dim)


def found(frontend: Any) -> dict[str, list[int]]:
    """Options of `create_frontend` for the numbers that a search has found."""
    n, options = frontend.shape.tokens, {"prune_kept": list[int](), "merge_kept": list[int]()}
    for means in _means(frontend):
        for kept, mean in zip(options.values(), means, strict=True):
            n = min(n, int(mean))
            kept.append(n)
    return options


def _means(frontend: Any) -> list[tuple[int | Tensor, int | Tensor]]:
    """Tokens of a frame, CLS included, that pruning and merging leave in each block, if nothing did before."""
    prefix, whole = frontend.schedule.prefix, (frontend.shape.tokens, frontend.shape.tokens)
    steps = search_steps(frontend)
    return [whole if step is None else (step.kept()[0] + prefix, step.kept()[1] + prefix) for step in steps]
