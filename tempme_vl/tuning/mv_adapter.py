"""MV-Adapter (CVPR 2024): adapters beside the MLPs of both of CLIP's towers, those of videos with a small transformer
over frames, and factors that both towers share.

Letters beside those of `tempme_vl.state`: W width of an adapter, L words.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tempme_vl.backbones.base import BlockAdapter, BlockPlace, BlockState, QuickGELU, S
from tempme_vl.backbones.open_clip_blocks import OpenCLIPBlock
from tempme_vl.costs import BlockCost, linear, norm
from tempme_vl.state import TokenState
from tempme_vl.tuning.base import AddedModules
from tempme_vl.tuning.block import Block
from tempme_vl.tuning.prompt import STD, Rows

if TYPE_CHECKING:
    from tempme_vl.backbones.base import TowerShape
    from tempme_vl.merging.schedule import MergeSchedule
    from tempme_vl.tuning.model import TunableModel

Reads = Literal["seq", "par", "ln_par"]
FactorPlace = Literal["down out", "down in", "up in", "up out"]
_SCALE = 0.1  # of what an adapter gives
_CALIBRATION = 16  # width inside the calibration
_MASKED = -1e6


@dataclass(frozen=True)
class MvAdapter(AddedModules):
    """An adapter beside the MLP of each block; all else of CLIP is frozen but its biases.

    Of texts it is a narrow causal block over the words. Of videos: all tokens become narrower; the CLS tokens of all
    frames, the means of the frames' patches and one more token attend to each other; from that a calibration scales
    every frame's CLS token channel by channel. In some blocks, factors made of a vector that both towers share scale
    the weights of both.

    Where clips were joined, their frames share the mean of the clip's patches, weighted with sizes.

    Attributes:
        width, heads: of the adapters and their blocks.
        words: the most that a text has.
        reads: what an adapter gets: "seq" what the MLP gives, "par" what goes into the block's half, "ln_par" that
            after its norm.
        norm_in: whether a norm stands in front of an adapter.
        calibrate_patches: whether patches are scaled as well.
        blocks: numbers of those that have an adapter; default: all.
        shared: numbers of those with factors that both towers share; default: the last two of each.
        factor: width of the shared vectors.
        factor_place: which side of which layer the factors scale, its bias left out. Those of "up" scale CLS tokens
            alone in videos.

    Raises:
        ValueError: sizes below 1, or heads that do not divide the width.
    """

    name: ClassVar[str] = "mv_adapter"

    width: int = 64
    heads: int = 2
    words: int = 32
    reads: Reads = "seq"
    norm_in: bool = False
    calibrate_patches: bool = False
    blocks: tuple[int, ...] | None = None
    shared: tuple[int, ...] | None = None
    factor: int = 32
    factor_place: FactorPlace = "down out"

    def __post_init__(self) -> None:
        if min(self.width, self.heads, self.words, self.factor) < 1 or self.width % self.heads:
            raise ValueError(f"expected sizes from 1, and heads that divide the width; got {self}")

    def extend(self, model: TunableModel) -> None:
        """Raises:
        ValueError: a model whose towers are not both CLIP's, numbers of blocks that it does not have, or merging that
            leaves fewer CLS tokens than frames.
        """
        text, blocks, schedule = model.clip_text(), model.visual_blocks(), model.frontend.schedule
        if not all(isinstance(block, OpenCLIPBlock) for block in blocks):
            raise ValueError(
                f"mv_adapter stands in CLIP's own blocks; got {type(blocks[0]).__name__}: choose adapter or lora"
            )
        model.check_every_frame(self.name)
        visual = cast(list[OpenCLIPBlock], blocks), model.frontend.shape.width, schedule.frames
        vectors = [Vector(self.factor) for _ in ((0, 0) if self.shared is None else self.shared)]
        for tower, width, frames in (visual, (text.adapters(), text.width, None)):
            count = len(tower)
            numbers = _numbers(self.blocks, range(count), range(count))
            shared = _numbers(self.shared, numbers, numbers[-2:])
            for layer in numbers:
                factors = None
                if layer in shared:
                    channels = width if self.factor_place in ("down in", "up out") else self.width
                    factors = Factors(vectors[shared.index(layer)], channels, owns=frames is not None)
                tower[layer].tuned = self._adapter(width, frames, factors)

    def _adapter(self, width: int, frames: int | None, factors: Factors | None) -> BlockPlace:
        layers = Layers(width, self.width, self.norm_in, self.factor_place, factors)
        if frames is None:
            return TextAdapter(layers, self.width, self.heads, self.words, self.reads)
        return VideoAdapter(layers, self.width, self.heads, frames, self.reads, self.calibrate_patches)

    def apply(self, model: TunableModel) -> None:
        biases = [p for name, p in model.named_parameters() if re.match(r"(frontend|text)\.", name) and "bias" in name]
        super().apply(model)
        for bias in biases:
            bias.requires_grad_(True)

    def cost(self, schedule: MergeSchedule, shape: TowerShape, published: bool = False) -> int:
        width, inner, frames = shape.width, self.width, schedule.frames
        sequence = 2 * frames + 1
        calibration = linear(1, inner, inner) + linear(frames, 2 * inner, _CALIBRATION)
        calibration += linear(frames, _CALIBRATION, inner, bias=False)
        video = norm(sequence, inner) + BlockCost(inner, self.heads).whole(sequence) + 2 * sequence * inner
        video += calibration * (2 if self.calibrate_patches else 1)
        layers = range(len(schedule.plan))
        total = 0
        for n in (schedule.layer_counts[layer] for layer in _numbers(self.blocks, layers, layers)):
            tokens = n.clips * n.mlp
            total += linear(tokens, width, inner) + linear(tokens, inner, width) + 2 * tokens * inner  # and QuickGELU
            total += norm(tokens, width) * self.norm_in + video
        return total

    def published(self) -> dict[str, Any]:
        return {
            "lr": 1e-7,  # of CLIP's biases, which decay as all else
            "lr_new": 5e-6,
            "optimizer": "bertadam",
            "decay": "all",
            "weight_decay": 0.2,
            "epochs": 5,
        }


def _numbers(given: Sequence[int] | None, among: Sequence[int], usual: Sequence[int]) -> Sequence[int]:
    numbers = usual if given is None else given
    if unknown := [number for number in numbers if number not in among]:
        raise ValueError(f"mv_adapter: expected numbers of blocks among {list(among)}; got {unknown}")
    return numbers


class Vector(nn.Module):
    """A learnt vector, zero at the start: () -> (n,)."""

    def __init__(self, size: int):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(size))

    def forward(self) -> Tensor:
        return self.weight


class Factors(nn.Module):
    """Factors of the channels of a layer, made of a shared vector: () -> (channels,).

    Args:
        owns: whether the vector is a part of this module and not of the other tower's.
    """

    def __init__(self, vector: Vector, channels: int, owns: bool):
        super().__init__()
        self.made = nn.Linear(len(vector.weight), channels)
        if owns:
            self.vector = vector
        self.of = (vector,)

    def forward(self) -> Tensor:
        return self.made(self.of[0]())


class Scaled(nn.Linear):
    """A linear layer, one side of whose weights may be scaled."""

    def forward(self, x: Tensor, before: Tensor | None = None, behind: Tensor | None = None) -> Tensor:
        """Args:
        before, behind: factors of the channels of x (..., in) and of the result (..., out) without its bias.
        """
        x = x if before is None else x * before
        if behind is None:
            return F.linear(x, self.weight, self.bias)
        return F.linear(x, self.weight) * behind + self.bias


class Layers(nn.Module):
    """The way into an adapter and out of it; out of it all is zero at the start."""

    def __init__(self, width: int, inner: int, norm_in: bool, place: FactorPlace, factors: Factors | None):
        super().__init__()
        self.place, self.factors = place, factors
        self.norm = nn.LayerNorm(width) if norm_in else nn.Identity()
        self.down, self.up = Scaled(width, inner), Scaled(inner, width)
        for zero in (self.down.bias, self.up.weight, self.up.bias):
            nn.init.zeros_(zero)

    def narrow(self, x: Tensor) -> Tensor:
        """(..., D) -> (..., W)."""
        return self._run(self.down, "down", self.norm(x))

    def wide(self, x: Tensor, scaled: bool = True) -> Tensor:
        """(..., W) -> (..., D), as much of it as is added.

        Args:
            scaled: by the factors, where there are such of this layer.
        """
        return _SCALE * self._run(self.up, "up" if scaled else "", x)

    def _run(self, layer: Scaled, name: str, x: Tensor) -> Tensor:
        where, side = self.place.split()
        if self.factors is None or where != name:
            return layer(x)
        return layer(x, before=self.factors()) if side == "in" else layer(x, behind=self.factors())


class Beside(BlockPlace):
    """An adapter beside an MLP."""

    def __init__(self, layers: Layers, width: int, heads: int, places: int, reads: Reads):
        super().__init__()
        self.layers, self.reads = layers, reads
        self.positions, self.ln_pre = Rows(places, width, STD), nn.LayerNorm(width)
        self.block, self.activation = Block(width, heads), QuickGELU()

    def mlp_step(self, block: BlockAdapter, state: S) -> S:
        own, x = cast(OpenCLIPBlock, block), state.x
        normed = own.ln_2(x)
        given = own.ls_2(own.mlp(normed))
        read = {"seq": given, "par": x, "ln_par": normed}[self.reads]
        return state.add(given + self.adapt(read, state).to(x.dtype))

    def adapt(self, x: Tensor, state: BlockState) -> Tensor:
        """(R, N, D) what the adapter reads -> (R, N, D) what it adds."""
        raise NotImplementedError


class TextAdapter(Beside):
    """Of a text: words that are narrower see those before them."""

    def adapt(self, x: Tensor, state: BlockState) -> Tensor:
        positions, length = self.positions(), x.shape[1]
        if length > len(positions):
            raise ValueError(f"this model was tuned for {len(positions)} words at most; got {length}: give max_words")
        narrow = self.ln_pre(self.layers.narrow(x) + positions[:length].to(x.dtype))
        return self.layers.wide(self.activation(self.block(narrow, state.attention_bias)))


class Calibration(nn.Module):
    """Factors of each frame's channels, 1 at the start: 1 + b relu(a [x, g y])."""

    def __init__(self, width: int):
        super().__init__()
        self.g, self.a = nn.Linear(width, width), nn.Linear(2 * width, _CALIBRATION)
        self.b = nn.Linear(_CALIBRATION, width, bias=False)
        nn.init.zeros_(self.b.weight)

    def forward(self, frames: Tensor, video: Tensor, frame_mask: Tensor | None) -> Tensor:
        """(B, F, W) frames and (B, 1, W) of the video -> (B, F, W)."""
        x = torch.cat([frames, self.g(video).expand_as(frames)], dim=-1)
        if frame_mask is not None:
            x = x * frame_mask.unsqueeze(-1).to(x.dtype)
        return self.b(F.relu(self.a(x))) + 1


