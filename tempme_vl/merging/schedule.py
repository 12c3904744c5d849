"""How many tokens each layer keeps: fixed before the model runs, so counts and costs are plain arithmetic."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Annotated, Any, NamedTuple

from tempme_vl.schema import Count, Range, Size, read


@dataclass(frozen=True)
class LayerPlan:
    """What happens in one block.

    Attributes:
        join: neighbouring clips joined into one before attention; None in a block without a clip step.
        before: pairs merged in each (joined) clip before attention; TempMe's cross-clip merging.
        after: pairs merged in each clip between attention and MLP; ImgMe and intra-clip merging.
    """

    join: int | None = None
    before: int = 0
    after: int = 0


class LayerCount(NamedTuple):
    """Clips of the video and tokens of each clip at the steps of one block."""

    clips: int
    prefix: int
    joined: int  # tokens a clip before the first merge
    attention: int  # tokens a clip in attention
    mlp: int  # tokens a clip in the MLP, and after the block


@dataclass(frozen=True)
class MergeSchedule:
    """The static plan of a merging method for one encoder shape.

    Attributes:
        method: name in `tempme_vl.merging.METHODS`, which builds the modules.
        frames: F.
        tokens: N, tokens of a frame at the start, CLS and registers included.
        plan: one `LayerPlan` a block.
        prefix: P, tokens of a frame that never merge, in front of its patches: CLS, where there is one, and registers.
        joint: all frames are one clip from the start (UMT's joint space-time attention), and not F clips.

    Raises:
        ValueError: frames that the joins do not divide, or more pairs than a clip's tokens can form.
    """

    method: str
    frames: int
    tokens: int
    plan: tuple[LayerPlan, ...]
    prefix: int = 1
    joint: bool = False

    def __post_init__(self) -> None:
        if self.frames < 1 or self.tokens <= self.prefix or not self.plan:
            raise ValueError(
                f"a schedule needs at least 1 frame, 1 patch token and 1 layer; "
                f"got frames={self.frames}, tokens={self.tokens} with {self.prefix} CLS, layers={len(self.plan)}"
            )
        if self.joint and (self.prefix or any(plan.join is not None for plan in self.plan)):
            raise ValueError(
                "a joint encoder's frames are one clip from the start, without CLS tokens of their own: give prefix=0 "
                "and no layers that join clips"
            )
        clips = self.clips
        for layer, plan in enumerate(self.plan):
            join = 1 if plan.join is None else plan.join
            if join < 1 or clips % join:
                joins = [p.join for p in self.plan if p.join is not None]
                raise ValueError(
                    f"layer {layer} joins {join} clips but {clips} are left: {self.frames} frames do not divide by "
                    f"the joins {joins}; make the frames a multiple of {math.prod(joins)}, or change merge_frames"
                )
            clips //= join
        for layer, (plan, count) in enumerate(zip(self.plan, self.layer_counts, strict=True)):
            for name, pairs, tokens in (
                ("before", plan.before, count.joined),
                ("after", plan.after, count.attention),
            ):
                limit = (tokens - count.prefix) // 2
                if not 0 <= pairs <= limit:
                    raise ValueError(
                        f"layer {layer} wants to merge {pairs} pairs {name} attention, but {tokens} tokens with "
                        f"{count.prefix} CLS form at most {limit}; lower r or the percentages"
                    )

    @classmethod
    def identity(
        cls, layers: int = 12, frames: int = 12, tokens: int = 50, prefix: int = 1, joint: bool = False
    ) -> MergeSchedule:
        """No merging: every frame goes through alone with all its tokens, or all frames together if joint."""
        return cls("none", frames, tokens, (LayerPlan(),) * layers, prefix, joint)

    @classmethod
    def tome(
        cls, layers: int = 12, frames: int = 12, tokens: int = 50, r: int = 2, prefix: int = 1, joint: bool = False
    ) -> MergeSchedule:
        """ToMe in every block of every frame; see `tempme_vl.merging.tome.schedule`."""
        from tempme_vl.merging import Encoder, tome

        return tome.schedule(Encoder(layers, frames, tokens, prefix, joint), tome.Options(r))

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
        from tempme_vl.merging import Encoder, tempme

        options = tempme.Options(r, merge_layers, merge_frames, cross_percent, intra_percent)
        return tempme.schedule(Encoder(layers, frames, tokens, prefix), options)

    @property
    def clips(self) -> int:
        """C at the start."""
        return 1 if self.joint else self.frames

    @property
    def layer_counts(self) -> list[LayerCount]:
        """Counts at each step of each block."""
        clips, tokens, prefix, counts = self.clips, self.tokens * (self.frames // self.clips), self.prefix, []
        for plan in self.plan:
            join = plan.join or 1
            clips, joined, prefix = clips // join, tokens * join, prefix * join
            attention = joined - plan.before
            tokens = attention - plan.after
            counts.append(LayerCount(clips, prefix, joined, attention, tokens))
        return counts

    @property
    def token_counts(self) -> list[tuple[int, int]]:
        """(clips, tokens per clip) after each block."""
        return [(count.clips, count.mlp) for count in self.layer_counts]

    @property
    def output_tokens(self) -> int:
        """M, tokens that leave the encoder."""
        clips, tokens = self.token_counts[-1]
        return clips * tokens

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
    ) -> float:
        """Cost of the visual tower for one video in the paper's counting, in 1e9.

        Multiply-accumulates of convolution, linear layers, attention and matching count 1; softmax 1 an element,
        LayerNorm 2, GELU 1 (QuickGELU 2), a bias addition 1. The final norm counts for the tokens that pooling reads,
        the projection once a frame, there or not. This convention gives all 12-frame rows of the paper's tables within
        0.2%.

        Args:
            patch_size: pixels; default: from the image size and the number of patch tokens.
            norm_pre: whether a LayerNorm stands before the blocks and the patch embedding has no bias (CLIP).
            pool: "cls", "mean" or "attention" (`TowerShape.pool`); default: "cls" if there is a prefix, else "mean".
                The last two read all tokens but the prefix. Attention pooling counts as a block with one query, for
                every frame, or for every clip that is left where tokens were merged.
        """
        patches = self.tokens - self.prefix
        patch_size = patch_size or round(image_size / math.sqrt(patches))
        mlp_width = int(width * mlp_ratio)
        mlp = 2 * width + 2 * width * mlp_width + mlp_width + width  # of one token, with its norm and biases
        mlp += mlp_width * (2 if quick_gelu else 1)
        total = self.frames * patches * width * 3 * patch_size**2
        total += self.frames * (self.tokens * 2 * width if norm_pre else patches * width)
        for plan, n in zip(self.plan, self.layer_counts, strict=True):
            attention = n.attention * (2 * width + 4 * width**2 + 4 * width)  # norm, qkv and proj, biases
            attention += n.attention**2 * (2 * width + heads)  # scores and values, softmax
            matching = _pairs_compared(n.joined - n.prefix) * width if plan.before else 0
            matching += _pairs_compared(n.attention - n.prefix) * (width // heads) if plan.after else 0
            total += n.clips * (attention + n.mlp * mlp + matching)
        pool = pool or ("cls" if self.prefix else "mean")
        last = self.layer_counts[-1]
        pooled = self.frames if pool == "cls" else last.clips * (last.mlp - last.prefix)
        total += pooled * 2 * width + self.frames * width * embed_dim
        if pool == "attention":
            merged = any(plan.before or plan.after for plan in self.plan)
            queries = last.clips if merged else self.frames
            total += pooled * (2 * width**2 + 2 * width)  # keys and values
            total += pooled * (2 * width + heads)  # scores and values, softmax
            total += queries * (2 * width**2 + 2 * width + mlp)  # query, proj
        return total / 1e9

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON data; `from_dict` gives the schedule back."""
        data = asdict(self)
        data["plan"] = [[p.join, p.before, p.after] for p in self.plan]
        return data

    @classmethod
    def from_dict(cls, data: object, place: str = "schedule") -> MergeSchedule:
        """What `to_dict` gave.

        Args:
            place: to name in errors.

        Raises:
            ConfigError: anything else, or see `MergeSchedule`.
        """
        return read(_Saved, data, place).schedule


@dataclass(frozen=True)
class _Saved:
    """The JSON data of a schedule; a step of its plan is [join, before, after]."""

    method: str
    frames: Annotated[int, Range(1, 100_000)]
    tokens: Size
    plan: tuple[tuple[Size | None, Count, Count], ...]
    prefix: Count = 1
    joint: bool = False

    def __post_init__(self) -> None:
        _ = self.schedule

    @property
    def schedule(self) -> MergeSchedule:
        plan = tuple(LayerPlan(*step) for step in self.plan)
        return MergeSchedule(self.method, self.frames, self.tokens, plan, self.prefix, self.joint)


def _pairs_compared(patches: int) -> int:
    return (patches // 2) * (patches - patches // 2)
