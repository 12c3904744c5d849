"""CLIP4Clip's seqTransf (Neurocomputing 2022): the mean of frames that have attended to each other."""

from __future__ import annotations

from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor

from tempme_vl.frontend import VisualFrontend
from tempme_vl.pooling import masked_mean
from tempme_vl.schema import Layers
from tempme_vl.state import FrontendOutput
from tempme_vl.tasks.similarity.base import PairContext, Seen, token_embeddings
from tempme_vl.tasks.similarity.mean import MeanHead
from tempme_vl.tasks.similarity.temporal import TextLike, count_of


@dataclass(frozen=True)
class SeqTransfOptions:
    """The published setting.

    Attributes:
        of: frames, or merged tokens, all of which count.
        layers: of the transformer.
    """

    of: Seen = "frames"
    layers: Layers = 4


class SeqTransfHead(MeanHead):
    """The cosine of a text with the mean of its video's frames, to each of which a transformer adds what it finds in
    all real ones. It starts as CLIP's text side (`TextLike`)."""

    name = "seqtransf"
    options = SeqTransfOptions
    new_parameters = ("",)
    public = (
        ("transformerClip.resblocks.", "temporal.blocks."),
        ("frame_position_embeddings.", "temporal.positions."),
    )

    def __init__(self, context: PairContext, told: SeqTransfOptions | None = None):
        super().__init__(told or SeqTransfOptions())
        self.temporal = TextLike(context, self.told.layers, count_of(context.frontend, self.told.of))

    @classmethod
    def create(cls, context: PairContext, options: SeqTransfOptions) -> SeqTransfHead:
        return cls(context, options)

    def encode_video(self, frontend: VisualFrontend, output: FrontendOutput) -> dict[str, Tensor]:
        seen = token_embeddings(frontend, output, self.told.of)
        mask = output.frames_mask if self.told.of == "frames" else None
        found = F.normalize(self.temporal.added(seen, mask), dim=-1)
        return {"video": F.normalize(masked_mean(found, mask), dim=-1)}
