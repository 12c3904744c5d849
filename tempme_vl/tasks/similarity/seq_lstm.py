"""CLIP4Clip's seqLSTM (Neurocomputing 2022): the mean of frames that an LSTM has read."""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from tempme_vl.frontend import VisualFrontend
from tempme_vl.pooling import masked_mean
from tempme_vl.precision import at_least_float32
from tempme_vl.state import FrontendOutput
from tempme_vl.tasks.similarity.base import PairContext
from tempme_vl.tasks.similarity.mean import MeanHead
from tempme_vl.tasks.similarity.temporal import positions_of


class SeqLSTMHead(MeanHead):
    """The cosine of a text with the mean of its video's frames, to each of which an LSTM adds what it makes of it and
    of those before it.

    Like the authors' it also holds positions of frames, which nothing reads. Names are those of their weights.
    """

    name = "seqlstm"
    new_parameters = ("",)
    public = (("lstm_visual.", "lstm_visual."), ("frame_position_embeddings.", "frame_position_embeddings."))

    def __init__(self, context: PairContext, told: Any = None):
        super().__init__(told)
        width = context.frontend.shape.embed_dim
        self.frame_position_embeddings = positions_of(context)
        self.lstm_visual = nn.LSTM(width, width, batch_first=True)

    @classmethod
    def create(cls, context: PairContext, options: Any) -> SeqLSTMHead:
        return cls(context, options)

    def encode_video(self, frontend: VisualFrontend, output: FrontendOutput) -> dict[str, Tensor]:
        frames = at_least_float32(output.frames)
        # real frames come first, and an LSTM reads forwards: what stands behind them changes none of theirs
        read, _ = self.lstm_visual(frames.to(self.frame_position_embeddings.weight.dtype))
        frames = F.normalize(frames + at_least_float32(read), dim=-1)
        return {"video": F.normalize(masked_mean(frames, output.frames_mask), dim=-1)}
