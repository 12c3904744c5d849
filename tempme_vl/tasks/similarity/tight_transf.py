"""CLIP4Clip's tightTransf (Neurocomputing 2022): a transformer reads a text and a video together, pair by pair."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from tempme_vl.backbones.base import QuickGELU
from tempme_vl.frontend import VisualFrontend
from tempme_vl.precision import at_least_float32
from tempme_vl.schema import Layers, Share
from tempme_vl.state import FrontendOutput
from tempme_vl.tasks.similarity.base import PairContext, Parts, Seen, SimilarityHead, token_embeddings
from tempme_vl.tasks.similarity.temporal import TextLike, count_of
from tempme_vl.text.base import TextEncoder

_STD = 0.02  # of what stands behind the transformer, at the start


@dataclass(frozen=True)
class TightTransfOptions:
    """The published setting.

    Attributes:
        of: frames, or merged tokens, all of which count.
        layers: of the transformer.
        dropout: rate on its input, in training.
    """

    of: Seen = "frames"
    layers: Layers = 4
    dropout: Share = 0.1


class TightTransfHead(SimilarityHead):
    """A number for each pair, no cosine: a transformer over [text, frames], neither normalised, whose first token
    becomes a logit. It starts as CLIP's text side (`TextLike`). T texts and V videos are T V sequences."""

    name = "tighttransf"
    options = TightTransfOptions
    video_parts = ("video", "video_mask")
    new_parameters = ("",)
    public = (
        ("cross.embeddings.position_embeddings.", "cross.positions."),
        ("cross.transformer.resblocks.", "cross.blocks."),
        ("cross.pooler.", ""),
        ("similarity_dense.", "similarity_dense."),
    )

    def __init__(self, context: PairContext, told: TightTransfOptions | None = None):
        super().__init__(told or TightTransfOptions())
        width = context.frontend.shape.embed_dim
        self.cross = TextLike(context, self.told.layers, 1 + count_of(context.frontend, self.told.of))
        self.ln_pool, self.dense, self.activation = nn.LayerNorm(width), nn.Linear(width, width), QuickGELU()
        self.similarity_dense = nn.Linear(width, 1)
        for layer in (self.dense, self.similarity_dense):
            nn.init.normal_(layer.weight, std=_STD)
            nn.init.zeros_(layer.bias)

    @classmethod
    def create(cls, context: PairContext, options: TightTransfOptions) -> TightTransfHead:
        return cls(context, options)

    def encode_video(self, frontend: VisualFrontend, output: FrontendOutput) -> dict[str, Tensor]:
        seen = token_embeddings(frontend, output, self.told.of)
        real = output.frames_mask if self.told.of == "frames" else None
        mask = seen.new_ones(seen.shape[:2], dtype=torch.long) if real is None else real.long()
        return {"video": seen, "video_mask": mask}

    def encode_text(self, text: TextEncoder, ids: Tensor, mask: Tensor) -> dict[str, Tensor]:
        return {"text": at_least_float32(text(ids, mask))}

    def similarity(self, text: Parts, video: Parts) -> Tensor:
        texts, videos = text["text"], video["video"]
        pairs = (len(texts), len(videos))
        sequences = torch.cat(
            [texts[:, None, None].expand(-1, len(videos), -1, -1), videos.expand(len(texts), -1, -1, -1)], dim=2
        )
        mask = torch.cat([torch.ones_like(video["video_mask"][:, :1]), video["video_mask"]], dim=1)
        mask = mask.expand(len(texts), -1, -1).flatten(0, 1)
        first = self.cross(sequences.flatten(0, 1), mask, self.told.dropout)[:, 0]
        pooled = self.activation(self.dense(self.ln_pool(first)))
        return at_least_float32(self.similarity_dense(pooled)).view(pairs)

    def logits(self, text: Parts, video: Parts, scale: Tensor) -> Tensor:
        return self.similarity(text, video)  # without a temperature
