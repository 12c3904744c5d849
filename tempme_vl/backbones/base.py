"""What the front end needs of an encoder, whatever library it comes from.

A backbone is four called modules (`embed`, `blocks`, `norm`, `head`) and its shape. Nobody reads another module's
parameters: ZeRO-3 gathers them when a module is called, and LoRA replaces children.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Annotated, Any, Literal, Protocol, TypeVar

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from tempme_vl import kernels
from tempme_vl.backbones.attention import attend
from tempme_vl.backbones.linear import use_onednn
from tempme_vl.costs import BlockCost
from tempme_vl.schema import Range, Size, write
from tempme_vl.state import AttentionContext, TokenState

Pool = Literal["cls", "mean", "attention", "all"]
_Shade = Annotated[float, Range(-1000, 1000)]
_Deviation = Annotated[float, Range(1e-6, 1000)]

# of red, green and blue: what OpenAI's CLIP and models of ImageNet were trained on
CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


@dataclass(frozen=True)
class TowerShape:
    """The numbers of a ViT that counting and checking need; sizes in pixels.

    `num_prefix`: tokens in front of a frame's patches that never merge: the CLS token first, where there is one, and
    registers. `joint`: all frames' tokens attend together from the first block on (a space-time ViT). `divided`: see
    `tempme_vl.merging.MergeSchedule`. `pool`: what `Backbone.head` gets; None for the CLS token where there are such
    tokens, else the mean of the others; "all" for the mean of all of a video's tokens, as they are counted there.
    """

    image_size: int
    patch_size: int
    width: int
    heads: int
    embed_dim: int
    mlp_ratio: float = 4.0
    quick_gelu: bool = False
    norm_pre: bool = True
    num_prefix: int = 1
    joint: bool = False
    pool: Pool | None = None
    divided: bool = False

    @property
    def tokens(self) -> int:
        """N, tokens of one frame, CLS included."""
        return (self.image_size // self.patch_size) ** 2 + self.num_prefix

    @property
    def pooling(self) -> Pool:
        """`pool`, or what it is by default."""
        return self.pool or ("cls" if self.num_prefix else "mean")

    @property
    def block(self) -> BlockCost:
        """What its blocks cost."""
        return BlockCost(self.width, self.heads, self.mlp_ratio, self.quick_gelu)


@dataclass(frozen=True)
class Preprocessing:
    """What a configuration says of the pixels that a tower takes; `tempme_vl.data.transforms.Preprocess` does it."""

    image_size: Size
    mean: tuple[_Shade, _Shade, _Shade]
    std: tuple[_Deviation, _Deviation, _Deviation]
    resize: Literal["shortest", "squash"]
    interpolation: Literal["bicubic", "bilinear"]


@dataclass(frozen=True, kw_only=True)
class TowerConfig:
    """What builds a tower again (`Family.build_tower`), as folders hold it (`tempme_vl.schema`).

    A family derives its own class, which says what else there is and within which bounds.
    """

    family: str
    preprocess: Preprocessing

    def to_dict(self) -> dict[str, Any]:
        """JSON data. peft before 0.18 asks the configuration of any model for it."""
        return write(self)


class QueryValueBias(nn.Module):
    """A bias for queries and values and none for keys (BEiT, UMT): (..., 3 D) -> (..., 3 D).

    Not a full bias that starts at zero for the keys: softmax hides it, so its gradient is rounding noise, which Adam
    turns into steps of full size, and the keys are what tokens are matched by.
    """

    def __init__(self, width: int):
        super().__init__()
        self.q, self.v = nn.Parameter(torch.zeros(width)), nn.Parameter(torch.zeros(width))

    def forward(self, qkv: Tensor) -> Tensor:
        return qkv + torch.cat([self.q, torch.zeros_like(self.q), self.v]).to(qkv.dtype)


class SelfAttention(nn.Module):
    """Multi-head self-attention on plain Linear children, so that peft's LoRA on `qkv` just works.

    Args:
        key_bias: False for queries and values with a bias and keys without.
    """

    def __init__(self, width: int, heads: int, key_bias: bool = True):
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width, bias=key_bias)
        self.bias = nn.Identity() if key_bias else QueryValueBias(width)
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor, bias: Tensor | None = None) -> tuple[Tensor, AttentionContext]:
        """Args:
            x: (R, N, D) tokens.
            bias: on the keys, (R, 1, 1, N), or None.

        Returns:
            the attended tokens (R, N, D), and what attended to them.
        """
        q, k, v = self.project(x)
        return self.proj(attend(q, k, v, bias)), AttentionContext(k, q, bias)

    def project(self, x: Tensor) -> Tensor:
        """(R, N, D) tokens -> (3, R, heads, N, D_head) queries, keys and values."""
        return self.bias(self.qkv(x)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)


class PatchProjection(nn.Conv2d):
    """A convolution whose windows do not overlap, on a GPU as one product of matrices.

    cuDNN takes 5.6 of the 84 ms of a ViT-B/16 in bfloat16 for it (H100, docs/benchmarks.md).
    """

    @classmethod
    def of(cls, conv: nn.Conv2d) -> nn.Conv2d:
        """The same on the parameters of a convolution; one whose windows overlap or leave gaps comes back as it is."""
        height, width = conv.kernel_size
        if conv.stride != (height, width) or conv.padding != (0, 0) or conv.dilation != (1, 1) or conv.groups != 1:
            return conv
        patch = (height, width)
        own = cls(conv.in_channels, conv.out_channels, patch, patch, bias=conv.bias is not None, device="meta")
        own.weight, own.bias = conv.weight, conv.bias
        return own

    def forward(self, images: Tensor) -> Tensor:
        if not images.is_cuda:
            return super().forward(images)
        height, width = self.kernel_size
        rows, columns = images.shape[-2] // height, images.shape[-1] // width
        whole = images[..., : rows * height, : columns * width]  # as a convolution leaves out the rest
        patches = rearrange(whole, "n c (y h) (x w) -> n (y x) (c h w)", h=height, w=width)
        projected = F.linear(patches, self.weight.flatten(1), self.bias)
        return rearrange(projected, "n (y x) d -> n d y x", x=columns)


class QuickGELU(nn.Module):
    """x * sigmoid(1.702 x), bit for bit the usual one, with one temporary instead of three, and x alone kept for the
    gradient.

    The activations of the widest layer are worth it: on CPU their allocation costs more than the arithmetic.
    """

    def forward(self, x: Tensor) -> Tensor:
        if kernels.usable(x):
            from tempme_vl.kernels.activation import quick_gelu

            return quick_gelu(x)
        if not torch.is_grad_enabled():
            return (1.702 * x).sigmoid_().mul_(x)
        if not x.requires_grad or torch.compiler.is_compiling() or torch.jit.is_tracing():
            return _gated(x)  # a compiler chooses by itself what it computes twice
        return _Gated.apply(x)


def _gated(x: Tensor) -> Tensor:
    gate = (1.702 * x).sigmoid_()
    return gate * x


class _Gated(torch.autograd.Function):
    """`_gated`, which keeps its input alone for the gradient and computes the gate anew: of 19 numbers that a CLIP
    block keeps for each of a token's, the gate and its input were 4 each (docs/LOG.md)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return (1.702 * x).sigmoid_().mul_(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        twice = torch.is_grad_enabled()  # there will be a second derivative
        with torch.enable_grad():
            own = x if twice else x.detach().requires_grad_()
            return torch.autograd.grad(_gated(own), own, grad, create_graph=twice)[0]


