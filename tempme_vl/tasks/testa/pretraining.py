"""TESTA's pre-training, as BLIP's: contrast, matching and captions, weighted 1 : 1 : 1."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from tempme_vl.frontend import VisualFrontend
from tempme_vl.precision import at_least_float32
from tempme_vl.tasks.inputs import Inputs
from tempme_vl.tasks.losses import draw_negatives, gather_rows, matching_loss, readable_video
from tempme_vl.tasks.testa.captioning import TestaCaptioner, caption_loss
from tempme_vl.tasks.testa.contrast import Contrast, Sides, contrast
from tempme_vl.tasks.testa.model import Candidates, ContrastOptions, MatchingConfig, MatchingModel
from tempme_vl.text import BertDecoder, BlipTextEncoder
from tempme_vl.text.blip import is_tied, tie
from tempme_vl.weights.exports import part_of

LEAST = 1e-4  # of every negative's weight


@dataclass(frozen=True)
class TestaPretrainingConfig(MatchingConfig):
    """config.json of a `TestaPretrainingModel`."""

    __test__ = False
    kind: ClassVar[str] = "testa_pretraining"
    what: ClassVar[str] = "a pre-trained model of TESTA"


class TestaPretrainingModel(MatchingModel):
    """See `MatchingModel`; and a decoder that writes captions, which shares all but its attention to words with the
    text encoder. In a folder what they share is there once, as the encoder's."""

    __test__ = False
    folder_config = TestaPretrainingConfig
    ramp_epochs = 2

    def __init__(
        self,
        frontend: VisualFrontend,
        text: BlipTextEncoder,
        vocabulary: tuple[str, ...],
        input: Inputs | None = None,
        training: ContrastOptions | None = None,
    ):
        super().__init__(frontend, text, vocabulary, input, training, numbered=False)
        shape = text.shape
        self.decoder = BertDecoder(shape, shape.layers, shape.cross_width)
        tie(self.decoder, text)

    def is_saved(self, name: str) -> bool:
        part, _, rest = name.partition(".")
        return super().is_saved(name) and not (part == "decoder" and is_tied(rest))

    @staticmethod
    def complete_state(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {**state, **{f"decoder.{key}": value for key, value in part_of(state, "text.").items() if is_tied(key)}}

    def forward(self, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """As `TestaRetrievalModel.forward` on a batch of both sides, without video_id; and caption, the scalar loss of
        captions.

        Raises:
            ValueError: a model without momentum copies.
        """
        self.require_copies()
        if self.training:
            self.follow_once()
        features = {"temperature": self.temperature()}
        features["video"], features["tokens"] = self.encode_video(readable_video(batch), batch.get("frame_mask"))
        features["text"] = self.encode_text(batch["text_ids"], batch["text_mask"])
        features["momentum_video"], features["momentum_text"] = self.encode_by_copies(batch)
        valid, own = batch["valid"].bool(), torch.arange(len(batch["valid"]), device=batch["valid"].device)
        other_video, other_text = map(draw_negatives, self.negatives(features, batch))
        among = Candidates(features["tokens"], batch["text_ids"], batch["text_mask"], own)
        features["match"] = self.match(among, other_video, other_text)
        features["match_valid"] = torch.cat([valid, valid & (other_video != own), valid & (other_text != own)])
        counted = batch["text_mask"].bool() & valid.unsqueeze(1)
        features["caption"] = caption_loss(self.decoder, features["tokens"], batch["text_ids"], counted)
        return features

    def captioner(self, prompt: str = "") -> TestaCaptioner:
        """What writes captions, of this model's own modules.

        Args:
            prompt: see `TestaCaptioner`; pre-training has none.
        """
        return TestaCaptioner(self.frontend, self.text.shape, self.vocabulary, prompt, self.decoder)

    def contrast(self, features: Mapping[str, Tensor]) -> Contrast:
        """The logits and targets of contrast; every pair is another."""
        labels = torch.eye(len(features["video"]), len(features["video"]) + self.queue.places)
        return contrast(
            Sides(features["video"], features["text"]),
            Sides(features["momentum_video"], features["momentum_text"]),
            self.queue,
            features["temperature"],
            labels.to(features["video"].device),
            self.distill,
        )

    def negatives(self, features: Mapping[str, Tensor], batch: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        """How likely each video is drawn for a text, and each text for a video, (B, B) each: by the encoders' features
        against the copies' of the same batch, unlike in retrieval."""
        valid, weights = batch["valid"].bool(), []
        for one, other in (("text", "momentum_video"), ("video", "momentum_text")):
            similarity = features[one].detach() @ features[other].T / features["temperature"].detach()
            likely = at_least_float32(similarity).softmax(1) + LEAST
            own = torch.eye(len(likely), dtype=torch.bool, device=likely.device)
            weights.append(likely.masked_fill(own | ~valid[:, None] | ~valid, 0.0))
        return weights[0], weights[1]

    def loss(self, features: Mapping[str, Tensor], batch: Mapping[str, Tensor]) -> Tensor:
        """Contrast, matching and captions. In training the momentum features then go into the queue.

        Raises:
            ValueError: see `FeatureQueue.put`.
        """
        loss = self.contrast(features).loss(batch["valid"].bool())
        if self.training:
            self.queue.put(Sides(gather_rows(features["momentum_video"]), gather_rows(features["momentum_text"])))
        return loss + matching_loss(features["match"], features["match_valid"]) + features["caption"]
