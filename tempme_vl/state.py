"""The values that flow through the front end.

Letters used for shapes, here and in every tensor file of the package:

    B  videos in the batch             N  tokens of one clip, CLS tokens in front
    F  frames of a video               M  tokens of a whole video, M = C * N
    C  clips of a video (F at first)   S  input tokens a clip stands for
    D  width of the tower              E  width of the projected embedding
    P  CLS tokens of one clip          H, W  pixels
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields, replace

import torch
from einops import rearrange
from torch import Tensor
from torch.export import register_dataclass

from tempme_vl.matching import MergeMap, follow, take
from tempme_vl.precision import at_least_float32

# A weight may be zero or less, as DiffRate's of a token that takes in its opposite; its logarithm is to be finite.
LEAST_WEIGHT = 1e-9


@dataclass(frozen=True)
class AttentionContext:
    """What a step may compare tokens by, or judge them by, computed when it asks.

    Between attention and MLP this is the attention that the block has just run, and fused attention has kept none of
    its matrix: what a step wants of that is computed anew, in at least float32 and exactly the softmax that ran, but
    for dropout. Where no attention has run (before it, and behind a tower), the tokens themselves are the keys, as one
    head.

    Attributes:
        keys: (R, heads, N, D_head), after their norm where a tower has one.
        queries: (R, heads, N, D_head), or None where no attention has run.
        bias: (R, 1, 1, N) on the keys, as `TokenState.attention_bias` gives it, or None.
        scale: of the logits; None for D_head ** -0.5.
        other_keys: (R, heads, n, D_head) of what was attended to beside the tokens, such as prompts, each as one key;
            or None. Nothing merges it, but it has its share of every row.
    """

    keys: Tensor
    queries: Tensor | None = None
    bias: Tensor | None = None
    scale: float | None = None
    other_keys: Tensor | None = None

    @classmethod
    def of_tokens(cls, x: Tensor) -> AttentionContext:
        """Tokens (R, N, D) that no attention has seen."""
        return cls(x.unsqueeze(1))

    def without_last(self, others: int) -> AttentionContext:
        """The same attention, its last keys and queries those of no tokens."""
        assert self.queries is not None and self.other_keys is None
        keys, other_keys = self.keys[:, :, :-others], self.keys[:, :, -others:]
        bias = None if self.bias is None else self.bias[..., :-others]
        return AttentionContext(keys, self.queries[:, :, :-others], bias, self.scale, other_keys)

    def features(self) -> Tensor:
        """(R, N, D_head) keys averaged over heads, without gradient: what ToMe and TempMe compare tokens by."""
        keys = self.keys.detach()
        return keys.squeeze(1) if keys.shape[1] == 1 else keys.mean(1)

    def rows(self, first: int, last: int) -> Tensor:
        """(R, heads, last - first, N) float: how the queries first..last-1 attend; with gradient.

        With 0 and P these are the rows of the CLS tokens; the N x N matrix is never made.

        Raises:
            ValueError: no attention has run.
        """
        if self.queries is None:
            raise ValueError(
                "this method reads attention, and none has run here: it can only stand between attention and MLP of a "
                "tower's blocks"
            )
        with torch.autocast(self.keys.device.type, enabled=False):
            queries, keys = at_least_float32(self.queries[:, :, first:last]), at_least_float32(self.keys)
            scale = queries.shape[-1] ** -0.5 if self.scale is None else self.scale
            logits = (queries * scale) @ keys.transpose(-1, -2)
            logits = logits if self.bias is None else logits + self.bias
            if self.other_keys is None:
                return logits.softmax(-1)
            others = (queries * scale) @ at_least_float32(self.other_keys).transpose(-1, -2)
            return torch.cat([logits, others], -1).softmax(-1)[..., : keys.shape[2]]

    def column_sums(self, diagonal: bool = True, chunk: int = 128) -> Tensor:
        """(R, heads, N) float: how much attention each token gets from all queries together, without gradient.

        Args:
            diagonal: whether what a token gives itself counts.
            chunk: queries whose rows are in memory at a time.

        Raises:
            ValueError: see `rows`.
        """
        with torch.no_grad():
            tokens = self.keys.shape[2]
            total = torch.zeros_like(self.keys[..., 0], dtype=torch.promote_types(self.keys.dtype, torch.float32))
            for first in range(0, tokens, chunk):
                rows = self.rows(first, min(first + chunk, tokens))
                total += rows.sum(2)
                if not diagonal:
                    last = first + rows.shape[2]
                    total[:, :, first:last] -= rows.diagonal(first, -2, -1)
        return total


@dataclass(frozen=True)
class TokenState:
    """Tokens between two steps of the encoder. Immutable: a step returns a new state.

    Sizes and what `source` says belong together: a clip's sizes sum to the input tokens that it still holds and its
    inserted tokens, and S minus the former were dropped.

    Attributes:
        x: (B*C, N, D) tokens; within a clip its P prefix tokens come first: those of its frames in order, each a CLS
            token and registers, then inserted ones.
        size: (B*C, N, 1) float, how many input tokens each token holds; 1 for an inserted one.
        num_clips: C. Per-frame encoders start at C = F, a joint space-time encoder at C = 1.
        num_prefix: P, the tokens of one clip that never merge.
        merged: False as long as every size is 1, known without looking at the tensor.
        source: (B*C, S) int64 when traced: which of the clip's N tokens holds each input token, the clip's
            frames in order and the tokens of a frame in order; -1 for a token that a method dropped. Where clips have
            merged S are all input tokens of the video, and -1 is also for what other clips hold.
        num_inserted: those of the P tokens that no input is in, such as prompts; the last of them.
        proportional: whether a token counts in attention as many times as its size.
        origin: (B*C, N) int64 when traced: the input token of 0..S-1 that each token continues, and thereby its place
            in the clip; -1 for one that is made of several or of none.
        weight: (B*C, N, 1) float, as how many tokens each counts in attention, where that is not its size; else None.
        clip_of: (B, F) int64, the clip that holds each frame, -1 for a dropped one; None where clips hold equally many
            neighbouring frames, as long as none has merged with another.
        frame_mask: (B, F), nonzero for real frames, or None where all are.
        video_tokens: (B, G, D) tokens of whole videos that a tuning adds; they belong to no clip, and hold no input.
        guide: (B, D), the direction among tokens that leads to a text (`tempme_vl.outputs.direction_of`); None without.
    """

    x: Tensor
    size: Tensor
    num_clips: int
    num_prefix: int
    merged: bool = False
    source: Tensor | None = None
    num_inserted: int = 0
    proportional: bool = True
    origin: Tensor | None = None
    weight: Tensor | None = None
    clip_of: Tensor | None = None
    frame_mask: Tensor | None = None
    video_tokens: Tensor | None = None
    guide: Tensor | None = None

    @classmethod
    def start(
        cls,
        x: Tensor,
        num_clips: int,
        num_prefix: int,
        trace_source: bool = False,
        proportional: bool = True,
        frame_mask: Tensor | None = None,
        guide: Tensor | None = None,
    ) -> TokenState:
        """The state before the first block: every token stands for itself.

        Args:
            x: (B*C, N, D) embedded tokens.
        """
        rows, tokens, _ = x.shape
        # half precision cannot count to 600 tokens exactly
        dtype = torch.promote_types(x.dtype, torch.float32)
        size = torch.ones(rows, tokens, 1, dtype=dtype, device=x.device)
        source = torch.arange(tokens, device=x.device).expand(rows, -1) if trace_source else None
        return cls(
            *(x, size, num_clips, num_prefix),
            source=source,
            proportional=proportional,
            origin=source,
            frame_mask=frame_mask,
            guide=guide,
        )

    @property
    def attention_bias(self) -> Tensor | None:
        """(B*C, 1, 1, N) log(size), or of the weight where there is one, for the key logits (proportional attention);
        None while all sizes are 1."""
        counted = self.size if self.weight is None else self.weight.clamp(min=LEAST_WEIGHT)
        return counted.log().transpose(1, 2).unsqueeze(1) if self.merged and self.proportional else None

    def add(self, delta: Tensor) -> TokenState:
        """The state after a residual branch: x + delta, delta (B*C, N, D)."""
        return replace(self, x=self.x + delta)

    def regroup(
        self,
        x: Tensor,
        size: Tensor,
        assignment: Callable[[], Tensor],
        base: Callable[[], Tensor],
        weight: Tensor | None = None,
    ) -> TokenState:
        """The state after tokens became others: merged, clustered, dropped or put in another order.

        Args:
            x: (B*C, N', D) the new tokens.
            size: (B*C, N', 1) input tokens that each holds; they need not be 1 afterwards.
            assignment: gives (B*C, N) int64, the new token that holds each old one, -1 for none. Called where sources
                are traced.
            base: gives (B*C, N') int64, the old token that each new one continues, -1 for none. Called likewise.
            weight: (B*C, N', 1), as how many tokens each counts in attention; default: its size.
        """
        source, origin = self.source, self.origin
        if source is not None:
            source = follow(source, assignment())
        if origin is not None:
            origin = follow(base(), origin)
        return replace(self, x=x, size=size, source=source, origin=origin, merged=True, weight=weight)

    def keep(self, patches: Tensor, fused: Tensor | None = None) -> TokenState:
        """Drops all patch tokens but some; the prefix stays in front of them.

        Args:
            patches: (B*C, K) int64, the numbers among the clip's N tokens of those that stay, in their new order.
            fused: (B*C, 1, D), a token behind them that holds all others, as EViT's: nothing is dropped then.
        """
        rows, tokens, _ = self.x.shape
        prefix = torch.arange(self.num_prefix, device=patches.device).expand(rows, -1)
        kept = torch.cat([prefix, patches], dim=1)

        def counted(values: Tensor) -> Tensor:
            """Those of the kept tokens, and behind them the sum of all others if they become one."""
            left = take(values, kept)
            if fused is None:
                return left
            return torch.cat([left, values.sum(1, keepdim=True) - left.sum(1, keepdim=True)], dim=1)

        x, size = take(self.x, kept), counted(self.size)
        weight = None if self.weight is None else counted(self.weight)
        if fused is not None:
            x = torch.cat([x, fused.to(x.dtype)], dim=1)

        def assignment() -> Tensor:
            other = kept.new_full((rows, tokens), -1 if fused is None else kept.shape[1])
            return other.scatter(1, kept, torch.arange(kept.shape[1], device=kept.device).expand(rows, -1))

        def base() -> Tensor:
            return kept if fused is None else torch.cat([kept, kept.new_full((rows, 1), -1)], dim=1)

        return replace(self.regroup(x, size, assignment, base, weight), merged=self.merged or fused is not None)

    def insert(self, tokens: Tensor) -> TokenState:
        """Puts tokens that hold no input, such as prompts, at the end of the prefix; they never merge.

        Args:
            tokens: (B*C, K, D).
        """
        at, more = self.num_prefix, tokens.shape[1]
        x = torch.cat([self.x[:, :at], tokens.to(self.x.dtype), self.x[:, at:]], dim=1)

        def with_ones(values: Tensor) -> Tensor:
            return torch.cat([values[:, :at], torch.ones_like(values[:, :1]).expand(-1, more, -1), values[:, at:]], 1)

        size, weight = with_ones(self.size), None if self.weight is None else with_ones(self.weight)
        source, origin = self.source, self.origin
        if source is not None:
            source = torch.where(source >= at, source + more, source)
        if origin is not None:
            origin = torch.cat([origin[:, :at], origin.new_full((len(origin), more), -1), origin[:, at:]], dim=1)
        prefix, inserted = at + more, self.num_inserted + more
        return replace(
            self,
            x=x,
            size=size,
            source=source,
            origin=origin,
            num_prefix=prefix,
            num_inserted=inserted,
            weight=weight,
        )

    def join_clips(self, num_joined: int) -> TokenState:
        """Joins each `num_joined` neighbouring clips into one (paper section 3.2).

        The new clip holds all CLS tokens in clip order, then inserted tokens and then all patch tokens likewise.
        """
        f = num_joined
        if f == 1:
            return self
        assert self.num_clips % f == 0, (self.num_clips, f)
        parts = self.num_prefix - self.num_inserted, self.num_inserted, self.x.shape[1] - self.num_prefix
        source, origin = self.source, self.origin
        if source is not None and origin is not None:
            first = torch.arange(f, device=source.device).repeat(len(source) // f) * source.shape[1]
            origin = torch.where(origin < 0, origin, origin + first.unsqueeze(1))
            origin = _join(origin.unsqueeze(-1), f, parts).squeeze(-1)
        if source is not None:
            source = _joined_source(source, f, parts)
        return replace(
            self,
            x=_join(self.x, f, parts),
            size=_join(self.size, f, parts),
            source=source,
            origin=origin,
            num_clips=self.num_clips // f,
            num_prefix=self.num_prefix * f,
            num_inserted=self.num_inserted * f,
            weight=None if self.weight is None else _join(self.weight, f, parts),
        )

    def merge_clips(self, merge: MergeMap) -> TokenState:
        """Merges whole clips, each token with those at its place, CLS tokens too, by means weighted with sizes.

        Args:
            merge: of the C clips of each video.
        """
        x, size = (t.unflatten(0, (-1, self.num_clips)) for t in (self.x, self.size))
        summed = merge.sum(size.flatten(2)).unflatten(2, size.shape[2:])
        x = (merge.sum((x * size).flatten(2)).unflatten(2, x.shape[2:]) / summed).to(self.x.dtype)
        return replace(self._regroup_clips(x, summed, merge.assignment, merge.base), merged=True)

    def keep_clips(self, kept: Tensor) -> TokenState:
        """Drops all clips but some.

        Args:
            kept: (B, C') int64, the numbers among the C clips of those that stay, in their new order.
        """
        x, size = (t.unflatten(0, (-1, self.num_clips)) for t in (self.x, self.size))
        x, size = (t.take_along_dim(kept[:, :, None, None], 1) for t in (x, size))
        places = torch.arange(kept.shape[1], device=kept.device).expand(kept.shape)
        return self._regroup_clips(
            x, size, kept.new_full((len(kept), self.num_clips), -1).scatter(1, kept, places), kept
        )

    def _regroup_clips(self, x: Tensor, size: Tensor, assignment: Tensor, base: Tensor) -> TokenState:
        """The state of the clips (B, C', N, D) and (B, C', N, 1) that others became; see `regroup`."""
        assert not self.num_inserted and self.weight is None
        videos, clips = assignment.shape
        first, left = self.clip_of is None, base.shape[1]
        clip_of = torch.arange(clips, device=base.device).expand(videos, -1) if self.clip_of is None else self.clip_of
        source, origin = self.source, self.origin
        if source is not None and origin is not None:
            inputs, number = source.shape[1], torch.arange(clips, device=source.device)
            source, origin = source.unflatten(0, (videos, clips)), origin.unflatten(0, (videos, clips))
            if first:  # of a clip: now of the video
                own = (number.unsqueeze(1) == number).unsqueeze(2)
                source = torch.where(own, source.unsqueeze(2), -1).flatten(2)
                origin = torch.where(origin < 0, origin, origin + inputs * number.unsqueeze(1))
            into = torch.where(assignment < 0, left, assignment).unsqueeze(2).expand_as(source)
            nobody = source.new_full((videos, left + 1, source.shape[2]), -1)
            source = nobody.scatter_reduce(1, into, source, "amax")[:, :left].flatten(0, 1)
            origin = origin.take_along_dim(base.unsqueeze(2), 1).flatten(0, 1)
        state = replace(self, x=x.flatten(0, 1), size=size.flatten(0, 1), source=source, origin=origin)
        return replace(state, num_clips=left, clip_of=follow(clip_of, assignment))

    def pool_prefix(self, num_frames: int) -> TokenState:
        """Makes the CLS tokens and registers of so many frames those of one, by their mean weighted with sizes.

        Where a clip's frames are no longer told apart (CenterCLIP's segments); the clip counts as one frame then.

        Args:
            num_frames: all frames whose prefix the clip has.
        """
        rows, tokens, _ = self.x.shape
        own = self.num_prefix - self.num_inserted
        one = own // num_frames
        size = self.size[:, :own].unflatten(1, (num_frames, one))
        summed = size.sum(1)
        x = ((self.x[:, :own].unflatten(1, (num_frames, one)) * size).sum(1) / summed).to(self.x.dtype)
        weight = self.weight
        if weight is not None:
            weight = torch.cat([weight[:, :own].unflatten(1, (num_frames, one)).sum(1), weight[:, own:]], 1)

        def assignment() -> Tensor:
            number = torch.arange(tokens, device=self.x.device)
            return torch.where(number < own, number % one, number - own + one).expand(rows, -1)

        def base() -> Tensor:
            number = torch.arange(tokens - own + one, device=self.x.device)
            return torch.where(number < one, -1, number + own - one).expand(rows, -1)

        state = self.regroup(
            torch.cat([x, self.x[:, own:]], 1), torch.cat([summed, self.size[:, own:]], 1), assignment, base, weight
        )
        return replace(state, num_prefix=self.num_prefix - own + one)


def _join(x: Tensor, f: int, parts: tuple[int, ...]) -> Tensor:
    """(R*f, N, D) -> (R, f*N, D): the f clips' first part of their tokens, then the second, and so on."""
    split = [part for part in x.split(parts, 1) if part.shape[1]]
    return torch.cat([rearrange(part, "(r f) n d -> r (f n) d", f=f) for part in split], dim=1)


def _joined_source(source: Tensor, f: int, parts: tuple[int, int, int]) -> Tensor:
    """(R*f, S) -> (R, f*S): token numbers of each clip become those of the joined clip. Inserted tokens hold none."""
    cls, inserted, patches = parts
    source = source.unflatten(0, (-1, f))
    clip = torch.arange(f, device=source.device).view(1, f, 1)
    prefix = cls + inserted
    joined = torch.where(source < cls, clip * cls + source, f * prefix + clip * patches + source - prefix)
    return torch.where(source < 0, source, joined).flatten(1, 2)


@dataclass(frozen=True)
class FrontendOutput:
    """What a `VisualFrontend` makes of a batch of videos.

    Attributes:
        tokens: (B, M, D) merged tokens before the final norm; clips in order, CLS tokens first in each clip.
        pooled: (B, E) masked mean of the L2-normalised frame embeddings, not normalised again.
        size: (B, M, 1) float, input tokens held by each token; sums to the number of input tokens, less those that a
            method dropped and more the tokens that it inserted.
        frames: (B, F, E) projected CLS token (or mean of the tokens) of each frame, not normalised; (B, C, E) for
            a tower without CLS tokens whose clips hold several frames.
        source: (B, F*N0) int64 when traced: the output token (0..M-1) that holds each input token, frames
            in order and N0 input tokens a frame (CLS first); -1 for one that was dropped. Else None.
        frames_mask: (B, F), or (B, C), bool: which of `frames` stand for a real frame; None where all do.
    """

    tokens: Tensor
    pooled: Tensor
    size: Tensor
    frames: Tensor
    source: Tensor | None = None
    frames_mask: Tensor | None = None

    def __repr__(self) -> str:
        given = {field.name: getattr(self, field.name) for field in fields(self)}
        parts = (f"{name}={_shown(value)}" for name, value in given.items() if value is not None)
        return f"{type(self).__name__}({', '.join(parts)})"


def _shown(value: object) -> str:
    """A tensor's shape, dtype and device, not its numbers."""
    if not isinstance(value, Tensor):
        return repr(value)
    return f"{tuple(value.shape)} {str(value.dtype).removeprefix('torch.')} on {value.device}"


# so that what takes modules apart knows the tensors inside: torch.export, and whatever maps a function over outputs
register_dataclass(FrontendOutput, serialized_type_name="tempme_vl.FrontendOutput")
