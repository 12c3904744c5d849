"""Which tokens of a padded batch are left in a layer of a language model, and what a layer is given for them.

Letters: B sequences, L tokens of each with padding, n that are left of the longest; Q queries, K keys.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor


@dataclass(frozen=True)
class Window:
    """The tokens that are left of each sequence, shorter ones padded on the left.

    Attributes:
        index: (B, n) int64, where each stood among the L, ascending; of padding any.
        valid: (B, n) bool, false for padding.
    """

    index: Tensor
    valid: Tensor

    @classmethod
    def of(cls, rows: Sequence[Tensor]) -> Window:
        """Args:
        rows: for each sequence the places of its tokens, ascending, one or more.
        """
        longest = max(map(len, rows))
        padded = [torch.cat([row[:1].expand(longest - len(row)), row]) for row in rows]
        lengths = torch.tensor([len(row) for row in rows], device=rows[0].device)
        place = torch.arange(longest, device=rows[0].device)
        return cls(torch.stack(padded), place >= longest - lengths.unsqueeze(1))

    @cached_property
    def padded(self) -> bool:
        return not bool(self.valid.all())

    @cached_property
    def _pairs(self) -> tuple[Tensor, Tensor, Tensor]:
        """Of all tokens that are left: the sequence, the place in the window, the place among the L."""
        rows, columns = self.valid.nonzero(as_tuple=True)
        return rows, columns, self.index[rows, columns]

    def take(self, x: Tensor) -> Tensor:
        """(B or 1, L, ...) -> (B, n, ...)."""
        index = self.index.to(x.device)
        x = x.expand(len(index), *x.shape[1:])
        return x[torch.arange(len(index), device=x.device).unsqueeze(1), index]

    def take_last(self, x: Tensor, behind: int = 1) -> Tensor:
        """(..., B or 1, L, ...) -> (..., B, n, ...), L being the dimension with so many from it on, itself counted."""
        at = x.ndim - behind
        return self.take(x.movedim((at - 1, at), (0, 1))).movedim((0, 1), (at - 1, at))

    def put(self, whole: Tensor, part: Tensor) -> Tensor:
        """(B, L, D) with (B, n, D) in the places of the tokens that are left."""
        rows, columns, places = (each.to(whole.device) for each in self._pairs)
        return whole.index_put((rows, places), part[rows, columns].to(whole.dtype))

    def put_(self, whole: Tensor, part: Tensor) -> None:
        """`put`, in place."""
        rows, columns, places = (each.to(whole.device) for each in self._pairs)
        whole.index_put_((rows, places), part[rows, columns].to(whole.dtype))

    def with_new(self, prompt: int, length: int) -> Window:
        """Of what a cache holds: this of a prompt of so many tokens, and all up to a length."""
        new = torch.arange(prompt, length, device=self.index.device).expand(len(self.index), -1)
        return Window(torch.cat([self.index, new], 1), torch.cat([self.valid, torch.ones_like(new).bool()], 1))

    def row_valid(self, row: int) -> Tensor:
        """(m,) int64, the places in the window of the tokens of one sequence."""
        return self.valid[row].nonzero()[:, 0]

    def repeated(self, order: Tensor) -> Window:
        """Of other sequences: beams."""
        order = order.to(self.index.device)
        return Window(self.index[order], self.valid[order])


def mask_of(mask: Tensor | None, queries: Window | int, keys: Window, kind: str) -> Tensor | None:
    """The attention mask of a layer for the tokens that are left.

    Args:
        mask: what the model made for all tokens: (B, 1, Q, K), bool or added; (B, K) for flash attention; None where
            each sees all before it.
        queries: the tokens that are left; or, where all are new, how many: the last of the keys.
        keys: those that are left.
        kind: what transformers calls the attention function.

    Raises:
        ValueError: a mask in another form.
    """
    if mask is None:
        return _mask_of_order(queries, keys, kind)
    if not isinstance(mask, Tensor) or mask.ndim not in (2, 4):
        raise ValueError(
            f"expected attention masks as tensors of 2 or 4 dimensions; {kind!r} attention has {type(mask).__name__}: "
            'load the model with attn_implementation="sdpa"'
        )
    if mask.ndim == 2:
        return keys.take(mask.unsqueeze(-1))[..., 0] * keys.valid.to(mask)
    taken = keys.take(mask.expand(len(keys.index), -1, -1, -1).movedim(-1, 1)).movedim(1, -1)  # (B, 1, Q, n)
    if isinstance(queries, Window):
        taken = queries.take(taken.movedim(2, 1)).movedim(1, 2)
    hidden = ~keys.valid.to(taken.device)[:, None, None]
    if isinstance(queries, Window):  # padding sees itself, as softmax of nothing is no number
        own = torch.eye(taken.shape[-1], dtype=torch.bool, device=taken.device)
        hidden = hidden & ~own
    return taken.masked_fill(hidden, False if taken.dtype == torch.bool else torch.finfo(taken.dtype).min)


def _mask_of_order(queries: Window | int, keys: Window, kind: str) -> Tensor | None:
    """Where all tokens see all before them, and none is padding but what was padded here."""
    whole = isinstance(queries, Window) or queries == 1  # attention functions know the order then
    if whole and not keys.padded:
        return None
    if "flash" in kind:
        return keys.valid.long() if keys.padded else None
    length = keys.index.shape[1]
    count = length if isinstance(queries, Window) else queries
    place = torch.arange(length, device=keys.index.device)
    sees = place <= place[length - count :].unsqueeze(1)  # (Q, K)
    own = place == place[length - count :].unsqueeze(1)
    return (sees & (keys.valid.unsqueeze(1) | own)).unsqueeze(1)