class DropPath(nn.Module):
    """Stochastic depth (ECCV 2016): in training, leaves out the branch of a row with some probability, and makes up for
    it in the other rows: (R, ...) -> (R, ...)."""

    def __init__(self, rate: float):
        super().__init__()
        self.rate = rate

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or not self.rate:
            return x
        kept = x.new_empty(len(x), *[1] * (x.ndim - 1)).bernoulli_(1 - self.rate)
        return x * kept.div_(1 - self.rate)


class BlockState(Protocol):
    """What runs through blocks: `TokenState` of a visual tower, `TextState` of a text tower."""

    @property
    def x(self) -> Tensor: ...

    @property
    def attention_bias(self) -> Tensor | None: ...

    def add(self: S, delta: Tensor) -> S: ...


S = TypeVar("S", bound=BlockState)


class BlockPlace(nn.Module):
    """The place in a block where a tuning adds something. Empty as it is here: both branches are added as they are.

    What stands in it holds its learnt weights in modules that it calls, so that ZeRO-3 gathers them.
    """

    def attention_step(self, block: BlockAdapter, state: S) -> tuple[S, AttentionContext]:
        """The state after a block's attention, and what attended."""
        delta, attention = block.attention_branch(state.x, state.attention_bias)
        return state.add(delta), attention

    def mlp_step(self, block: BlockAdapter, state: S) -> S:
        """The state after a block's MLP."""
        return state.add(block.mlp_branch(state.x))


