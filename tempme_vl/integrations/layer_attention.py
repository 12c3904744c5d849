"""What an attention module of a language model attends to, for the queries that somebody reads.

The module itself is called once more for these queries, by the keys that it has just made and by the attention function
that gives its weights ("eager"), so that its own scale, norms, rotation and groups hold.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Cache

from tempme_vl.integrations.windows import Window

_WEIGHTS = 1 << 24  # of a chunk of queries, at most


class _Held:
    """In the place of a cache: the keys and values of all tokens, whatever comes in."""

    def __init__(self, keys: Tensor, values: Tensor):
        self.keys, self.values = keys, values

    def update(self, *given: Any, **options: Any) -> tuple[Tensor, Tensor]:
        return self.keys, self.values


@dataclass(frozen=True)
class Call:
    """A call of an attention module.

    Attributes:
        given: what it was given, all by name.
        keys, values: (B, heads, K, d), of all tokens that it saw.
    """

    module: nn.Module
    given: Mapping[str, Any]
    keys: Tensor
    values: Tensor

    @torch.no_grad()
    def weights(self, queries: Tensor) -> Tensor:
        """Args:
            queries: (B, Q) int64, in ascending order, among the tokens that came in.

        Returns:
            (B, H, Q, K), softmax.

        Raises:
            ValueError: a module that gives none.
        """
        count = self.given["hidden_states"].shape[1]
        rows = Window(queries, torch.ones_like(queries).bool())
        given = dict(self.given)
        given["hidden_states"] = rows.take(given["hidden_states"])
        given["attention_mask"] = self._added(rows, count)
        for name, value in self.given.items():
            if isinstance(value, Cache):
                given[name] = _Held(self.keys, self.values)
        angles = given.get("position_embeddings")
        if angles is not None:
            given["position_embeddings"] = tuple(rows.take_last(each, 2) for each in angles)
        if isinstance(given.get("position_ids"), Tensor):
            given["position_ids"] = rows.take_last(given["position_ids"])
        with _eager(self.module):
            weights = self.module(**given)[1]
        if weights is None:
            raise ValueError(f"{type(self.module).__name__} gives no attention weights, which this method reads")
        return weights

    def _added(self, rows: Window, count: int) -> Tensor:
        """(B, 1, Q, K), to be added to what is soft-maxed."""
        states, mask = self.given["hidden_states"], self.given.get("attention_mask")
        length = self.keys.shape[2]
        if isinstance(mask, Tensor) and mask.ndim == 4:
            mask = rows.take(mask.expand(len(states), -1, -1, -1).movedim(2, 1)).movedim(1, 2)
            if mask.dtype != torch.bool:
                return mask
        else:
            place = torch.arange(length, device=states.device)
            sees = place <= rows.index.unsqueeze(-1).to(states.device) + length - count
            mask = (sees if mask is None else sees & mask[:, None, -length:].bool()).unsqueeze(1)
        return torch.zeros_like(mask, dtype=states.dtype).masked_fill(~mask, torch.finfo(states.dtype).min)

    def last(self, rows: list[Tensor]) -> list[Tensor]:
        """For each sequence (H, 1, N) of its last token.

        Args:
            rows: of each sequence the places of its N tokens.
        """
        queries = torch.stack([row[-1:] for row in rows])
        return [each[..., row] for each, row in zip(self.weights(queries), rows, strict=True)]

    def mean(self, rows: list[Tensor]) -> list[Tensor]:
        """For each sequence (1, 1, N), the mean over heads and all its N tokens as queries."""
        states = self.given["hidden_states"]
        (batch, count, _), length = states.shape, self.keys.shape[2]
        total = torch.zeros(batch, length, dtype=torch.promote_types(states.dtype, torch.float32), device=states.device)
        valid = total.new_zeros(batch, count)
        for number, row in enumerate(rows):
            valid[number, row] = 1
        size, start = 1, 0
        while start < count:
            queries = torch.arange(start, min(count, start + size), device=states.device)
            weights = self.weights(queries.expand(batch, -1)).to(total)
            total += (weights.mean(1) * valid[:, queries].unsqueeze(-1)).sum(1)
            start, size = start + size, max(1, _WEIGHTS // (batch * weights.shape[1] * length))
        return [(total[number, row] / len(row)).view(1, 1, -1) for number, row in enumerate(rows)]


@contextmanager
def _eager(module: nn.Module) -> Iterator[None]:
    """Has a module give its weights."""
    config: Any = module.config
    usual = config._attn_implementation
    config._attn_implementation = "eager"
    try:
        yield
    finally:
        config._attn_implementation = usual


def by_name(module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """What a module was given, all by name."""
    return {**dict(zip(_names(type(module).forward), args, strict=False)), **kwargs}


@cache
def _names(forward: Callable[..., Any]) -> tuple[str, ...]:
    """Of the arguments behind the module itself."""
    return tuple(inspect.signature(forward).parameters)[1:]
