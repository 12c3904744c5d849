"""The mean of a video's frames against the text's one embedding: CLIP4Clip's meanP, and TempMe."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from tempme_vl.frontend import VisualFrontend
from tempme_vl.precision import at_least_float32
from tempme_vl.state import FrontendOutput
from tempme_vl.tasks.similarity.base import Parts, SimilarityHead
from tempme_vl.text.base import TextEncoder


class MeanHead(SimilarityHead):
    """The cosine of both embeddings, (E,) each; without weights."""

    name = "mean"
    products = True

    def encode_video(self, frontend: VisualFrontend, output: FrontendOutput) -> dict[str, Tensor]:
        return {"video": F.normalize(output.pooled, dim=-1)}

    def encode_text(self, text: TextEncoder, ids: Tensor, mask: Tensor) -> dict[str, Tensor]:
        return {"text": F.normalize(at_least_float32(text(ids, mask)), dim=-1)}

    def similarity(self, text: Parts, video: Parts) -> Tensor:
        return text["text"] @ video["video"].T

    def logits(self, text: Parts, video: Parts, scale: Tensor) -> Tensor:
        return ((scale * video["video"]) @ text["text"].T).T