class BlockAdapter(nn.Module):
    """A pre-norm transformer block taken apart into its two residual branches.

    Norms, LayerScale, DropPath and qk-norm stay inside the branches.

    Attributes:
        tuned: what a tuning adds to it.
    """

    def __init__(self) -> None:
        super().__init__()
        self.tuned = BlockPlace()

    def time_step(self, state: TokenState) -> tuple[TokenState, AttentionContext]:
        """The state in front of merging and attention, and what that merging may compare tokens by: the tokens as they
        are, or in a tower of divided attention its attention over time, a row for each place and a token for a frame.
        """
        return state, AttentionContext.of_tokens(state.x)

    def attention_step(self, state: S) -> tuple[S, AttentionContext]:
        """The state after the attention branch and what a tuning adds there, and the attention, for merging."""
        return self.tuned.attention_step(self, state)

    def mlp_step(self, state: S) -> S:
        """The state after the MLP branch and what a tuning adds there."""
        return self.tuned.mlp_step(self, state)

    def attention_branch(self, x: Tensor, bias: Tensor | None) -> tuple[Tensor, AttentionContext]:
        """(R, N, D) tokens -> the branch's (R, N, D) delta, and the attention that made it, for merging."""
        raise NotImplementedError

    def mlp_branch(self, x: Tensor) -> Tensor:
        """(R, N, D) tokens -> the branch's (R, N, D) delta."""
        raise NotImplementedError


class Backbone(nn.Module):
    """An encoder for `VisualFrontend`.

    Attributes:
        embed: (B*F, 3, H, W) images -> (B*C, N, D) tokens, positions included; C = F, or 1 if it is joint.
        blocks: the `BlockAdapter`s in order.
        norm: the final norm, (..., D) -> (..., D).
        head: (..., D) normed CLS tokens, or means of a frame's normed tokens -> (..., E) projected embeddings. With
            shape.pool "attention": (R, n, D) normed tokens and their sizes (R, n, 1), or None where all are 1
            -> (R, E).
        shape: its `TowerShape`.
        clip_positions: TempMe's, where they came with the weights, by layer: (clips before the join, D).
    """

    def __init__(
        self, embed: nn.Module, blocks: list[BlockAdapter], norm: nn.Module, head: nn.Module, shape: TowerShape
    ):
        super().__init__()
        self.embed, self.blocks, self.norm, self.head = embed, nn.ModuleList(blocks), norm, head
        use_onednn(self.blocks)
        self.shape = shape
        self.clip_positions: dict[str, Tensor] = {}


def count_blocks(layer: int, layers: int) -> int:
    """Blocks in front of a hidden state, numbered as transformers numbers them: -1 is behind the last block, -2 behind
    the one before it; k > 0 is behind the first k blocks.

    Raises:
        ValueError: a state in front of the first block, or one that a tower of so many layers does not have.
    """
    blocks = layers + 1 + layer if layer < 0 else layer
    if not 1 <= blocks <= layers:
        raise ValueError(
            f"a tower of {layers} layers has hidden states behind its blocks at {-layers}..-1 or 1..{layers}; "
            f"got layer={layer}"
        )
    return blocks


def square_side(num_patches: int) -> int:
    """Patches along a side of a square image.

    Raises:
        ValueError: if the patches form no square.
    """
    side = math.isqrt(num_patches)
    if side**2 != num_patches:
        raise ValueError(f"expected the position table of a square image; got {num_patches} patch positions")
    return side
