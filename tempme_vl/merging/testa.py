"""TESTA's aggregation (EMNLP Findings 2023): fewer frames in front of attention, fewer patches in each behind it.

Frames: one decision for all patches of a video. Each patch of a frame of one half chooses among the frames of the
other half, and the frame goes where most patches want. Its CLS token goes along. Patches: in every frame by itself, by
the keys of attention. Three strategies:

    geometry    the most similar pairs between alternating tokens merge, as in ToMe; TESTA's default
    importance  the tokens that get the least attention merge into their most similar others (the paper's equation 1; no
                code of it was published)
    prune       they are dropped, as TESTA's code does

Tokens count once in attention, however many they hold. TESTA compares frames by the keys of a temporal attention of its
own, as its towers have it (`tempme_vl.backbones.testa`). A tower that has none gives the tokens in its place, and to
`importance` and `prune` their attention by cosine: our own reading, which no paper measures.

`guidance` is what the paper's limitations name and nobody has: merging with a text in mind. Frames and patches that are
near a text are taken to be less alike than they are, so that others merge in their place.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from typing import Annotated, Any, Literal, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import normalize

from tempme_vl.matching import MergeMap, bipartite_match
from tempme_vl.merging.base import LayerMerge, TokenMerger, apply_merge
from tempme_vl.merging.budget import Knob, LimitKind
from tempme_vl.merging.guidance import less_alike_frames, less_alike_patches
from tempme_vl.merging.method import Behind, Method, checked, pair_matching
from tempme_vl.merging.schedule import Encoder, LayerCount, LayerPlan, MergeSchedule
from tempme_vl.merging.tome import inflected
from tempme_vl.precision import at_least_float32
from tempme_vl.schema import Cosine, Count, Layers, Range
from tempme_vl.state import AttentionContext, TokenState

Strategy = Literal["geometry", "importance", "prune"]
# a number for all blocks; one for each; or (r, inflection), as ToMe's (`tempme_vl.merging.tome.Options`)
Fewer = Count | list[Count] | tuple[Count, Cosine]


@dataclass(frozen=True)
class Options:
    """Numbers of all blocks, one number a block, or (r, inflection) as ToMe's (R_T and R_S of the paper); what is too
    much is clamped, so that no more than half of the frames, or of the patches, go at once.

    r_temporal: frames that a video has fewer in front of attention.
    r_spatial: patches that a frame has fewer behind it.
    guidance: by how much two frames, or two patches of a frame, are less alike (of cosines) for each standard deviation
        by which they are nearer to a text than others of their video, or frame; 0 for no text. By geometry alone. It
        costs a product a token and step, which is not in GFLOPs.
    """

    r_temporal: Fewer
    r_spatial: Fewer
    strategy: Strategy = "geometry"
    guidance: Annotated[float, Range(0, 100)] = 0.0


# by tokens of a frame and frames. That of CLIP B/32 is a fit: the paper of TempMe gives 40.6 GFLOPs, with a temporal
# attention in the blocks that merge frames
_PUBLISHED: dict[tuple[int, int], dict[str, Any]] = {
    (197, 32): {"r_temporal": 1, "r_spatial": 12},
    (197, 96): {"r_temporal": 4, "r_spatial": 8},
    (50, 12): {"r_temporal": [0] * 7 + [1] * 4 + [0], "r_spatial": 2},
}


def published(encoder: Encoder) -> dict[str, Any]:
    return _PUBLISHED.get((encoder.tokens, encoder.frames), {}) if encoder.layers == 12 else {}


def knobs(encoder: Encoder, kind: LimitKind) -> list[list[Knob]]:
    """A quarter of the frames go, one by one in the last blocks, and as many patches as are wanted, spread evenly; if
    that is too much or not enough, none or a half of the frames.
    """
    layers, patches = encoder.layers, encoder.tokens - encoder.prefix

    def spread(fewer: int) -> list[int]:
        each, more = divmod(fewer, layers)
        return [each + 1] * more + [each] * (layers - more)

    spatial = Knob("r_spatial", 0, layers * (patches // 2), spread)
    shares = (encoder.frames // 4, 0, encoder.frames // 2)
    return [[Knob("r_temporal", n, n, lambda fewer: spread(fewer)[::-1]), spatial] for n in dict.fromkeys(shares)]


class _Count(NamedTuple):
    """Frames of a video and patches of a frame in front of a block, and how many go in it."""

    frames: int
    patches: int
    fewer_frames: int
    fewer_patches: int


def _counts(encoder: Encoder, options: Options) -> list[_Count]:
    frames, patches, counts = encoder.frames, encoder.tokens - encoder.prefix, []
    for temporal, spatial in zip(
        *(_each(r, encoder.layers) for r in (options.r_temporal, options.r_spatial)), strict=True
    ):
        # with a CLS token among them, or for frames as TESTA's code counts them, one stays more
        few = min(temporal, (frames - 1) // 2), min(spatial, patches // 2)
        counts.append(_Count(frames, patches, *few))
        frames, patches = frames - few[0], patches - few[1]
    return counts


def _each(r: int | Sequence[float], layers: int) -> list[int]:
    values = [int(n) for n in inflected(r, layers) or (r if isinstance(r, Sequence) else [r] * layers)]
    if len(values) != layers:
        raise ValueError(f"r_temporal and r_spatial are one number, or one for each of {layers} blocks; got {values}")
    return values


def schedule(encoder: Encoder, options: Options) -> MergeSchedule:
    """Frames become fewer, and so do the patches of each.

    Raises:
        ValueError: options out of bounds, a list of another length than the blocks, or guidance without geometry.
    """
    checked("testa", options)
    if options.guidance and options.strategy != "geometry":
        raise ValueError(f"guidance changes similarities: it needs strategy 'geometry'; got {options.strategy!r}")
    plan = []
    for _, _, frames, patches in _counts(encoder, options):
        merged = options.strategy == "geometry"
        plan.append(LayerPlan(fewer_clips=frames, after=patches if merged else 0, fewer_after=0 if merged else patches))
    guidance = (("guidance", options.guidance),) if options.guidance else ()
    settings = (*guidance, ("strategy", options.strategy))
    return MergeSchedule("testa", encoder.frames, encoder.tokens, tuple(plan), encoder.prefix, False, False, settings)


def match_frames(metric: Tensor, r: int, less: Tensor | None = None) -> MergeMap:
    """The r best merges of frames at even places into ones at odd places.

    Each patch of a frame chooses the frame whose patch at its place is most similar; the frame merges into the one that
    most patches chose, the first of several such. It does so with the similarity that most of its patches have, the
    least of several: of real numbers, the least of all.

    Args:
        metric: (V, L, T, D_metric) features of T frames of L patches.
        r: 0..T // 2.
        less: (V, T) how much less alike a frame and any other are taken to be; None: not at all.

    Returns:
        of the T frames of each video: those at even places that stay, in order, then those at odd places.
    """
    with torch.no_grad(), torch.autocast(metric.device.type, enabled=False):
        unit = normalize(at_least_float32(metric), dim=-1)
        alike = unit[:, :, ::2] @ unit[:, :, 1::2].transpose(-1, -2)
        if less is not None:
            alike = alike - less[:, None, ::2, None] - less[:, None, None, 1::2]
        similarity, chosen = alike.max(-1)
        into, score = (_most_frequent(values.transpose(1, 2)) for values in (chosen, similarity))
        ranked = score.argsort(dim=1, descending=True, stable=True)
        merged, kept = ranked[:, :r], ranked[:, r:].sort(dim=1).values
        odd = torch.arange(1, metric.shape[2], 2, device=metric.device).expand(metric.shape[0], -1)
        return MergeMap(torch.cat([2 * kept, odd], 1), 2 * merged, kept.shape[1] + into.gather(1, merged))


def _most_frequent(values: Tensor) -> Tensor:
    """(..., n) -> (...): the value that is there most often, the least of several such."""
    values = values.sort(dim=-1).values
    often = (values.unsqueeze(-1) == values.unsqueeze(-2)).sum(-1)
    return values.take_along_dim(often.argmax(-1, keepdim=True), -1).squeeze(-1)


def least(scores: Tensor, r: int) -> tuple[Tensor, Tensor]:
    """(R, N) -> (R, N - r) int64, the places of the highest scores, ascending, and (R, r), those of the lowest."""
    ranked = scores.argsort(dim=1, stable=True)
    return ranked[:, r:].sort(dim=1).values, ranked[:, :r]


def match_least(scores: Tensor, metric: Tensor, r: int) -> MergeMap:
    """The tokens of the r lowest scores into their most similar others, which stay in order.

    Args:
        scores: (R, N).
        metric: (R, L, N, D_metric), compared at L places; where these disagree, they vote.
    """
    kept, merged = least(scores, r)
    with torch.no_grad(), torch.autocast(metric.device.type, enabled=False):
        unit = normalize(at_least_float32(metric), dim=-1)
        a, b = (unit.take_along_dim(places[:, None, :, None], 2) for places in (merged, kept))
        chosen = (a @ b.transpose(-1, -2)).argmax(-1)
        return MergeMap(kept, merged, _most_frequent(chosen.transpose(1, 2)))


class AggregateFrames(TokenMerger):
    """In front of attention: r frames of a video merge into others, or are dropped.

    Args:
        r: frames.
        in_time: whether they get into the order of time again, by the first frame that each holds. TESTA never restores
            it; here the last step does, after which no halves are taken any more.
        guidance: see `Options`.
    """

    def __init__(self, r: int, strategy: Strategy, in_time: bool, guidance: float = 0.0):
        super().__init__()
        self.r, self.strategy, self.in_time, self.guidance = r, strategy, in_time, guidance

    def forward(self, state: TokenState, context: AttentionContext) -> TokenState:
        if context.queries is None:
            metric = context.features()[:, state.num_prefix :].unflatten(0, (-1, state.num_clips)).transpose(1, 2)
        else:  # of attention over time, whose rows are places
            metric = context.features().unflatten(0, (state.x.shape[0] // state.num_clips, -1))
        if self.strategy == "geometry":
            state = state.merge_clips(match_frames(metric, self.r, less_alike_frames(state, self.guidance)))
        else:
            attention = self.attention(metric) if context.queries is None else context
            scores = received(attention, metric.shape[1])
            if self.strategy == "prune":
                return state.keep_clips(least(scores, self.r)[0])
            state = state.merge_clips(match_least(scores, metric, self.r))
        return state.keep_clips(_in_time(state)) if self.in_time else state

    def attention(self, metric: Tensor) -> AttentionContext:
        """(V, L, T, D) -> how frames attend to each other at each of the L places: V * L rows of one head."""
        unit = normalize(metric, dim=-1).flatten(0, 1).unsqueeze(1)
        return AttentionContext(unit, unit, scale=1.0)


class AggregateJoined(TokenMerger):
    """Behind a tower: frames of the same clip, one after the other, merge by geometry.

    Args:
        join: clips joined first, the frames.
        frames: T, in the clip.
        r: frames fewer.
    """

    def __init__(self, join: int, frames: int, r: int):
        super().__init__()
        self.join, self.frames, self.r = join, frames, r

    def forward(self, state: TokenState, context: AttentionContext) -> TokenState:
        state = state.join_clips(self.join)
        if not self.r:
            return state
        metric = state.x.unflatten(1, (self.frames, -1)).transpose(1, 2)
        merge, place = match_frames(metric, self.r), torch.arange(metric.shape[1], device=metric.device)
        numbers = (len(place) * n.unsqueeze(2) + place for n in (merge.base, merge.src, merge.dst))
        return apply_merge(state, MergeMap(*(n.flatten(1) for n in numbers)))


def received(attention: AttentionContext, rows: int) -> Tensor:
    """(V, N) the attention that each token gets from the others, the mean over heads and so many rows a video."""
    return attention.column_sums(diagonal=False).mean(1).unflatten(0, (-1, rows)).mean(1)


def _in_time(state: TokenState) -> Tensor:
    """(B, C) int64: the clips by the first frame that each holds."""
    assert state.clip_of is not None
    frames = state.clip_of.shape[1]
    number = torch.arange(frames, device=state.clip_of.device).expand_as(state.clip_of)
    first = number.new_full((len(number), state.num_clips), frames)
    return first.scatter_reduce(1, state.clip_of.clamp(min=0), number, "amin").argsort(dim=1)


class AggregatePatches(TokenMerger):
    """Behind attention: r patches of each frame merge into others of the frame, or are dropped.

    Args:
        r: patches of a frame.
        frames: of a clip; more than 1 behind a tower, by geometry alone.
        guidance: see `Options`; in a tower.
    """

    def __init__(self, r: int, strategy: Strategy, frames: int = 1, guidance: float = 0.0):
        super().__init__()
        self.r, self.strategy, self.frames, self.guidance = r, strategy, frames, guidance

    def forward(self, state: TokenState, context: AttentionContext) -> TokenState:
        features, prefix = context.features(), state.num_prefix
        if self.strategy == "geometry":
            features = features.unflatten(1, (self.frames, -1)).flatten(0, 1)
            merge = bipartite_match(features, self.r, prefix, less=less_alike_patches(state, self.guidance))
            frame = torch.arange(self.frames, device=features.device).unsqueeze(1)
            each = features.shape[1], features.shape[1], features.shape[1] - self.r
            numbers = zip((merge.base, merge.src, merge.dst), each, strict=True)
            return apply_merge(
                state, MergeMap(*((n.unflatten(0, (-1, self.frames)) + t * frame).flatten(1) for n, t in numbers))
            )
        scores = received(context, 1)[:, prefix:]
        if self.strategy == "prune":
            return state.keep(least(scores, self.r)[0] + prefix)
        merge = match_least(scores, features[:, prefix:].unsqueeze(1), self.r)
        own = torch.arange(prefix, device=features.device).expand(len(features), -1)
        base, src, dst = (n + prefix for n in (merge.base, merge.src, merge.dst))
        return apply_merge(state, MergeMap(torch.cat([own, base], 1), src, dst))


def layer_merge(schedule: MergeSchedule, layer: int, width: int) -> LayerMerge:
    settings: dict[str, Any] = dict(schedule.settings)
    strategy, guidance = settings["strategy"], settings.get("guidance", 0.0)
    plan, before, after = schedule.plan[layer], TokenMerger(), TokenMerger()
    if "steps" in settings:
        return _joined_merge(schedule, layer)
    if plan.fewer_clips:
        last = not any(later.fewer_clips for later in schedule.plan[layer + 1 :])
        # frames of divided attention are told apart by nothing any more, and TESTA leaves them in the order of matches
        before = AggregateFrames(plan.fewer_clips, strategy, last and not schedule.divided, guidance)
    if fewer := plan.after + plan.fewer_after:
        after = AggregatePatches(fewer, strategy, guidance=guidance)
    return LayerMerge(before, after)


def _matching(plan: LayerPlan, count: LayerCount, width: int, head_width: int, of_frames: int) -> int:
    """Of the halves with each other, at each patch for frames. By importance, of all with all, for the attention that
    each gets, and of the least important with the others; pruning, and a block that merges frames alone, count as well.

    Args:
        of_frames: the width of what frames are compared by.
    """
    fewer, patches, frames = plan.fewer_after, count.attention - count.prefix, count.clips + plan.fewer_clips
    compared = (frames // 2) * (frames - frames // 2) * of_frames
    if fewer:
        compared = frames**2 * width + plan.fewer_clips * count.clips * of_frames
    temporal = patches * compared if plan.fewer_clips else 0
    spatial = count.clips * (count.attention**2 * width + fewer * (patches - fewer) * head_width) if fewer else 0
    return temporal + spatial + pair_matching(plan, count, width, head_width)


def matching(plan: LayerPlan, count: LayerCount, width: int, head_width: int) -> int:
    """With tokens in the place of keys over time."""
    return _matching(plan, count, width, head_width, of_frames=width)


def divided_matching(plan: LayerPlan, count: LayerCount, width: int, head_width: int) -> int:
    """With keys over time."""
    return _matching(plan, count, width, head_width, of_frames=head_width)


@dataclass(frozen=True)
class BehindOptions:
    """By geometry, in every step or one number a step. steps: how often."""

    r_temporal: Fewer = 1
    r_spatial: Fewer = 16
    steps: Layers = 2


def behind_schedule(frames: int, grid: tuple[int, int], options: BehindOptions) -> MergeSchedule:
    """The frames are joined to one clip first, in which they merge as clips do in a tower."""
    encoder = Encoder(options.steps, frames, prod(grid), 0)
    plan: list[LayerPlan] = []
    for there, patches, fewer, fewer_patches in _counts(encoder, Options(options.r_temporal, options.r_spatial)):
        join = None if plan else frames
        plan.append(LayerPlan(join, fewer_before=fewer * patches, after=(there - fewer) * fewer_patches))
    settings = ("steps", options.steps), ("strategy", "geometry")
    return MergeSchedule("testa", frames, encoder.tokens, tuple(plan), 0, False, False, settings)


def _joined_merge(schedule: MergeSchedule, layer: int) -> LayerMerge:
    """The steps of `behind_schedule`."""
    frames, patches = schedule.frames, schedule.tokens
    for plan in schedule.plan[: layer + 1]:
        before, fewer = frames, plan.fewer_before // patches
        frames = before - fewer
        fewer_patches = plan.after // frames
        patches -= fewer_patches
    return LayerMerge(
        AggregateJoined(plan.join or 1, before, fewer), AggregatePatches(fewer_patches, "geometry", frames)
    )


def behind_knobs(frames: int, grid: tuple[int, int]) -> list[list[Knob]]:
    return [[Knob("steps", steps, steps), Knob("r_spatial", 0, prod(grid) // 2)] for steps in (2, 4, 8)]


METHOD = Method(
    Options,
    schedule,
    layer_merge,
    published,
    knobs=knobs,
    joint=False,
    divided=True,
    also={"temporal_r": "r_temporal", "spatial_r": "r_spatial"},
    matching=matching,
    divided_matching=divided_matching,
    reads=("tokens", "keys"),
    behind=Behind(BehindOptions, behind_schedule, behind_knobs),
)
