"""TempMe (ICLR 2025): ImgMe merges inside a frame, ClipMe joins neighbouring clips and merges across them.

The schedule of section 3: blocks before the first merge layer remove r tokens a frame (ImgMe); each merge
layer joins clips, merges across them before attention and inside the joined clip after it (ClipMe); later
blocks go on merging inside the clip.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from math import prod
from typing import Annotated, Any

import torch
from torch import Tensor, nn

from tempme_vl.matching import bipartite_match
from tempme_vl.merging.base import LayerMerge, TokenMerger, apply_merge
from tempme_vl.merging.budget import Knob, LimitKind
from tempme_vl.merging.method import Behind, Method
from tempme_vl.merging.schedule import Encoder, LayerPlan, MergeSchedule
from tempme_vl.schema import Range, Size
from tempme_vl.state import AttentionContext, TokenState


@dataclass(frozen=True)
class Options:
    """Percentages are *merged* proportions (the paper's 1 - R_C and 1 - R_I), whole numbers because int(N * 0.1) and
    int(N * (1 - 0.9)) differ; they count CLS tokens, and every number is clamped to the pairs that can be formed.

    r: pairs merged a frame in each block before the first merge layer (ImgMe).
    merge_layers: ascending block numbers that join clips.
    merge_frames: clips joined in each of them; 1 keeps the clips apart but still places and merges.
    cross_percent: merged across clips where they are joined.
    intra_percent: merged inside clips from there on.
    """

    r: int
    merge_layers: tuple[int, ...]
    merge_frames: tuple[int, ...]
    cross_percent: int
    intra_percent: int


# Settings of the paper's Table 1 by the tokens of a frame (CLIP B/32, B/16). UMT B/16 (196) is a fit: the paper gives
# 111.5 GFLOPs without the setting; this one has 111.48.
_PUBLISHED: dict[int, dict[str, Any]] = {
    50: {"r": 2, "merge_layers": (8, 9, 10), "cross_percent": 30, "intra_percent": 10},
    197: {"r": 10, "merge_layers": (8, 9, 10), "cross_percent": 40, "intra_percent": 20},
    196: {"r": 11, "merge_layers": (7, 8, 9), "cross_percent": 40, "intra_percent": 10},
}
_LAYERS = 12
_JOINS = 3


def published(encoder: Encoder) -> dict[str, Any]:
    """The paper's for a tower; with fewer joins than its three, for few frames, in the first of its layers."""
    options = _PUBLISHED.get(encoder.tokens) if encoder.layers == _LAYERS else None
    joins = len(_even_joins(encoder.frames, _JOINS))
    return {} if options is None else {**options, "merge_layers": options["merge_layers"][:joins]}


def shaped(encoder: Encoder) -> dict[str, Any]:
    """Clips are joined to one in three steps as even as the frames allow, the smaller ones first, in the last third of
    the blocks and not in the very last: 2-2-3 for 12 frames and 4-4-4 for 64, at layers 8, 9, 10 of 12.
    """
    spacing = max(1, round(encoder.layers / _LAYERS))
    first = max(0, encoder.layers - 4 * spacing)
    joins = _even_joins(encoder.frames, min(_JOINS, max(1, encoder.layers - 1)))
    return {"merge_layers": tuple(range(first, encoder.layers, spacing))[: len(joins)], "merge_frames": joins}


def _even_joins(frames: int, steps: int) -> tuple[int, ...]:
    """At most so many factors of a number, ascending, the largest as small as it can be; () for 1."""
    if steps == 1:
        return (frames,) if frames > 1 else ()
    ways = ((first, *_even_joins(frames // first, steps - 1)) for first in range(1, frames + 1) if frames % first == 0)
    best = min((tuple(sorted(way)) for way in ways), key=lambda way: (max(way, default=1), way[::-1]))
    return tuple(join for join in best if join > 1)


def knobs(encoder: Encoder, kind: LimitKind) -> list[list[Knob]]:
    """GFLOPs go down by r, with the percentages of B/16, and come back to the limit by lower percentages. Tokens go
    down by the percentages, with the paper's r or 5 percent of a frame's tokens; if that is too much or not enough, r
    changes, too.
    """
    patches = encoder.tokens - encoder.prefix
    most, cross = patches // 2, Knob("cross_percent", 0, 40)
    if kind == "budget":
        return [[Knob("r", 0, most), cross, Knob("intra_percent", 0, 20)]]
    r, intra = published(encoder).get("r", round(patches / 20)), Knob("intra_percent", 0, 50)
    return [[Knob("r", r, r), intra, cross], [Knob("r", 0, r), intra, cross], [Knob("r", r, most), intra, cross]]


def schedule(encoder: Encoder, options: Options) -> MergeSchedule:
    """TempMe's token counts.

    Raises:
        ValueError: unknown or unordered layers, lists of different length, percentages outside 0..100, or frames
            that the joins do not divide.
    """
    layers, prefix = encoder.layers, encoder.prefix
    merge_layers, merge_frames = options.merge_layers, options.merge_frames
    if len(merge_layers) != len(merge_frames):
        raise ValueError(
            f"one number of joined clips a merge layer: merge_layers={tuple(merge_layers)} has "
            f"{len(merge_layers)}, merge_frames={tuple(merge_frames)} has {len(merge_frames)}"
        )
    if list(merge_layers) != sorted(set(merge_layers)) or not all(0 <= n < layers for n in merge_layers):
        raise ValueError(
            f"merge_layers must ascend within 0..{layers - 1} for a tower of {layers} layers; got {tuple(merge_layers)}"
        )
    for name in ("cross_percent", "intra_percent"):
        percent = getattr(options, name)
        if not isinstance(percent, int) or not 0 <= percent <= 100:
            raise ValueError(f"{name} is a whole number of percent merged, 0..100; got {percent!r}")
    if not isinstance(options.r, int) or options.r < 0:
        raise ValueError(
            f"r counts the pairs merged a frame in each early block, a whole number >= 0; got {options.r!r}"
        )

    joins = dict(zip(merge_layers, merge_frames, strict=True))
    first_merge = merge_layers[0] if merge_layers else layers
    plan, n, num_prefix = [], encoder.tokens, prefix
    for layer in range(layers):
        join = joins.get(layer)
        n, num_prefix = n * (join or 1), num_prefix * (join or 1)
        cross = 0 if join is None else min((n - num_prefix) // 2, n * options.cross_percent // 100)
        wanted = options.r if layer < first_merge else (n - cross) * options.intra_percent // 100
        intra = min((n - cross - num_prefix) // 2, wanted)
        n -= cross + intra
        plan.append(LayerPlan(join, cross, intra))
    return MergeSchedule("tempme", encoder.frames, encoder.tokens, tuple(plan), prefix)


class IntraClipMerge(TokenMerger):
    """Merges the most similar pairs inside each clip, compared by head-mean keys: ImgMe, and ClipMe's second step."""

    def __init__(self, pairs: int):
        super().__init__()
        self.pairs = pairs

    def forward(self, state: TokenState, context: AttentionContext) -> TokenState:
        return apply_merge(state, bipartite_match(context.features(), self.pairs, state.num_prefix))


class ClipPosition(nn.Module):
    """A learnt vector for each clip, added to all its tokens: (B*C, N, D) -> (B*C, N, D).

    Zero at first, which starts at the pretrained function; training from scratch needs it random (docs/LOG.md).
    """

    def __init__(self, clips: int, width: int):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(clips, width))

    def forward(self, x: Tensor) -> Tensor:
        clips = len(self.weight)
        return (x.unflatten(0, (-1, clips)) + self.weight.unsqueeze(1).to(x.dtype)).flatten(0, 1)

    def part(self, frames: range, of: int) -> ClipPosition:
        """Of the clips of some frames; see `tempme_vl.merging.base.HasParts`."""
        clips, width = self.weight.shape
        in_clip = of // clips
        numbers = torch.arange(len(frames) // in_clip, device=self.weight.device) + frames[0] // in_clip
        made = ClipPosition(len(numbers), width)
        made.weight = nn.Parameter(self.weight.detach()[numbers % clips], requires_grad=False)
        return made


class CrossClipMerge(TokenMerger):
    """ClipMe's first step: joins clips, tells them apart by a learnt position, merges across them.

    The match compares the tokens as they are before the clip position is added (section 3.3).

    Args:
        clips: clips of the video before the join.
        join: neighbouring clips joined.
        pairs: pairs merged in each joined clip.
        width: D.
        alternate: whether the joined clips' tokens alternate, so that the two sets of a match of two clips are the two
            clips, and no position is learnt.
    """

    clip_position: Any

    def __init__(self, clips: int, join: int, pairs: int, width: int, alternate: bool = False):
        super().__init__()
        self.join, self.pairs, self.alternate = join, pairs, alternate
        self.clip_position = nn.Identity() if alternate else ClipPosition(clips, width)

    def forward(self, state: TokenState, context: AttentionContext) -> TokenState:
        placed = replace(state, x=self.clip_position(state.x)).join_clips(self.join)
        if self.alternate:
            placed = placed.keep(_alternating(placed, self.join))
            compared = placed.x
        else:
            compared = replace(state, x=context.features()).join_clips(self.join).x
        return apply_merge(placed, bipartite_match(compared, self.pairs, placed.num_prefix))


def _alternating(state: TokenState, join: int) -> Tensor:
    """(B*C, N - P) int64: the clips' first patch tokens, then their second ones, and so on."""
    rows, tokens, _ = state.x.shape
    number = torch.arange(state.num_prefix, tokens, device=state.x.device)
    return number.unflatten(0, (join, -1)).T.flatten().expand(rows, -1)


def layer_merge(schedule: MergeSchedule, layer: int, width: int) -> LayerMerge:
    plan, alternate = schedule.plan[layer], bool(dict(schedule.settings).get("alternate"))
    before = TokenMerger()
    if plan.join is not None:
        clips = schedule.layer_counts[layer].clips * plan.join
        before = CrossClipMerge(clips, plan.join, plan.before, width, alternate)
    return LayerMerge(before, IntraClipMerge(plan.after) if plan.after else TokenMerger())


@dataclass(frozen=True)
class BehindOptions:
    """As in `Options`; one step joins as many clips as each number of merge_frames says. No positions are learnt."""

    merge_frames: list[Size] = field(default_factory=lambda: [2, 2])
    cross_percent: Annotated[int, Range(0, 100)] = 40
    intra_percent: Annotated[int, Range(0, 100)] = 10


def behind_schedule(frames: int, grid: tuple[int, int], options: BehindOptions) -> MergeSchedule:
    """Joined clips alternate, since frames of a grid have their tokens in the same places.

    Raises:
        ValueError: no step, or see `schedule`.
    """
    joins = tuple(options.merge_frames)
    if not joins:
        raise ValueError("merge_frames says how many clips each step joins, such as (2, 2); got none")
    inside = Options(0, tuple(range(len(joins))), joins, options.cross_percent, options.intra_percent)
    made = schedule(Encoder(len(joins), frames, prod(grid), 0), inside)
    return replace(made, settings=(("alternate", True),))


def behind_knobs(frames: int, grid: tuple[int, int]) -> list[list[Knob]]:
    """Four frames become one clip where they divide by four, else as many as do in two steps; for the lowest limits all
    frames do, in three steps."""
    usual = [2, 2] if frames % 4 == 0 else list(_even_joins(frames, 2))
    return [
        [_always("merge_frames", joins), Knob("intra_percent", 0, 50), Knob("cross_percent", 0, 50)]
        for joins in (usual, list(_even_joins(frames, 3)))
    ]


def _always(name: str, value: Any) -> Knob:
    return Knob(name, 0, 0, lambda _: value)


METHOD = Method(
    Options,
    schedule,
    layer_merge,
    published,
    shaped,
    knobs,
    joint=False,
    reads=("tokens", "keys"),
    behind=Behind(BehindOptions, behind_schedule, behind_knobs),
    apart=True,
)
