"""The values that flow through the front end.

Letters used for shapes, here and in every tensor file of the package:

    B  videos in the batch             N  tokens of one clip, CLS tokens in front
    F  frames of a video               M  tokens of a whole video, M = C * N
    C  clips of a video (F at first)   S  input tokens a clip stands for
    D  width of the tower              E  width of the projected embedding
    P  CLS tokens of one clip          H, W  pixels
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace

import torch
from einops import rearrange
from torch import Tensor
from torch.export import register_dataclass


def at_least_float32(x: Tensor) -> Tensor:
    """Half precision becomes float32; float32 and float64 stay."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


@dataclass(frozen=True)
class TokenState:
    """Tokens between two steps of the encoder. Immutable: a step returns a new state.

    Attributes:
        x: (B*C, N, D) tokens; within a clip its P CLS tokens come first.
        size: (B*C, N, 1) float, how many input tokens each token holds. Each clip's sizes sum to S.
        num_clips: C. Per-frame encoders start at C = F, a joint space-time encoder at C = 1.
        num_prefix: P, the CLS tokens of one clip; they never merge.
        merged: False as long as every size is 1, known without looking at the tensor.
        source: (B*C, S) int64 when traced: which of the clip's N tokens holds each input token, the clip's
            frames in order and the tokens of a frame in order; -1 for a token that a method dropped.
    """

    x: Tensor
    size: Tensor
    num_clips: int
    num_prefix: int
    merged: bool = False
    source: Tensor | None = None

    @classmethod
    def start(cls, x: Tensor, num_clips: int, num_prefix: int, trace_source: bool = False) -> TokenState:
        """The state before the first block: every token stands for itself.

        Args:
            x: (B*C, N, D) embedded tokens.
        """
        rows, tokens, _ = x.shape
        # half precision cannot count to 600 tokens exactly
        dtype = torch.promote_types(x.dtype, torch.float32)
        size = torch.ones(rows, tokens, 1, dtype=dtype, device=x.device)
        source = torch.arange(tokens, device=x.device).expand(rows, -1) if trace_source else None
        return cls(x, size, num_clips, num_prefix, source=source)

    @property
    def attention_bias(self) -> Tensor | None:
        """(B*C, 1, 1, N) log(size) for the key logits (proportional attention); None while all sizes are 1."""
        return self.size.log().transpose(1, 2).unsqueeze(1) if self.merged else None

    def add(self, delta: Tensor) -> TokenState:
        """The state after a residual branch: x + delta, delta (B*C, N, D)."""
        return replace(self, x=self.x + delta)

    def join_clips(self, num_joined: int) -> TokenState:
        """Joins each `num_joined` neighbouring clips into one (paper section 3.2).

        The new clip holds all CLS tokens in clip order, then all patch tokens in clip order.
        """
        f = num_joined
        if f == 1:
            return self
        assert self.num_clips % f == 0, (self.num_clips, f)
        source = self.source
        if source is not None:
            source = _joined_source(source, f, self.x.shape[1], self.num_prefix)
        return replace(
            self,
            x=_join(self.x, f, self.num_prefix),
            size=_join(self.size, f, self.num_prefix),
            source=source,
            num_clips=self.num_clips // f,
            num_prefix=self.num_prefix * f,
        )


def _join(x: Tensor, f: int, num_prefix: int) -> Tensor:
    """(R*f, N, D) -> (R, f*N, D): the f clips' CLS tokens, then their patches."""
    cls, patches = x[:, :num_prefix], x[:, num_prefix:]
    return torch.cat([rearrange(part, "(r f) n d -> r (f n) d", f=f) for part in (cls, patches)], dim=1)


def _joined_source(source: Tensor, f: int, num_tokens: int, num_prefix: int) -> Tensor:
    """(R*f, S) -> (R, f*S): token numbers of each clip become those of the joined clip."""
    source = source.unflatten(0, (-1, f))
    clip = torch.arange(f, device=source.device).view(1, f, 1)
    num_patches = num_tokens - num_prefix
    is_cls = source < num_prefix
    joined = torch.where(is_cls, clip * num_prefix + source, f * num_prefix + clip * num_patches + source - num_prefix)
    return torch.where(source < 0, source, joined).flatten(1, 2)


@dataclass(frozen=True)
class FrontendOutput:
    """What a `VisualFrontend` makes of a batch of videos.

    Attributes:
        tokens: (B, M, D) merged tokens before the final norm; clips in order, CLS tokens first in each clip.
        pooled: (B, E) masked mean of the L2-normalised frame embeddings, not normalised again.
        size: (B, M, 1) float, input tokens held by each token; sums to the number of input tokens.
        frames: (B, F, E) projected CLS token (or mean of the tokens) of each frame, not normalised; (B, C, E) for
            a tower without CLS tokens whose clips hold several frames.
        source: (B, F*N0) int64 when traced: the output token (0..M-1) that holds each input token, frames
            in order and N0 input tokens a frame (CLS first); -1 for one that was dropped. Else None.
    """

    tokens: Tensor
    pooled: Tensor
    size: Tensor
    frames: Tensor
    source: Tensor | None = None

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
