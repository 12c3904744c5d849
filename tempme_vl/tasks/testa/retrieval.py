"""TESTA's retrieval: contrast with a momentum copy and a queue, and matching with hard negatives, weighted 1 : 1."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from tempme_vl.tasks.losses import draw_negatives, gather_rows, matching_loss, negative_weights, readable_video
from tempme_vl.tasks.testa.contrast import Contrast, Sides, contrast, gather_shared, positives, rank
from tempme_vl.tasks.testa.model import Candidates, MatchingConfig, MatchingModel
from tempme_vl.tasks.testa.pretraining import TestaPretrainingConfig


@dataclass(frozen=True)
class TestaRetrievalConfig(MatchingConfig):
    """config.json of a `TestaRetrievalModel`."""

    __test__ = False
    kind: ClassVar[str] = "testa_retrieval"
    what: ClassVar[str] = "a TESTA retrieval model"


class TestaRetrievalModel(MatchingModel):
    """See `MatchingModel`.

    Attributes:
        candidates, fine_video_parts, fine_text_parts: of re-ranking, as a `SimilarityHead` with two stages has them.
        adds_similarity: the score of re-ranking is the logit of a match and the cosine, which the first stage gave.
    """

    __test__ = False
    folder_config = TestaRetrievalConfig
    also_read = (TestaPretrainingConfig,)
    candidates: ClassVar[int] = 128
    fine_video_parts: ClassVar[tuple[str, ...]] = ("tokens",)
    fine_text_parts: ClassVar[tuple[str, ...]] = ("text_ids", "text_mask")
    adds_similarity: ClassVar[bool] = True

    @staticmethod
    def complete_state(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {key: value for key, value in state.items() if not key.startswith("decoder.")}

    def forward(self, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Encodes what a batch holds of either side; with both sides it also matches them with hard negatives.

        In training, where there are momentum copies, these move a step first and encode both sides, too.

        Args:
            batch: video (B, F, 3, H, W) and frame_mask (B, F), and/or text_ids and text_mask (B, L); with both also
                video_id (B,) int64 and valid (B,).

        Returns:
            video (B, E) and tokens (B, M, D), and/or text (B, E), L2-normalised, and text_ids (B, L); temperature, a
            scalar; with both match (3B, 2) and match_valid (3B,), see `matching_loss`, and of copies momentum_video and
            momentum_text (B, E).
        """
        both = "video" in batch and "text_ids" in batch
        features = {"temperature": self.temperature()}
        if both and self.training and self.options is not None:
            self.follow_once()
        if "video" in batch:
            features["video"], features["tokens"] = self.encode_video(readable_video(batch), batch.get("frame_mask"))
        if "text_ids" in batch:
            features["text"] = self.encode_text(batch["text_ids"], batch["text_mask"])
            features["text_ids"] = batch["text_ids"]
        if both:
            if self.options is not None:
                copies = self.encode_by_copies(batch)
                features["momentum_video"], features["momentum_text"] = copies
            features["match"], features["match_valid"] = self._match_with_negatives(features, batch)
        return features

    def contrast(self, features: Mapping[str, Tensor], batch: Mapping[str, Tensor]) -> Contrast:
        """The logits and targets of contrast; pairs of one video are each other's positives.

        Raises:
            ValueError: a model without momentum copies.
        """
        self.require_copies()
        online = Sides(features["video"], features["text"])
        copies = Sides(features["momentum_video"], features["momentum_text"])
        labels = positives(batch["video_id"], self.queue.ids[0])
        return contrast(online, copies, self.queue, features["temperature"], labels, self.distill)

    def negatives(self, features: Mapping[str, Tensor], batch: Mapping[str, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """How likely each video is drawn for a text, and each text for a video, (B, G) each, and this rank's numbers
        (B,) among the G candidates."""
        video, text, valid = features["video"].detach(), features["text"].detach(), batch["valid"].bool()
        ids = batch["video_id"]
        all_video, all_text, all_ids, all_valid = video, text, ids, valid
        own = torch.arange(len(ids), device=ids.device)
        if self.options is not None and self.options.all_ranks:
            all_video, all_text, all_ids, all_valid = map(gather_rows, (video, text, ids, valid.long()))
            own = own + rank() * len(own)
        same = (ids[:, None] == all_ids) | ~valid[:, None] | ~all_valid.bool()
        temperature = features["temperature"]
        return (
            negative_weights(text @ all_video.T / temperature, same),
            negative_weights(video @ all_text.T / temperature, same),
            own,
        )

    def _match_with_negatives(
        self, features: Mapping[str, Tensor], batch: Mapping[str, Tensor]
    ) -> tuple[Tensor, Tensor]:
        for_text, for_video, own = self.negatives(features, batch)
        other_video, other_text = draw_negatives(for_text, own=own), draw_negatives(for_video, own=own)
        valid = batch["valid"].bool()
        logits = self.match(self.among(features, batch, own), other_video, other_text)
        return logits, torch.cat([valid, valid & (other_video != own), valid & (other_text != own)])

    def among(self, features: Mapping[str, Tensor], batch: Mapping[str, Tensor], own: Tensor) -> Candidates:
        """What negatives are drawn among; other ranks' videos carry gradients back to them."""
        tokens, ids, mask = features["tokens"], batch["text_ids"], batch["text_mask"]
        if self.options is not None and self.options.all_ranks:
            tokens, ids, mask = gather_shared(tokens), gather_rows(ids), gather_rows(mask)
        return Candidates(tokens, ids, mask, own)

    def loss(self, features: Mapping[str, Tensor], batch: Mapping[str, Tensor]) -> Tensor:
        """Contrast of this rank's pairs and matching, 1 : 1. In training the momentum features then go into the queue.

        Raises:
            ValueError: see `contrast` and `FeatureQueue.put`.
        """
        loss = self.contrast(features, batch).loss(batch["valid"].bool())
        if self.training:
            self.enqueue(features, batch)
        return loss + matching_loss(features["match"], features["match_valid"])

    def enqueue(self, features: Mapping[str, Tensor], batch: Mapping[str, Tensor]) -> None:
        """Puts the momentum features of all ranks into the queue."""
        video, text, ids = map(
            gather_rows, (features["momentum_video"], features["momentum_text"], batch["video_id"].long())
        )
        self.queue.put(Sides(video, text), ids)
