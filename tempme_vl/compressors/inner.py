"""What methods that work between the layers of a language model have in common: the tokens that are left of a prompt,
and their record.

Letters: N tokens of one prompt that are left, D wide; V of them of its videos; H heads.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal, NamedTuple, TypeVar

import torch
from torch import Tensor

# Queries whose attention a step reads: none, the last token's, or all
Queries = Literal["none", "last", "all"]


class Point(NamedTuple):
    """Where tokens can become fewer: in front of a layer, or behind its attention, in front of its MLP.

    The attention that is read there is that which ran last: of the layer before, or of this one.
    """

    layer: int
    behind_attention: bool = False


@dataclass(frozen=True)
class Left:
    """What is left of one prompt, in order.

    Attributes:
        position: (N,) int64, where each token stood in the whole prompt.
        place: (N,) int64, of a video's token the number of its place in a frame, the same in all frames of the video
            and no other's; of all other tokens -1.
    """

    position: Tensor
    place: Tensor

    @property
    def video(self) -> Tensor:
        """(V,) int64, where video tokens stand now."""
        return (self.place >= 0).nonzero()[:, 0]


L = TypeVar("L", bound=Left)


def whole(place: Tensor) -> Left:
    """Of a prompt of which nothing has gone.

    Args:
        place: (N,) int64.
    """
    return Left(torch.arange(len(place), device=place.device), place)


def stay(left: L, stays: Tensor) -> L:
    """What is left where these stay.

    Args:
        stays: (N,) bool, or (M,) int64, ascending.
    """
    return replace(left, position=left.position[stays], place=left.place[stays])


def attended(attention: Tensor, video: Tensor) -> Tensor:
    """(V,) float, what video tokens get of the last query's attention, mean over heads.

    Args:
        attention: (H, Q, N), the last query last.
        video: (V,) int64.
    """
    return attention[:, -1, video].mean(0)


@dataclass(frozen=True)
class Writing:
    """Which of a video's tokens the words that are written read. The others stay in the cache.

    Attributes:
        layer: from which on, 1 or more; what the newest word attends to in the layer before decides.
        choose: (what it attends to among the V, mean over heads; the same of the word before and what was chosen for
            it, each None for the first) -> (M,) int64, those that are read, ascending.
    """

    layer: int
    choose: Callable[[Tensor, Tensor | None, Tensor | None], Tensor]


def never(left: Any, point: Point) -> Queries | None:
    """No step anywhere, for `Inner.due`."""
    return None


def unchanged(left: L, hidden: Tensor, attention: Tensor | None) -> tuple[L, Tensor]:
    """For `Inner.step`."""
    return left, hidden


@dataclass(frozen=True)
class Inner:
    """A method inside a language model, with its options; its functions are of modules, or `partial`, for pickle.

    Attributes:
        layers: that the language model must have.
        start: (place (N,) int64 of all tokens of a prompt) -> what is left: all of it.
        due: (left, point) -> the queries whose attention a step there reads; None where there is no step.
        step: (left, hidden (N, D), attention (H, Q, N) or None) -> (left, hidden (M, D)). Of attention there are the
            queries that `due` said: the last; or all, whose mean over heads and queries it is, (1, 1, N).
        behind_attention: whether any step is between attention and MLP.
        writing: what written words read; None for all.
    """

    layers: int = 1
    start: Callable[[Tensor], Any] = whole
    due: Callable[[Any, Point], Queries | None] = never
    step: Callable[[Any, Tensor, Tensor | None], tuple[Any, Tensor]] = unchanged
    behind_attention: bool = False
    writing: Writing | None = None


def in_front_of(layer: int, step: Callable[[Left, Tensor, Tensor], tuple[Left, Tensor]]) -> Inner:
    """A method with one step, in front of a layer, which reads what the last token attends to in the layer before.

    Args:
        layer: 1 or more.
        step: (left, hidden (N, D), attention (H, 1, N)) -> (left, hidden (M, D)).
    """
    return Inner(layer + 1, due=partial(_due, layer), step=partial(_with_attention, step))


def _due(layer: int, left: Left, point: Point) -> Queries | None:
    return "last" if point == Point(layer) and len(left.video) else None


def _with_attention(
    step: Callable[[Left, Tensor, Tensor], tuple[Left, Tensor]], left: Left, hidden: Tensor, attention: Tensor | None
) -> tuple[Left, Tensor]:
    assert attention is not None  # which `_due` asks for
    return step(left, hidden, attention)
