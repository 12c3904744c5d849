"""Late interaction: every word of a text looks for the token of a video that is nearest to it (ColBERT, SIGIR 2020)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tempme_vl.frontend import VisualFrontend
from tempme_vl.precision import at_least_float32
from tempme_vl.state import FrontendOutput
from tempme_vl.tasks.losses import PAIRS, Pairs, sigmoid_loss
from tempme_vl.tasks.similarity.base import Parts, Seen, SimilarityHead, token_embeddings
from tempme_vl.text.base import TextEncoder


@dataclass(frozen=True)
class MaxSimOptions:
    """What is compared, and how it is learnt.

    Attributes:
        of: merged tokens, or frames.
        mean: over the words of a text; else their sum.
        loss: "contrastive", as without this head, or "sigmoid", SigLIP's, with a bias that is learnt.
    """

    of: Seen = "tokens"
    mean: bool = True
    loss: Literal["contrastive", "sigmoid"] = "contrastive"


class MaxSimHead(SimilarityHead):
    """Without weights, but for the bias of the sigmoid loss, which starts at -10 as SigLIP's."""

    name = "maxsim"
    options = MaxSimOptions
    text_parts = ("text", "text_mask")
    new_parameters = ("^bias$",)

    def __init__(self, told: MaxSimOptions | None = None):
        super().__init__(told or MaxSimOptions())
        self.bias = nn.Parameter(torch.tensor([-10.0])) if self.told.loss == "sigmoid" else None

    def encode_video(self, frontend: VisualFrontend, output: FrontendOutput) -> dict[str, Tensor]:
        return {"video": F.normalize(token_embeddings(frontend, output, self.told.of), dim=-1)}

    def encode_text(self, text: TextEncoder, ids: Tensor, mask: Tensor) -> dict[str, Tensor]:
        return {"text": F.normalize(at_least_float32(text.words(ids, mask)), dim=-1)}

    def similarity(self, text: Parts, video: Parts) -> Tensor:
        return max_sim(text["text"], text["text_mask"], video["video"], mean=self.told.mean)

    def logits(self, text: Parts, video: Parts, scale: Tensor) -> Tensor:
        logits = super().logits(text, video, scale)
        return logits if self.bias is None else logits + self.bias

    def loss(self, text: Parts, video: Parts, scale: Tensor, pairs: Pairs = PAIRS) -> Tensor:
        if self.bias is None:
            return super().loss(text, video, scale, pairs)
        return sigmoid_loss(self.logits(text, video, scale), pairs.video_ids, pairs.text_ids, pairs.valid)


def max_sim(
    text: Tensor, text_mask: Tensor, video: Tensor, video_mask: Tensor | None = None, mean: bool = False
) -> Tensor:
    """ColBERT's MaxSim: the sum over a text's words of each one's highest product with a token.

    Args:
        text, video: (T, L, E), (V, M, E), L2-normalised for cosines.
        text_mask: (T, L), nonzero for words that count.
        video_mask: (V, M), nonzero for tokens that can be found; default: all.
        mean: divide by the number of words that count.

    Returns:
        (T, V).
    """
    products = torch.einsum("tle,vme->tvlm", text, video)
    if video_mask is not None:
        products = products.masked_fill(~video_mask.bool()[None, :, None], -torch.inf)
    words = text_mask.bool()
    total = products.max(dim=-1).values.masked_fill(~words[:, None], 0.0).sum(dim=-1)
    return total / words.sum(dim=1, keepdim=True) if mean else total
