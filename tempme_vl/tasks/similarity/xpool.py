"""X-Pool (CVPR 2022): every text pools the frames or tokens of a video by its own attention."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tempme_vl.frontend import VisualFrontend
from tempme_vl.precision import at_least_float32
from tempme_vl.schema import Share, Size
from tempme_vl.state import FrontendOutput
from tempme_vl.tasks.similarity.base import PairContext, Parts, Seen, SimilarityHead, token_embeddings
from tempme_vl.text.base import TextEncoder


@dataclass(frozen=True)
class XPoolOptions:
    """The published setting, on merged tokens instead of frames.

    Attributes:
        of: merged tokens, or frames.
        heads: of the attention.
        dropout: rate on the linear branch.
    """

    of: Seen = "tokens"
    heads: Size = 1
    dropout: Share = 0.3


class XPoolHead(SimilarityHead):
    """The cosine of a text with the video as it pools it. Names are those of the public weights (pool_frames.*).

    Raises:
        ValueError: a width that the heads do not divide.
    """

    name = "xpool"
    options = XPoolOptions
    published: ClassVar[Mapping[str, Any]] = {
        "tuning": "full",
        "lr": 1e-6,
        "lr_new": 1e-5,
        "optimizer": "adamw",
        "schedule": "cosine",
        "weight_decay": 0.2,
        "warmup": 0.1,
        "batch_size": 32,
        "epochs": 5,
    }
    new_parameters = ("",)

    def __init__(self, width: int, told: XPoolOptions | None = None):
        super().__init__(told or XPoolOptions())
        self.cross_attn = TextAttention(width, self.told.heads)
        self.linear_proj = _identity(width)
        self.layer_norm1, self.layer_norm2, self.layer_norm3 = (nn.LayerNorm(width) for _ in range(3))
        self.dropout = nn.Dropout(self.told.dropout)

    @classmethod
    def create(cls, context: PairContext, options: XPoolOptions) -> XPoolHead:
        return cls(context.frontend.shape.embed_dim, options)

    def encode_video(self, frontend: VisualFrontend, output: FrontendOutput) -> dict[str, Tensor]:
        return {"video": token_embeddings(frontend, output, self.told.of)}

    def encode_text(self, text: TextEncoder, ids: Tensor, mask: Tensor) -> dict[str, Tensor]:
        return {"text": at_least_float32(text(ids, mask))}

    def similarity(self, text: Parts, video: Parts) -> Tensor:
        pooled_VTE = self.pool(text["text"], video["video"])
        return torch.einsum("te,vte->tv", F.normalize(text["text"], dim=-1), F.normalize(pooled_VTE, dim=-1))

    def pool(self, text: Tensor, video: Tensor) -> Tensor:
        """(T, E), (V, M, E), neither normalised -> (V, T, E)."""
        dtype = self.layer_norm1.weight.dtype  # of a model in half precision, whose features are float32
        text, video = text.to(dtype), video.to(dtype)
        found = self.layer_norm2(self.cross_attn(self.layer_norm1(text), self.layer_norm1(video)))
        return at_least_float32(self.layer_norm3(found + self.dropout(self.linear_proj(found))))


class TextAttention(nn.Module):
    """Texts as queries, a video's tokens as keys and values: (T, E), (V, M, E) -> (V, T, E). Starts as the identity."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        if width % heads:
            raise ValueError(f"expected a number of heads that divides the width {width}; got {heads}")
        self.heads = heads
        self.q_proj, self.k_proj, self.v_proj, self.out_proj = (_identity(width) for _ in range(4))

    def forward(self, text: Tensor, video: Tensor) -> Tensor:
        q = self.q_proj(text).unflatten(-1, (self.heads, -1))
        k, v = (project(video).unflatten(-1, (self.heads, -1)) for project in (self.k_proj, self.v_proj))
        attention = (torch.einsum("thd,vmhd->vthm", q, k) / math.sqrt(q.shape[-1])).softmax(dim=-1)
        return self.out_proj(torch.einsum("vthm,vmhd->vthd", attention, v).flatten(2))


def _identity(width: int) -> nn.Linear:
    layer = nn.Linear(width, width)
    nn.init.eye_(layer.weight)
    nn.init.zeros_(layer.bias)
    return layer
