"""TESTA's retrieval: contrast with a momentum copy and a queue, and matching with hard negatives, weighted 1 : 1."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from tempme_vl.backbones.testa_checkpoint import read_checkpoint
from tempme_vl.card import Card
from tempme_vl.configs import ModelConfig
from tempme_vl.families import split_name
from tempme_vl.frontend import VisualFrontend, create_frontend
from tempme_vl.hub import Shareable, find_folder
from tempme_vl.pretrained import CONFIG_FILE, build, load_model, load_vocabulary, save_model
from tempme_vl.tasks.cards import retrieval_card
from tempme_vl.tasks.inputs import Inputs
from tempme_vl.tasks.losses import draw_negatives, gather_rows, matching_loss, negative_weights
from tempme_vl.tasks.testa.contrast import Contrast, Sides, contrast, gather_shared, positives, rank
from tempme_vl.tasks.testa.model import TEXT_OF, Candidates, ContrastOptions, MatchingModel, readable_video
from tempme_vl.tasks.testa.public import load_public
from tempme_vl.text import BlipShape, BlipTextEncoder, blip_vocabulary
from tempme_vl.weights.exports import find_export, load_exported_rest, require_vocabulary

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from tempme_vl.hub import HubOptions

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class TestaRetrievalConfig(ModelConfig):
    """config.json of a `TestaRetrievalModel`."""

    __test__ = False
    kind: ClassVar[str] = "testa_retrieval"
    what: ClassVar[str] = "a TESTA retrieval model"
    text: BlipShape
    input: Inputs


class TestaRetrievalModel(Shareable, MatchingModel):
    """See `MatchingModel`.

    Args:
        frontend, text, vocabulary, training: see there.
        input: how videos and texts were sampled and cut in training.

    Attributes:
        candidates, fine_video_parts, fine_text_parts: of re-ranking, as a `SimilarityHead` with two stages has them.
        adds_similarity: the score of re-ranking is the logit of a match and the cosine, which the first stage gave.
    """

    __test__ = False
    candidates: ClassVar[int] = 128
    fine_video_parts: ClassVar[tuple[str, ...]] = ("tokens",)
    fine_text_parts: ClassVar[tuple[str, ...]] = ("text_ids", "text_mask")
    adds_similarity: ClassVar[bool] = True

    def __init__(
        self,
        frontend: VisualFrontend,
        text: BlipTextEncoder,
        vocabulary: tuple[str, ...],
        input: Inputs | None = None,
        training: ContrastOptions | None = None,
    ):
        super().__init__(frontend, text, vocabulary, training)
        self.input = input or Inputs("uniform", 64)

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
            self.follow()
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
        if self.options is None:
            raise ValueError("contrast wants momentum copies and a queue: create the model with `training` options")
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

    def save_pretrained(self, directory: str | Path, state: Mapping[str, Tensor] | None = None) -> None:
        """Writes config.json, vocab.txt, model.safetensors, README.md; what tuning added is merged into plain weights,
        and momentum copies and queue are left out.

        Args:
            state: full weights when the module's own are partitioned (ZeRO-3) or half precision; default its own.
        """
        config = TestaRetrievalConfig(self.frontend.full_config(), self.text.shape, self.input)
        Path(directory).mkdir(parents=True, exist_ok=True)
        self.words.save(Path(directory))
        save_model(directory, config, self.inference_state(state), self.card())

    def card(self) -> Card:
        """What is known of it, for people (`tempme_vl.card`)."""
        return retrieval_card(self.frontend, self.input, self.tuning)

    @classmethod
    def from_pretrained(cls, source: str | Path, **hub: Unpack[HubOptions]) -> TestaRetrievalModel:
        """Reads what `save_pretrained` wrote.

        Args:
            source, hub: see `VisualFrontend.from_pretrained`.

        Raises:
            ValueError: a folder without the files, one of another kind of model, or weights that do not fit; or see
                `tempme_vl.hub.find_folder`.
        """
        directory = find_folder(source, **hub)
        config, state = load_model(directory, TestaRetrievalConfig)
        vocabulary = load_vocabulary(directory, config.text.vocab_size)

        def make() -> TestaRetrievalModel:
            frontend = VisualFrontend.from_config(config.frontend, f"{directory / CONFIG_FILE}, 'frontend'")
            return cls(frontend, BlipTextEncoder(config.text), vocabulary, config.input)

        return build(make, state, directory)


def create_testa_retrieval_model(
    name: str,
    vocabulary: tuple[str, ...],
    pretrained: str | None = None,
    method: str = "testa",
    num_frames: int = 32,
    training: ContrastOptions | None = None,
    **options: Any,
) -> TestaRetrievalModel:
    """TESTA's retrieval model by name ("testa:tiny", "testa:b16").

    Args:
        vocabulary: BERT's words in the order of their ids (`tempme_vl.text.tokenizers.bert_vocabulary` for public
            weights); [DEC] and [ENC] are added where they are not there.
        pretrained: a public file of BLIP or TESTA, or a folder that this package wrote, whose vocabulary it must be;
            what it lacks starts at random. None for random weights. Momentum copies start as copies where it has none.
        training: to train it, see `ContrastOptions`.
        others: see `tempme_vl.create_frontend`.

    Raises:
        ValueError: see `tempme_vl.create_frontend`; or a vocabulary of another size than the checkpoint's.
    """
    family, model_name = split_name(name)
    if family != "testa":
        raise ValueError(f"expected one of TESTA's models, such as 'testa:b16'; got {name!r}")
    frontend = create_frontend(name, pretrained, method, num_frames, **options)
    words = blip_vocabulary(vocabulary)
    shape = BlipShape.named(TEXT_OF[model_name], cross_width=frontend.shape.width, vocab_size=len(words))
    model = TestaRetrievalModel(frontend, BlipTextEncoder(shape), words, training=training)
    if pretrained is None:
        return model
    export = find_export(pretrained)
    if export is None:
        _log.info("%s: %s", pretrained, load_public(model, read_checkpoint(pretrained)))
    elif export.kind == TestaRetrievalConfig.kind:
        require_vocabulary(export, words)
        load_exported_rest(model, export, ("momentum.", "queue."))
        model.reset_copies()
    else:
        _log.warning("%s: a %s model has no text side for retrieval, which starts at random", pretrained, export.kind)
    return model
