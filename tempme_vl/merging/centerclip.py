"""CenterCLIP (SIGIR 2022): the patches of neighbouring frames are clustered, and each cluster leaves one token.

In front of a block neighbouring clips are joined to a segment, whose CLS tokens become their mean; its patches, as they
are there, are clustered (`tempme_vl.merging.clustering`). Of each cluster the medoid stays and the others are dropped,
or all become their mean at the medoid's place. Tokens count once in attention, however many they hold.

Of what clustering costs, `matching` counts the distances between tokens.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from math import prod
from typing import Annotated, Any, Literal

import torch
from torch import Tensor

from tempme_vl.matching import MergeMap
from tempme_vl.merging.base import LayerMerge, TokenMerger
from tempme_vl.merging.budget import Knob, LimitKind
from tempme_vl.merging.clustering import kmedoids, spectral
from tempme_vl.merging.method import Behind, Method, checked
from tempme_vl.merging.schedule import Encoder, LayerCount, LayerPlan, MergeSchedule
from tempme_vl.precision import at_least_float32
from tempme_vl.schema import Count, Range, Size
from tempme_vl.state import AttentionContext, TokenState

_Positive = Annotated[float, Range(1e-12, 1e6)]


@dataclass(frozen=True)
class Clustering:
    """algorithm: k-medoids++ of the tokens, or of the eigenvectors of a graph of them.
    centers: what stays of a cluster.
    distance, norm: of points; norm is the p of "euclidean", which 2 is.
    unit: whether k-medoids++ scales the tokens to length 1 first.
    threshold, iterations: k-medoids++ ends when the medoids move less than this in sum, at the latest then.
    neighbours: of spectral clustering's graph; 0 for one with all edges, -1 for CenterCLIP's own number, 5 for each
        joined frame and 5 more where a frame has 100 tokens.
    sigma: of the heat kernel that its edges weigh.
    """

    algorithm: Literal["kmedoids", "spectral"] = "kmedoids"
    centers: Literal["medoid", "mean"] = "medoid"
    distance: Literal["euclidean", "cosine"] = "euclidean"
    norm: _Positive = 2.0
    unit: bool = False
    threshold: _Positive = 1e-6
    iterations: Size = 100
    neighbours: Annotated[int, Range(-1, 1 << 20)] = 0
    sigma: _Positive = 2.0

    def __call__(self, x: Tensor, clusters: int, frames: int) -> tuple[Tensor, Tensor]:
        """Clusters points.

        Args:
            x: (R, N, D), of so many frames.

        Returns:
            (R, N) int64, the cluster of each; (R, K) int64, the points in their middle, ascending.
        """
        rule = self.distance, float(self.norm), self.threshold, self.iterations
        if self.algorithm == "kmedoids":
            return kmedoids(x, clusters, *rule[:2], self.unit, *rule[2:])
        near, tokens = self.neighbours, x.shape[1]
        if near < 0:
            near = 5 * frames + (5 if tokens // frames >= 100 else 0)
        return spectral(x, clusters, min(near, tokens), self.sigma, *rule)


@dataclass(frozen=True)
class _Blocks:
    """merge_layers: the blocks in front of which tokens are clustered, ascending.
    merge_frames: neighbouring clips joined in each of them.
    clusters: tokens that stay of each joined clip beside its CLS tokens; one number, or one a block.
    """

    merge_layers: tuple[Count, ...]
    merge_frames: tuple[Size, ...]
    clusters: Size | tuple[Size, ...]


@dataclass(frozen=True)
class Options(Clustering, _Blocks):
    """Where tokens are clustered, and how."""


_PUBLISHED = {50: 49, 197: 160}  # clusters a segment for CLIP B/32 and B/16


def published(encoder: Encoder) -> dict[str, Any]:
    return {"clusters": _PUBLISHED[encoder.tokens]} if encoder.tokens in _PUBLISHED and encoder.layers == 12 else {}


def shaped(encoder: Encoder) -> dict[str, Any]:
    """Once, in front of the middle block, as few frames joined as their number divides by: of 12 frames 2."""
    return {"merge_layers": (encoder.layers // 2,), "merge_frames": (_divisors(encoder.frames)[0],)}


def _divisors(frames: int) -> list[int]:
    """What frames can be joined by, ascending: 2 and more, but for one frame."""
    return [n for n in range(2, frames + 1) if frames % n == 0] or [1]


def knobs(encoder: Encoder, kind: LimitKind) -> list[list[Knob]]:
    """Tokens go down by fewer clusters, then by more frames to a segment. GFLOPs go down by clustering to a half to an
    eighth of the tokens in front of the middle block, then of earlier and of later ones; in the end to as few as can be
    in front of the first.
    """
    divisors, patches = _divisors(encoder.frames), encoder.tokens - encoder.prefix

    def clusters(frames: int, most: int, least: int) -> Knob:
        tokens = frames * patches
        return Knob("clusters", tokens - most, tokens - least, lambda fewer: tokens - fewer)

    def once(name: str, value: int) -> Knob:
        return Knob(name, value, value, lambda number: (number,))

    if kind == "tokens":
        return [[once("merge_frames", n), clusters(n, n * patches, 1)] for n in divisors]
    middle, tokens = encoder.layers // 2, divisors[0] * patches
    layers = [*range(middle, -1, -1), *range(middle + 1, encoder.layers)]
    share = clusters(divisors[0], max(1, tokens // 2), max(1, tokens // 8))
    last = [once("merge_layers", 0), once("merge_frames", encoder.frames), clusters(encoder.frames, patches, 1)]
    return [*([once("merge_layers", layer), share] for layer in layers), last]


def schedule(encoder: Encoder, options: Options) -> MergeSchedule:
    """The counts of clusters.

    Raises:
        ValueError: options out of bounds, unknown or unordered blocks, lists of different length, more clusters than
            tokens, or frames that the joins do not divide.
    """
    options = checked("centerclip", options)
    layers, joins, wanted = options.merge_layers, options.merge_frames, options.clusters
    wanted = (wanted,) * len(layers) if isinstance(wanted, int) else wanted
    if not len(layers) == len(joins) == len(wanted):
        raise ValueError(
            f"one number of joined clips and of clusters a block: merge_layers={layers}, merge_frames={joins}, "
            f"clusters={options.clusters}"
        )
    if list(layers) != sorted(set(layers)) or any(layer >= encoder.layers for layer in layers):
        raise ValueError(f"merge_layers must ascend within 0..{encoder.layers - 1}; got {layers}")
    plan, patches = [LayerPlan()] * encoder.layers, encoder.tokens - encoder.prefix
    for layer, join, clusters in zip(layers, joins, wanted, strict=True):
        tokens = join * patches
        if clusters > tokens:
            raise ValueError(f"block {layer} has {tokens} patches to cluster in a joined clip; got clusters={clusters}")
        pooled = encoder.prefix > 0 and join > 1
        plan[layer] = LayerPlan(join if join > 1 else None, pool_prefix=pooled, fewer_before=tokens - clusters)
        patches = clusters
    settings = {name: value for name, value in asdict(options).items() if name not in asdict(_Blocks((), (), 1))}
    shape = encoder.frames, encoder.tokens, tuple(plan), encoder.prefix
    return MergeSchedule("centerclip", *shape, proportional=False, settings=tuple(sorted(settings.items())))


class ClusterFrames(TokenMerger):
    """Joins clips to a segment, and leaves a token of each cluster of its patches.

    Args:
        join: clips.
        pool: whether their CLS tokens become one.
        clusters: K.
    """

    def __init__(self, join: int, pool: bool, clusters: int, clustering: Clustering):
        super().__init__()
        self.join, self.pool, self.clusters, self.clustering = join, pool, clusters, clustering

    def forward(self, state: TokenState, context: AttentionContext) -> TokenState:
        state = state.join_clips(self.join)
        if self.pool:
            state = state.pool_prefix(self.join)
        prefix = state.num_prefix
        assigned, centers = self.clustering(state.x[:, prefix:].detach(), self.clusters, self.join)
        if self.clustering.centers == "medoid":
            return state.keep(centers + prefix)
        merge = _to_centers(assigned, centers, prefix)
        x = merge.mean(at_least_float32(state.x)).to(state.x.dtype)
        return state.regroup(x, merge.sum(state.size), lambda: merge.assignment, lambda: merge.base)


def _to_centers(assigned: Tensor, centers: Tensor, prefix: int) -> MergeMap:
    """All points of a cluster into its center, behind the prefix."""
    rows, points = assigned.shape
    is_center = torch.zeros_like(assigned).scatter(1, centers, 1)
    others = is_center.argsort(dim=1, stable=True)[:, : points - centers.shape[1]]
    own = torch.arange(prefix, device=assigned.device).expand(rows, -1)
    return MergeMap(torch.cat([own, centers + prefix], 1), others + prefix, assigned.gather(1, others) + prefix)


def layer_merge(schedule: MergeSchedule, layer: int, width: int) -> LayerMerge:
    plan, count = schedule.plan[layer], schedule.layer_counts[layer]
    if plan == LayerPlan():
        return LayerMerge()
    clustering = Clustering(**dict(schedule.settings))  # type: ignore[arg-type]
    return LayerMerge(ClusterFrames(plan.join or 1, plan.pool_prefix, count.attention - count.prefix, clustering))


def matching(plan: LayerPlan, count: LayerCount, width: int, head_width: int) -> int:
    """Of the distances between all tokens of a segment."""
    return count.clips * (count.joined - count.prefix) ** 2 * width if plan.fewer_before else 0


@dataclass(frozen=True)
class BehindOptions(Clustering):
    """One step joins as many clips as each number of merge_frames says.

    percent: clusters of each joined clip, as a share of a frame's tokens.
    """

    merge_frames: list[Size] = field(default_factory=lambda: [2])
    percent: Annotated[int, Range(1, 100)] = 100


def behind_schedule(frames: int, grid: tuple[int, int], options: BehindOptions) -> MergeSchedule:
    """Raises:
    ValueError: see `schedule`.
    """
    how = asdict(options)
    joins, clusters = tuple(how.pop("merge_frames")), max(1, prod(grid) * how.pop("percent") // 100)
    inside = Options(tuple(range(len(joins))), joins, clusters, **how)
    return schedule(Encoder(len(joins), frames, prod(grid), 0), inside)


def behind_knobs(frames: int, grid: tuple[int, int]) -> list[list[Knob]]:
    return [[Knob("percent", 0, 99, lambda fewer: 100 - fewer)]]


METHOD = Method(
    Options,
    schedule,
    layer_merge,
    published,
    shaped,
    knobs,
    joint=False,
    matching=matching,
    reads=("tokens",),
    behind=Behind(BehindOptions, behind_schedule, behind_knobs),
    apart=True,
)
