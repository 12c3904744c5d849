"""STTM (arXiv 2507.07990, "Multi-Granular Spatio-Temporal Token Merging for Training-Free Acceleration of Video LLMs"):
each frame is a quadtree whose branches end where a node is like its children; a node then goes into one of the frame
before that is like it and in whose box it lies, or that lies in its own.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import normalize

from tempme_vl.compressors.base import Compressor, FrameFeatures, Grid, KeptFeatures, kept
from tempme_vl.compressors.clusters import sums
from tempme_vl.merging.method import checked
from tempme_vl.precision import at_least_float32
from tempme_vl.schema import Cosine, Count, Size


@dataclass(frozen=True)
class Options:
    """threshold: a branch ends where the cosine of a node with each of its children is not below it.
    temporal_threshold: the same for nodes of neighbouring frames that become one.
    root_level: how many times the grid is halved, so that a node has at most 2^root_level tokens in rows and columns.
    weighted: whether a node counts as often as it holds tokens; otherwise each is one of a mean.
    head_width: channels of a head, if cosines are the mean of those of heads; None for all channels at once.
    public_code: as the published code does it. Where a side is odd, its first row or column has no other to be joined
        with, and the code compares a node with the token at (0, 0) in the place of a missing child.
    """

    threshold: Cosine = 0.85
    temporal_threshold: Cosine = 0.65
    root_level: Count = 1
    weighted: bool = False
    head_width: Size | None = None
    public_code: bool = False


class Level(NamedTuple):
    """One grid of the quadtrees, R rows and C columns of nodes.

    Attributes:
        x: (T, R, C, D), sums of tokens if nodes are weighted, else means.
        rows, columns: R + 1 and C + 1 numbers, where boxes begin and the last one ends.
        children: (R, C, 4) int64, numbers of a node's children in the level below, -1 where there is none; without
            elements for the tokens themselves.
    """

    x: Tensor
    rows: Tensor
    columns: Tensor
    children: Tensor


class Nodes(NamedTuple):
    """x: (M, D). box: (M, 5) int64, frame, top, left, bottom, right; it ends before the last two. size: (M,) int64, the
    tokens that are in it, also of other frames."""

    x: Tensor
    box: Tensor
    size: Tensor


def unit(x: Tensor, head_width: int | None) -> Tensor:
    """(..., D) so scaled that the product of two is the mean over heads of their cosines.

    Raises:
        ValueError: heads that do not divide D.
    """
    width = x.shape[-1]
    if head_width is not None and width % head_width:
        raise ValueError(f"expected head_width to divide the {width} channels; got {head_width}")
    heads = normalize(x.unflatten(-1, (-1, head_width or width)), dim=-1)
    return heads.flatten(-2) / heads.shape[-2] ** 0.5


def pairs(number: int, device: torch.device) -> Tensor:
    """(ceil(number / 2), 2) int64, neighbours in a row of nodes; of an odd number the first stands alone, behind -1."""
    return torch.arange(-(number % 2), number, device=device).reshape(-1, 2)


def child_nodes(level: Level, children: Tensor) -> Tensor:
    """(T, R, C, 4, D) of the level below; in the place of a missing one the first of its frame."""
    return level.x.flatten(1, 2)[:, children.clamp(min=0)]


def halved(level: Level, weighted: bool) -> Level:
    """The level above."""
    row, column = (pairs(number, level.x.device) for number in level.x.shape[1:3])
    children = row[:, None, :, None] * level.x.shape[2] + column[None, :, None, :]
    missing = (row < 0)[:, None, :, None] | (column < 0)[None, :, None, :]
    children = children.masked_fill(missing, -1).flatten(2)
    there = (children >= 0).unsqueeze(-1)
    x = (child_nodes(level, children) * there).sum(3)
    rows = torch.cat([level.rows[row[:, 0].clamp(min=0)], level.rows[-1:]])
    columns = torch.cat([level.columns[column[:, 0].clamp(min=0)], level.columns[-1:]])
    return Level(x if weighted else x / there.sum(2), rows, columns, children)


def pyramid(x: Tensor, grid: Grid, options: Options) -> list[Level]:
    """From the tokens up to the roots.

    Args:
        x: (T, S, D).
    """
    rows, columns = (torch.arange(side + 1, device=x.device) for side in grid)
    levels = [Level(x.unflatten(1, grid), rows, columns, rows.new_empty(0))]
    while len(levels) <= options.root_level and max(levels[-1].x.shape[1:3]) > 1:
        levels.append(halved(levels[-1], options.weighted))
    return levels


def like_children(level: Level, below: Level, options: Options) -> Tensor:
    """(T, R, C) bool, whether a branch may end here."""
    node = unit(level.x, options.head_width).unsqueeze(3)
    similar = (node * unit(child_nodes(below, level.children), options.head_width)).sum(-1) >= options.threshold
    return (similar if options.public_code else similar | (level.children < 0)).all(-1)


def quadtrees(x: Tensor, grid: Grid, options: Options) -> Nodes:
    """The ends of all branches, in the order of frames and then of their top left tokens.

    Args:
        x: (T, S, D).
    """
    levels = pyramid(x, grid, options)
    reached = torch.ones(levels[-1].x.shape[:3], dtype=torch.bool, device=x.device)
    found = []
    for level, below in zip(levels[:0:-1], levels[-2::-1], strict=True):
        ends = reached & like_children(level, below, options)
        found.append(_nodes(level, ends))
        open_, inside = (reached & ~ends).flatten(1), level.children.flatten(0, 1)
        node, slot = (inside >= 0).nonzero(as_tuple=True)
        reached = torch.zeros(below.x.shape[:3], dtype=torch.bool, device=x.device)
        reached.flatten(1)[:, inside[node, slot]] = open_[:, node]
    found.append(_nodes(levels[0], reached))
    nodes = Nodes(*(torch.cat(part) for part in zip(*found, strict=True)))
    order = top_left(nodes, grid).argsort()
    return Nodes(*(part[order] for part in nodes))


def _nodes(level: Level, ends: Tensor) -> Nodes:
    frame, row, column = ends.nonzero(as_tuple=True)
    top, bottom = level.rows[row], level.rows[row + 1]
    left, right = level.columns[column], level.columns[column + 1]
    box = torch.stack([frame, top, left, bottom, right], 1)
    return Nodes(level.x[ends], box, (bottom - top) * (right - left))


def top_left(nodes: Nodes, grid: Grid) -> Tensor:
    """(M,) int64, numbers of tokens."""
    frame, row, column, _, _ = nodes.box.unbind(1)
    return (frame * grid[0] + row) * grid[1] + column


def holds(boxes: Tensor, others: Tensor) -> Tensor:
    """(M, 5), (N, 5) -> (M, N) bool, whether one of the two boxes holds the other."""
    (top, left), (bottom, right) = boxes[:, None, 1:3].unbind(-1), boxes[:, None, 3:5].unbind(-1)
    (top2, left2), (bottom2, right2) = others[None, :, 1:3].unbind(-1), others[None, :, 3:5].unbind(-1)
    outside = (top <= top2) & (left <= left2) & (bottom >= bottom2) & (right >= right2)
    return outside | ((top >= top2) & (left >= left2) & (bottom <= bottom2) & (right <= right2))


def partners(nodes: Nodes, options: Options) -> tuple[Tensor, Tensor]:
    """(P,) int64 twice, nodes of a frame and of the next that are alike, where one box holds the other."""
    features = unit(nodes.x, options.head_width)
    starts = [0, *nodes.box[:, 0].bincount().cumsum(0).tolist()]
    found = [nodes.box.new_empty(0, 2)]
    for before, start, stop in zip(starts, starts[1:], starts[2:], strict=False):
        like = features[before:start] @ features[start:stop].T >= options.temporal_threshold
        pair = (like & holds(nodes.box[before:start], nodes.box[start:stop])).nonzero()
        found.append(pair + torch.tensor([before, start], device=pair.device))
    earlier, later = torch.cat(found).unbind(1)
    return earlier, later


def representatives(nodes: Nodes, options: Options) -> Tensor:
    """(M,) int64, the node that each goes into.

    A node first stands for its smallest partner of the frame before, then each partner of that frame for what the later
    ones stand for; in the end all go on to where theirs go. So of nodes that are joined in a row through several frames
    not always all become one.
    """
    earlier, later = partners(nodes, options)
    into = torch.arange(len(nodes.box), device=nodes.x.device)
    into = into.scatter_reduce(0, later, earlier, "amin")
    into = into.scatter_reduce(0, earlier, into[later], "amin")
    while not torch.equal(into, into[into]):
        into = into[into]
    return into


def joined(nodes: Nodes, into: Tensor, weighted: bool) -> Nodes:
    """The nodes that others go into, with what those hold."""
    roots, group = into.unique(return_inverse=True)
    total, number = sums(nodes.x, group, len(roots))
    size = torch.zeros_like(roots).index_add(0, group, nodes.size)
    return Nodes(total / (size.unsqueeze(1) if weighted else number), nodes.box[roots], size)


def merged_nodes(x: Tensor, grid: Grid, options: Options) -> Nodes:
    """(T, S, D) -> what is left of a video."""
    nodes = quadtrees(x, grid, options)
    return joined(nodes, representatives(nodes, options), options.weighted)


def compress(features: FrameFeatures, options: Options) -> KeptFeatures:
    """In the order of the nodes' top left tokens.

    Raises:
        ValueError: options out of bounds, or see `unit`.
    """
    options = checked("sttm", options)
    nodes = merged_nodes(at_least_float32(features.x), features.grid, options)
    return kept(features, top_left(nodes, features.grid), nodes.x.to(features.x.dtype))


COMPRESSOR = Compressor(Options, compress)
