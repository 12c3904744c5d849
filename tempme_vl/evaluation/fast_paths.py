"""Every fast path beside the plain one, on the device and in the precision in which it is used.

The kernels' match and merge forwards and backwards, QuickGELU, patches by one product, a CPU's linear layers, attention
with sizes in both forms, uint8 normalised on the device, blocks compiled, a whole forward recorded as a CUDA graph.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tempme_vl import kernels
from tempme_vl.backbones.attention import attend, bias_in_keys
from tempme_vl.backbones.base import PatchProjection, QuickGELU
from tempme_vl.backbones.linear import Linear
from tempme_vl.evaluation.ways import WAYS
from tempme_vl.frontend import VisualFrontend, create_frontend
from tempme_vl.matching import MergeMap, bipartite_match
from tempme_vl.normalize import normalize
from tempme_vl.reports import format_columns

# of a value, or of 1 where it is smaller; half precision has 8 bits
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2}
# 1 - cosine of pooled embeddings, and of the gradient of all pixels: where two pairs are equally similar within
# rounding, another one may merge, which sends the gradient of one token elsewhere
ALIKE = {torch.float32: (1e-4, 1e-2), torch.bfloat16: (1e-2, 0.3)}


@dataclass(frozen=True)
class Agreement:
    """The largest difference between a fast path and the plain one, and what it may be."""

    path: str
    dtype: str
    error: float
    tolerance: float

    @property
    def holds(self) -> bool:
        return self.error <= self.tolerance  # False for NaN


@dataclass(frozen=True)
class Sizes:
    """Of what is compared: rows of tokens and their width, a model, its frames, and options of TempMe for it."""

    rows: int
    tokens: int
    width: int
    model: str
    frames: int
    tempme: Mapping[str, Any]


LARGE = Sizes(96, 197, 768, "open_clip:ViT-B-32-quickgelu", 12, {})
SMALL = Sizes(
    *(2, 21, 24, "open_clip:tiny", 4),
    {"r": 2, "merge_layers": (1,), "merge_frames": (2,), "cross_percent": 30, "intra_percent": 10},
)


def agreements(device: torch.device, sizes: Sizes, dtypes: Sequence[torch.dtype] = tuple(TOLERANCE)) -> list[Agreement]:
    """All comparisons that the device allows; Triton's need a GPU, or TRITON_INTERPRET=1 from the start."""
    cudnn = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False  # 1e-3 of what convolutions give in float32
    try:
        found: list[Agreement] = []
        for dtype in dtypes:
            torch.manual_seed(0)
            found += [
                Agreement(path, str(dtype).removeprefix("torch."), error, tolerance)
                for path, error, tolerance in (*_functions(device, dtype, sizes), *_encoders(device, dtype, sizes))
            ]
        return found
    finally:
        torch.backends.cudnn.allow_tf32 = cudnn


Line = tuple[str, float, float]


def _functions(device: torch.device, dtype: torch.dtype, sizes: Sizes) -> Iterator[Line]:
    tolerance = TOLERANCE[dtype]
    drawn = partial(torch.randn, device=device, dtype=dtype)
    x = drawn(sizes.rows, sizes.tokens, sizes.width)
    if device.type == "cuda" or os.environ.get("TRITON_INTERPRET") == "1":
        yield from _kernels(x, tolerance)
    conv = nn.Conv2d(3, sizes.width, 16, 16, device=device, dtype=dtype)
    images = drawn(sizes.rows, 3, 64, 64)
    with torch.no_grad():
        yield "patches by one product", _largest(PatchProjection.of(conv)(images), conv(images)), tolerance
        if device.type == "cpu":
            layer = Linear(sizes.width, 3 * sizes.width, dtype=dtype)
            yield "linear layers by oneDNN", _largest(layer(x), F.linear(x, layer.weight, layer.bias)), tolerance
    q, k, v = (drawn(sizes.rows, 2, sizes.tokens, 64) for _ in range(3))
    yield from _attention(q, k, v, tolerance)


def _kernels(x: Tensor, tolerance: float) -> Iterator[Line]:
    from tempme_vl.kernels import activation, merging

    pairs = x.shape[1] // 4
    with kernels.plain():
        plain = bipartite_match(x, pairs)
        own = MergeMap(*merging.match(x, pairs, 1, True))
        # pairs that are equally similar within rounding may stand in for each other
        yield "match", _largest(_similarities(x, own), _similarities(x, plain)), 1e-5
        size = torch.randint(1, 24, (*x.shape[:2], 1), device=x.device).float()
        outputs = [
            _with_gradient(lambda x: plain.weighted_mean(x, size)[0], x),
            _with_gradient(lambda x: merging.weighted_mean(x, size, plain.base, plain.src, plain.dst)[0], x),
        ]
        yield "merge", _largest(outputs[1][0], outputs[0][0]), tolerance
        yield "merge, backwards", _largest(outputs[1][1], outputs[0][1]), tolerance
        outputs = [_with_gradient(way, 2 * x) for way in (QuickGELU(), activation.quick_gelu)]
        yield "QuickGELU", _largest(outputs[1][0], outputs[0][0]), tolerance
        yield "QuickGELU, backwards", _largest(outputs[1][1], outputs[0][1]), tolerance