class VideoAdapter(Beside):
    """Of a video: frames attend to each other by a token each for CLS and patches, and their CLS tokens are scaled."""

    def __init__(self, layers: Layers, width: int, heads: int, frames: int, reads: Reads, calibrate_patches: bool):
        super().__init__(layers, width, heads, 2 * frames + 1, reads)
        self.video = Rows(1, width, STD)
        self.of_cls = Calibration(width)
        self.of_patches = Calibration(width) if calibrate_patches else None

    def adapt(self, x: Tensor, state: BlockState) -> Tensor:
        state = cast(TokenState, state)
        clips, frames = state.num_clips, state.num_prefix - state.num_inserted
        narrow = self.activation(self.layers.narrow(x))
        size = state.size[:, state.num_prefix :].to(x.dtype)
        cls, patches = narrow[:, :frames], narrow[:, state.num_prefix :]
        means = ((patches * size).sum(1, keepdim=True) / size.sum(1, keepdim=True)).expand(-1, frames, -1)
        cls, means = (t.unflatten(0, (-1, clips)).flatten(1, 2) for t in (cls, means))  # (B, F, W)
        video = self.video().to(x.dtype).expand(len(cls), -1, -1)
        sequence = self.ln_pre(torch.cat([video, cls, means], dim=1) + self.positions().to(x.dtype))
        mask = state.frame_mask
        sequence = self.activation(self.block(sequence, None if mask is None else _bias(mask, x.dtype)))
        video, cls, means = sequence.split([1, cls.shape[1], cls.shape[1]], dim=1)

        scaled = self.layers.wide(self.of_cls(cls + means, video, mask) * cls)
        rest = narrow[:, frames:]
        if self.of_patches is not None:
            factors = self.of_patches(cls + means, video, mask).unflatten(1, (clips, -1)).mean(2).flatten(0, 1)
            rest = rest * factors.unsqueeze(1)
        scaled = scaled.unflatten(1, (clips, -1)).flatten(0, 1)
        return torch.cat([scaled, self.layers.wide(rest, scaled=False)], dim=1)


def _bias(frame_mask: Tensor, dtype: torch.dtype) -> Tensor:
    """(B, F) -> (B, 1, 1, 2 F + 1): of the token of the video, and two for each frame, those of padding masked."""
    padding = (frame_mask == 0).to(dtype) * _MASKED
    return F.pad(torch.cat([padding, padding], dim=1), (1, 0)).unsqueeze(1).unsqueeze(1)
