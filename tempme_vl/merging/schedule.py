"""How many tokens each layer keeps: fixed before the model runs, so counts and costs are plain arithmetic."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any, NamedTuple

from tempme_vl.costs import PAPER, BlockCost, Counting, attention, linear, norm
from tempme_vl.registries import METHODS
from tempme_vl.schema import LEFT_OUT, Count, Range, Size, read, write

Setting = bool | int | float | str


@dataclass(frozen=True)
class Encoder:
    """What a schedule needs to know of an encoder; see `MergeSchedule`."""

    layers: int
    frames: int
    tokens: int
    prefix: int = 1
    joint: bool = False
    divided: bool = False

    @property
    def clip_tokens(self) -> int:
        """Tokens of a clip in front of the first block."""
        return _of_video(self.frames, self.tokens, self.prefix, True) if self.joint else self.tokens


@dataclass(frozen=True)
class LayerPlan:
    """What happens in one block.

    Attributes:
        join: neighbouring clips joined into one before attention; None in a block without a clip step.
        before: pairs merged in each (joined) clip before attention; TempMe's cross-clip merging.
        after: pairs merged in each clip between attention and MLP; ImgMe and intra-clip merging.
        pool_prefix: whether the prefixes of the frames of a (joined) clip become one, their mean.
        insert: tokens that each clip gets before attention, behind its CLS tokens, and keeps; they never merge.
        fewer_before, fewer_after, fewer_last: patch tokens that each clip has fewer before attention, between attention
            and MLP and behind the MLP, beside the pairs: dropped, or gathered in others.
        gathered: patch tokens that go into others, or into a new one, where `fewer_after` counts.
        slots: of so many equal parts of each clip's patches a method ranks the tokens; 0 for the clip as it is.
        fewer_clips: clips that each video has fewer before attention: dropped, or merged into others.
    """

    join: int | None = None
    before: int = 0
    after: int = 0
    pool_prefix: bool = False
    insert: int = 0
    fewer_before: int = 0
    fewer_after: int = 0
    fewer_last: int = 0
    gathered: int = 0
    slots: int = 0
    fewer_clips: int = 0


class LayerCount(NamedTuple):
    """Clips of the video and tokens of each clip at the steps of one block."""

    clips: int
    prefix: int
    joined: int  # tokens a clip before the first merge
    attention: int  # tokens a clip in attention
    mlp: int  # tokens a clip in the MLP
    out: int  # tokens a clip after the block
    inserted: int  # of the prefix


@dataclass(frozen=True)
class MergeSchedule:
    """The static plan of a merging method for one encoder shape.

    Attributes:
        method: name in `tempme_vl.merging.METHODS`, which builds the modules.
        frames: F.
        tokens: N, tokens of a frame at the start, CLS and registers included.
        plan: one `LayerPlan` a block.
        prefix: P, tokens of a frame that never merge, in front of its patches: CLS, where there is one, and registers.
        joint: all frames are one clip from the start (UMT's joint space-time attention), and not F clips; a prefix is
            the video's then (TESTA's).
        proportional: whether a token counts in attention as many times as its size.
        settings: what the modules need to know beside the plan: names and plain values, ascending by name.
        divided: in each block the frames attend to each other at each place first, and then within themselves; the
            prefix is the video's, and each frame has a copy of it (TimeSformer's divided attention, TESTA).

    Raises:
        ValueError: frames that the joins do not divide, or more pairs than a clip's tokens can form, or fewer tokens
            than one.
    """

    method: str
    frames: int
    tokens: int
    plan: tuple[LayerPlan, ...]
    prefix: int = 1
    joint: bool = False
    proportional: bool = True
    settings: tuple[tuple[str, Setting], ...] = ()
    divided: bool = False

    def __post_init__(self) -> None:
        if self.divided and (self.joint or any((p.join or 1) > 1 or p.pool_prefix or p.insert for p in self.plan)):
            raise ValueError(
                "an encoder of divided attention keeps its frames apart from the first block to the last, with one "
                "prefix for all: no layer joins them, pools the prefix or inserts tokens"
            )
        if self.frames < 1 or self.tokens <= self.prefix or not self.plan:
            raise ValueError(
                f"a schedule needs at least 1 frame, 1 patch token and 1 layer; "
                f"got frames={self.frames}, tokens={self.tokens} with {self.prefix} CLS, layers={len(self.plan)}"
            )
        if self.joint and any(plan.join is not None for plan in self.plan):
            raise ValueError("a joint encoder's frames are one clip from the start: give no layers that join clips")
        clips = self.clips
        for layer, plan in enumerate(self.plan):
            join = 1 if plan.join is None else plan.join
            if join < 1 or clips % join:
                joins = [p.join for p in self.plan if p.join is not None]
                raise ValueError(
                    f"layer {layer} joins {join} clips but {clips} are left: {self.frames} frames do not divide by "
                    f"the joins {joins}; make the frames a multiple of {math.prod(joins)}, or change merge_frames"
                )
            clips = clips // join - plan.fewer_clips
            if plan.fewer_clips < 0 or clips < 1:
                raise ValueError(
                    f"layer {layer} wants {plan.fewer_clips} clips fewer, but at least 1 has to stay: {plan}"
                )
        if any(plan.fewer_clips for plan in self.plan) and any(
            (plan.join or 1) > 1 or plan.insert for plan in self.plan
        ):
            raise ValueError("clips that merge or are dropped are frames: no layer joins clips, or inserts tokens")
        for layer, (plan, count) in enumerate(zip(self.plan, self.layer_counts, strict=True)):
            for where, pairs, fewer, tokens in (
                ("before attention", plan.before, plan.fewer_before, count.joined),
                ("after attention", plan.after, plan.fewer_after, count.attention),
                ("behind the MLP", 0, plan.fewer_last, count.mlp),
            ):
                limit = (tokens - count.prefix) // 2
                if not 0 <= pairs <= limit:
                    raise ValueError(
                        f"layer {layer} wants to merge {pairs} pairs {where}, but {tokens} tokens with "
                        f"{count.prefix} CLS form at most {limit}; lower r or the percentages"
                    )
                if not 0 <= fewer < max(1, tokens - pairs - count.prefix):
                    raise ValueError(
                        f"layer {layer} wants {fewer} tokens fewer {where}, but at least 1 of "
                        f"{tokens - pairs - count.prefix} has to stay"
                    )
            if plan.insert < 0 or (plan.pool_prefix and not self.prefix):
                raise ValueError(f"layer {layer} inserts {plan.insert} tokens and pools {self.prefix} CLS: {plan}")
            if not 0 <= plan.gathered <= plan.fewer_after + 1:
                raise ValueError(
                    f"layer {layer} has {plan.fewer_after} tokens fewer after attention, so that at most "
                    f"{plan.fewer_after + 1} of them go into others or a new one; got gathered={plan.gathered}"
                )

    @classmethod
    def identity(
        cls,
        layers: int = 12,
        frames: int = 12,
        tokens: int = 50,
        prefix: int = 1,
        joint: bool = False,
        divided: bool = False,
    ) -> MergeSchedule:
        """No merging: every frame goes through alone with all its tokens, or all frames together if joint."""
        return cls("none", frames, tokens, (LayerPlan(),) * layers, prefix, joint, divided=divided)

    @property
    def whole(self) -> MergeSchedule:
        """That of the same encoder without merging."""
        shape = len(self.plan), self.frames, self.tokens, self.prefix, self.joint, self.divided
        return MergeSchedule.identity(*shape)

    @classmethod
    def tome(
        cls, layers: int = 12, frames: int = 12, tokens: int = 50, r: int = 2, prefix: int = 1, joint: bool = False
    ) -> MergeSchedule:
        """ToMe in every block of every frame; see `tempme_vl.merging.tome.schedule`."""
        method = METHODS["tome"]
        return method.schedule(Encoder(layers, frames, tokens, prefix, joint), method.options(r))

    @classmethod
    def tempme(
        cls,
        layers: int = 12,
        frames: int = 12,
        tokens: int = 50,
        r: int = 2,
        merge_layers: tuple[int, ...] = (8, 9, 10),
        merge_frames: tuple[int, ...] = (2, 2, 3),
        cross_percent: int = 30,
        intra_percent: int = 10,
        prefix: int = 1,
    ) -> MergeSchedule:
        """TempMe's ImgMe and ClipMe; see `tempme_vl.merging.tempme.schedule`."""
        method = METHODS["tempme"]
        options = method.options(r, merge_layers, merge_frames, cross_percent, intra_percent)
        return method.schedule(Encoder(layers, frames, tokens, prefix), options)

    @property
    def clips(self) -> int:
        """C at the start."""
        return 1 if self.joint else self.frames

    @property
    def layer_counts(self) -> list[LayerCount]:
        """Counts at each step of each block."""
        clips, tokens, counts = self.clips, self.input_tokens if self.joint else self.tokens, []
        cls, inserted = self.prefix, 0
        for plan in self.plan:
            join = plan.join or 1
            clips, cls, inserted = clips // join - plan.fewer_clips, cls * join, inserted * join + plan.insert
            joined = tokens * join + plan.insert
            if plan.pool_prefix:
                joined, cls = joined - cls + self.prefix, self.prefix
            attention = joined - plan.before - plan.fewer_before
            mlp = attention - plan.after - plan.fewer_after
            tokens = mlp - plan.fewer_last
            counts.append(LayerCount(clips, cls + inserted, joined, attention, mlp, tokens, inserted))
        return counts

    @property
    def token_counts(self) -> list[tuple[int, int]]:
        """(clips, tokens per clip) after each block."""
        return [(count.clips, count.out) for count in self.layer_counts]

    @property
    def changes(self) -> bool:
        """Whether anything happens to the tokens, or the method does nothing."""
        return any(plan != LayerPlan() for plan in self.plan)

    @property
    def output_tokens(self) -> int:
        """M, tokens that leave the encoder."""
        last = self.layer_counts[-1]
        return _of_video(last.clips, last.out, last.prefix, self.divided)

    @property
    def input_tokens(self) -> int:
        """Tokens of the video in front of the first block."""
        return _of_video(self.frames, self.tokens, self.prefix, self.divided or self.joint)

    @property
    def pooled_prefixes(self) -> int:
        """Prefixes of frames that are left at the end, each of which an embedding is made of where CLS tokens are."""
        last = self.layer_counts[-1]
        return last.clips * (last.prefix - last.inserted) // self.prefix if self.prefix else 0

    @property
    def frame_multiple(self) -> int:
        """Frames must be a multiple of this: the product of all joins."""
        return math.prod(plan.join or 1 for plan in self.plan)

    def gflops(
        self,
        width: int = 768,
        heads: int = 12,
        mlp_ratio: float = 4.0,
        embed_dim: int = 512,
        image_size: int = 224,
        patch_size: int | None = None,
        quick_gelu: bool = True,
        norm_pre: bool = True,
        pool: str | None = None,
        counting: Counting = PAPER,
    ) -> float:
        """Cost of the visual tower for one video in the paper's counting (`tempme_vl.costs`), in 1e9.

        What matching multiplies, the method's record says. The final norm counts for the tokens that pooling reads, the
        projection once a frame, there or not.

        Args:
            embed_dim: 0 without a projection.
            patch_size: pixels; default: from the image size and the number of patch tokens.
            norm_pre: whether a LayerNorm stands before the blocks and the patch embedding has no bias (CLIP).
            pool: "cls", "mean", "attention" or "all" (`TowerShape.pool`); default: "cls" if there is a prefix, else
                "mean". Mean and attention read all tokens but the prefix. Attention pooling counts as a block with one
                query, for every frame, or for every clip that is left where tokens were merged.
            counting: of what there is beside multiply-accumulates (`tempme_vl.costs`).
        """
        method = METHODS[self.method]
        matching = (self.divided and method.divided_matching) or method.matching
        block = BlockCost(width, heads, mlp_ratio, quick_gelu, counting)
        patches = self.tokens - self.prefix
        patch_size = patch_size or round(image_size / math.sqrt(patches))
        total = linear(self.frames * patches, 3 * patch_size**2, width, not norm_pre, counting)
        total += norm(self.frames * self.tokens, width, counting) if norm_pre else 0
        for plan, n in zip(self.plan, self.layer_counts, strict=True):
            if self.divided:
                total += (n.joined - n.prefix) * block.over_time(n.clips + plan.fewer_clips)
            total += n.clips * block.attention(n.attention)
            total += block.mlp(_of_video(n.clips, n.mlp, n.prefix, self.divided))
            total += matching(plan, n, width, width // heads)
        pool = pool or ("cls" if self.prefix else "mean")
        last, cls = self.layer_counts[-1], self.pooled_prefixes
        pooled = {"cls": cls, "all": self.output_tokens}.get(pool, last.clips * (last.out - last.prefix))
        projected = {"cls": cls, "all": 1}.get(pool, self.frames)
        total += norm(pooled, width, counting) + linear(projected, width, embed_dim, False, counting)
        if pool == "attention":
            queries = self.frames if pooled == self.frames * patches else last.clips
            total += linear(pooled, width, 2 * width, counting=counting)  # keys and values
            total += attention(pooled, 1, width, heads, counting)
            total += linear(queries, width, 2 * width, counting=counting) + block.mlp(queries)  # query, proj
        return total / 1e9

    @property
    def guided(self) -> bool:
        """Whether tokens merge with a text in mind, which is given beside each video."""
        return "guidance" in dict(self.settings)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON data; `from_dict` gives the schedule back. What is as by default is left out, but what was always
        written."""
        more = {name: tuple(getattr(plan, name) for plan in self.plan) for name in _MORE}
        saved = _Saved(
            self.method,
            self.frames,
            self.tokens,
            tuple((plan.join, plan.before, plan.after) for plan in self.plan),
            self.prefix,
            self.joint,
            self.proportional,
            dict(self.settings),
            self.divided,
            **{name: values for name, values in more.items() if any(values)},
        )
        return {name: value for name, value in write(saved).items() if value or name not in _MORE}

    @classmethod
    def from_dict(cls, data: object, place: str = "schedule") -> MergeSchedule:
        """What `to_dict` gave.

        Args:
            place: to name in errors.

        Raises:
            ConfigError: anything else, or see `MergeSchedule`.
        """
        return read(_Saved, data, place).schedule


# of a plan, beside [join, before, after]: one value a block each
_MORE = ("pool_prefix", "insert", "fewer_before", "fewer_after", "fewer_last", "fewer_clips", "gathered", "slots")


@dataclass(frozen=True)
class _Saved:
    """The JSON data of a schedule; a step of its plan is [join, before, after]."""

    method: str
    frames: Annotated[int, Range(1, 100_000)]
    tokens: Size
    plan: tuple[tuple[Size | None, Count, Count], ...]
    prefix: Count = 1
    joint: bool = False
    proportional: bool = field(default=True, metadata=LEFT_OUT)
    settings: Mapping[str, Setting] = field(default_factory=dict, metadata=LEFT_OUT)
    divided: bool = field(default=False, metadata=LEFT_OUT)
    pool_prefix: tuple[bool, ...] = ()
    insert: tuple[Count, ...] = ()
    fewer_before: tuple[Count, ...] = ()
    fewer_after: tuple[Count, ...] = ()
    fewer_last: tuple[Count, ...] = ()
    gathered: tuple[Count, ...] = ()
    slots: tuple[Count, ...] = ()
    fewer_clips: tuple[Count, ...] = ()

    def __post_init__(self) -> None:
        if wrong := [name for name in _MORE if len(getattr(self, name)) not in (0, len(self.plan))]:
            raise ValueError(f"expected a value for each of {len(self.plan)} blocks in {', '.join(wrong)}")
        _ = self.schedule

    @property
    def schedule(self) -> MergeSchedule:
        more = {name: getattr(self, name) for name in _MORE if getattr(self, name)}
        plan = tuple(
            LayerPlan(*step, **{name: values[layer] for name, values in more.items()})
            for layer, step in enumerate(self.plan)
        )
        settings = tuple(sorted(self.settings.items()))
        shape = self.frames, self.tokens, plan, self.prefix, self.joint
        return MergeSchedule(self.method, *shape, self.proportional, settings, self.divided)


def _of_video(clips: int, tokens: int, prefix: int, shared: bool) -> int:
    """Tokens of so many clips, which share their prefix or have one each."""
    return clips * (tokens - prefix) + prefix if shared else clips * tokens