def _attention(q: Tensor, k: Tensor, v: Tensor, tolerance: float) -> Iterator[Line]:
    bias = torch.randint(1, 24, (len(q), 1, 1, k.shape[2]), device=q.device).float().log()
    scale = q.shape[-1] ** -0.5
    whole = [heads.double() for heads in (q, k, v)]
    expected = ((whole[0] @ whole[1].mT * scale + bias.double()).softmax(-1) @ whole[2]).transpose(1, 2).flatten(2)
    yield "attention with sizes as a bias", _largest(attend(q, k, v, bias), expected), tolerance
    longer = F.scaled_dot_product_attention(*bias_in_keys(q, k, v, bias, scale), scale=scale)[..., : v.shape[-1]]
    yield "attention with sizes in the keys", _largest(longer.transpose(1, 2).flatten(2), expected), tolerance


def _encoders(device: torch.device, dtype: torch.dtype, sizes: Sizes) -> Iterator[Line]:
    torch.compiler.reset()
    tolerance, backwards = ALIKE[dtype]
    encoder = create_frontend(sizes.model, None, "tempme", sizes.frames, **sizes.tempme).to(device, dtype).eval()
    side = encoder.shape.image_size
    frames = torch.randint(0, 256, (2, sizes.frames, 3, side, side), dtype=torch.uint8, device=device)
    config = encoder.preprocessing
    normalised = normalize(frames.cpu(), config.mean, config.std).to(device)
    with torch.no_grad():
        both = [encoder(video).pooled for video in (frames, normalised)]
    yield "uint8 normalised on the device", _unlike(*both), tolerance
    video = normalised.to(dtype)
    reference = _with_gradient(lambda x: encoder(x).pooled, video)
    with kernels.plain():
        plain = _with_gradient(lambda x: encoder(x).pooled, video)
    with torch.no_grad():
        yield "encoder without gradients", _unlike(encoder(video).pooled, reference[0]), tolerance
    yield "encoder without kernels", _unlike(plain[0], reference[0]), tolerance
    yield "encoder without kernels, backwards", _unlike(plain[1], reference[1]), backwards
    if device.type == "cuda":
        yield "encoder as a CUDA graph", _unlike(_replayed(encoder, video), reference[0]), tolerance
    WAYS["compiled"].prepare(encoder)
    compiled = _with_gradient(lambda x: encoder(x).pooled, video)
    yield "encoder with compiled blocks", _unlike(compiled[0], reference[0]), tolerance
    yield "encoder with compiled blocks, backwards", _unlike(compiled[1], reference[1]), backwards


@torch.no_grad()
def _replayed(encoder: VisualFrontend, video: Tensor) -> Tensor:
    pooled: list[Tensor] = []
    replay = WAYS["graph"].around(lambda: pooled.append(encoder(video).pooled))
    replay()
    return pooled[-1]  # what the recorded step wrote to


def _with_gradient(function: Callable[[Tensor], Tensor], x: Tensor) -> tuple[Tensor, Tensor]:
    own = x.clone().requires_grad_()
    y = function(own)
    (gradient,) = torch.autograd.grad((y.float() * torch.linspace(-1, 1, y.shape[-1], device=y.device)).sum(), own)
    return y.detach(), gradient


def _largest(actual: Tensor, expected: Tensor) -> float:
    """Of the differences, in units of the expected value where that is above 1."""
    wide = expected.double()
    return float(((actual.double() - wide).abs() / wide.abs().clamp(min=1)).max())


def _unlike(actual: Tensor, expected: Tensor) -> float:
    """1 - cosine of the most different rows."""
    alike = F.cosine_similarity(actual.double().flatten(1), expected.double().flatten(1))
    return float((1 - alike).max())


def _similarities(x: Tensor, merge: MergeMap) -> Tensor:
    """(R, r) cosines of the pairs that merge, largest first."""
    unit = F.normalize(x.double(), dim=-1)
    one, other = (unit.gather(1, index.unsqueeze(-1).expand(-1, -1, x.shape[-1])) for index in _partners(merge))
    return (one * other).sum(-1).sort(-1, descending=True).values


def _partners(merge: MergeMap) -> tuple[Tensor, Tensor]:
    return merge.src, merge.base.gather(1, merge.dst)


def format_agreements(found: Sequence[Agreement]) -> str:
    """A plain-text table."""
    return format_columns(
        [
            {
                "fast path": one.path,
                "dtype": one.dtype,
                "differs by": f"{one.error:.1e}",
                "may by": f"{one.tolerance:.1e}",
                "": "" if one.holds else "NO",
            }
            for one in found
        ]
    )
