"""EERCF (AAAI 2024): a text gates the frames and patches of a video, without weights (TIB), and two stages of ranking.

Letters: B pairs, F frames; others as in `tempme_vl.tasks.similarity.base`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tempme_vl.frontend import VisualFrontend
from tempme_vl.pooling import masked_mean
from tempme_vl.precision import at_least_float32
from tempme_vl.schema import Layers
from tempme_vl.state import FrontendOutput
from tempme_vl.tasks.losses import PAIRS, Pairs, contrastive_loss_of
from tempme_vl.tasks.similarity.base import PairContext, Parts, token_embeddings
from tempme_vl.tasks.similarity.mean import MeanHead
from tempme_vl.tasks.similarity.seq_transf import SeqTransfHead
from tempme_vl.tasks.similarity.temporal import TextLike
from tempme_vl.text.base import TextEncoder

SHARP, SOFT = 0.01, 0.1  # temperatures of gates
_PEARSON = 0.14  # factor of the constraint


@dataclass(frozen=True)
class EERCFOptions:
    """The published setting, with merged tokens as patches.

    Attributes:
        layers: of the transformer over frames.
        video, weak_frame, weak_patch: weights of the scores whose sum has the weak loss.
        strong_frame, strong_patch: likewise, of the strong loss.
        pearson_video, pearson_frame, pearson_patch: likewise, of the Pearson constraint.
        weak_loss, strong_loss, pearson_loss: weights of these three.
    """

    layers: Layers = 4
    video: float = 0.5
    weak_frame: float = 0.5
    weak_patch: float = 0.05
    strong_frame: float = 1.0
    strong_patch: float = 0.0
    pearson_video: float = 1.0
    pearson_frame: float = 1.0
    pearson_patch: float = 0.0
    weak_loss: float = 0.8
    strong_loss: float = 0.2
    pearson_loss: float = 0.001


class EERCFHead(MeanHead):
    """The first stage compares one embedding of each side, CLIP4Clip's seqTransf behind a matrix; the second reads
    frames and patches, which the text weighs.

    Embeddings of texts are not normalised here.
    """

    name = "eercf"
    options = EERCFOptions
    candidates = 50
    fine_video_parts = ("frames", "timed", "patches")
    fine_text_parts = ("sentence",)
    new_parameters = ("",)
    public = (
        *SeqTransfHead.public,
        ("global_mat_weight", "global_mat.weight"),
        ("frame_logit_weight", "frame_logit.weight"),
    )

    def __init__(self, context: PairContext, told: EERCFOptions | None = None):
        super().__init__(told or EERCFOptions())
        frames, width = frames_of(context.frontend), context.frontend.shape.embed_dim
        self.temporal = TextLike(context, self.told.layers, frames)
        self.global_mat, self.frame_logit = (nn.Linear(size, size, bias=False) for size in (width, frames))
        for layer in (self.global_mat, self.frame_logit):
            nn.init.eye_(layer.weight)

    @classmethod
    def create(cls, context: PairContext, options: EERCFOptions) -> EERCFHead:
        return cls(context, options)

    @classmethod
    def from_public(cls, given: Parts) -> dict[str, Tensor]:
        named = super().from_public(given)
        matrices = ("global_mat.weight", "frame_logit.weight")  # multiplied from the other side there
        return {name: value.T.contiguous() if name in matrices else value for name, value in named.items()}

    def encode_video(self, frontend: VisualFrontend, output: FrontendOutput) -> dict[str, Tensor]:
        frames, mask = at_least_float32(output.frames), output.frames_mask
        timed = F.normalize(self.temporal.added(frames, mask), dim=-1)
        return {
            "video": F.normalize(masked_mean(timed, mask), dim=-1),
            "frames": F.normalize(frames, dim=-1),
            "timed": timed,
            "patches": F.normalize(frontend.patches(token_embeddings(frontend, output)), dim=-1),
        }

    def encode_text(self, text: TextEncoder, ids: Tensor, mask: Tensor) -> dict[str, Tensor]:
        sentence = super().encode_text(text, ids, mask)["text"]
        return {"sentence": sentence, "text": self._times(self.global_mat, sentence)}

    def fine(self, text: Parts, video: Parts) -> Tensor:
        """The weighted sum of four scores; of the frames' and patches' gates with every text, cosines all."""
        sentence = text["sentence"]
        frames = self.weak_frames(sentence, video["frames"])
        pooled = gated(sentence, video["frames"], video["timed"], SOFT)
        strong = torch.einsum("te,tve->tv", sentence, pooled)
        patches = weak(sentence, video["patches"])
        return 0.8 * frames + 0.2 * strong + 0.2 * patches + 0.5 * self.similarity(text, video)

    def weak_frames(self, sentence: Tensor, frames: Tensor) -> Tensor:
        """(T, E), (V, F, E) -> (T, V): the cosines of frames, weighed by what a matrix makes of their softmax."""
        cosines = _cosines(sentence, frames)
        return (cosines * self._times(self.frame_logit, (cosines / SHARP).softmax(-1))).sum(-1)

    def loss(self, text: Parts, video: Parts, scale: Tensor, pairs: Pairs = PAIRS) -> Tensor:
        """The contrast of the weak scores, that of the strong ones, for which each video is gated by its own text
        alone, and the Pearson constraint."""
        told, sentence, valid = self.told, text["sentence"], pairs.valid
        frames, patches = self.own(sentence, video)
        weak_TV = told.video * self.similarity(text, video)
        weak_TV = weak_TV + told.weak_frame * self.weak_frames(sentence, video["frames"])
        weak_TV = weak_TV + told.weak_patch * weak(sentence, video["patches"])
        strong_TV = told.strong_frame * sentence @ frames.T + told.strong_patch * sentence @ patches.T
        constraint = (
            told.pearson_video * pearson(sentence, video["video"], valid)
            + told.pearson_frame * pearson(sentence, frames, valid)
            + told.pearson_patch * pearson(sentence, patches, valid)
        )
        return (
            told.weak_loss * contrastive_loss_of(scale * weak_TV, *pairs)
            + told.strong_loss * contrastive_loss_of(scale * strong_TV, *pairs)
            + told.pearson_loss * constraint
        )

    def own(self, sentence: Tensor, video: Parts) -> tuple[Tensor, Tensor]:
        """(B, E) each: videos of as many frames and of patches as their own texts weigh them, through which no gradient
        goes."""
        frames = _own_gated(sentence, video["frames"], video["timed"], SOFT)
        return frames, _own_gated(sentence, video["patches"], video["patches"], SHARP)

    @staticmethod
    def _times(matrix: nn.Linear, x: Tensor) -> Tensor:
        return at_least_float32(matrix(x.to(matrix.weight.dtype)))


def weak(sentence: Tensor, tokens: Tensor) -> Tensor:
    """(T, E), (V, M, E), L2-normalised -> (T, V): the cosines of tokens, weighed by their softmax."""
    cosines = _cosines(sentence, tokens)
    return (cosines * (cosines / SHARP).softmax(-1)).sum(-1)


def gated(sentence: Tensor, keys: Tensor, values: Tensor, temperature: float) -> Tensor:
    """(T, E), (V, M, E) twice -> (T, V, E), L2-normalised: what each text pools of each video."""
    gates = (_cosines(sentence, keys) / temperature).softmax(-1)
    return F.normalize(torch.einsum("tvm,vme->tve", gates, values), dim=-1)


def pearson(text: Tensor, video: Tensor, valid: Tensor | None = None) -> Tensor:
    """How far each dimension of texts and videos is from being correlated, over the batch: a scalar.

    Args:
        text, video: (B, E), row i of both belonging together.
        valid: (B,) bool, the pairs that count; fewer than two have no correlation, and give 0.
    """
    if valid is not None:
        text, video = text[valid], video[valid]
    if len(text) < 2:
        return 0.0 * (text.sum() + video.sum())
    correlation = (_standardised(text) * _standardised(video)).mean(dim=0)
    return _PEARSON * (correlation - 1).square().sum()


def frames_of(frontend: VisualFrontend) -> int:
    """How many frames' embeddings it gives.

    Raises:
        ValueError: a tower that does not pool by CLS tokens, where clips that were joined share one.
    """
    if frontend.shape.pooling != "cls":
        raise ValueError(
            f"eercf weighs the CLS tokens of frames; this tower pools by {frontend.shape.pooling}: choose another "
            "head, such as xpool"
        )
    last = frontend.schedule.layer_counts[-1]
    return last.clips * last.prefix // frontend.shape.num_prefix


def _cosines(sentence: Tensor, tokens: Tensor) -> Tensor:
    return torch.einsum("te,vme->tvm", sentence, tokens)


def _own_gated(sentence: Tensor, keys: Tensor, values: Tensor, temperature: float) -> Tensor:
    gates = (torch.einsum("be,bme->bm", sentence, keys) / temperature).softmax(-1).detach()
    return F.normalize(torch.einsum("bm,bme->be", gates, values), dim=-1)


def _standardised(x: Tensor) -> Tensor:
    """(B, E), each dimension with mean 0 and variance 1 over the batch; one that never varies is 0."""
    return (x - x.mean(dim=0)) / x.std(dim=0).clamp(min=1e-12)
