"""UMT's retrieval model: two encoders as in CLIP, and fusion layers that judge whether a caption and a video match.

Letters: K what stands for the frames of a video (`FrontendOutput.frames`), L words; others as in `tempme_vl.state`.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tempme_vl.backbones.umt import Mode
from tempme_vl.backbones.umt_checkpoint import KeyReport, convert, read_checkpoint
from tempme_vl.card import Card
from tempme_vl.configs import ModelConfig
from tempme_vl.families import split_name
from tempme_vl.frontend import VisualFrontend, create_frontend
from tempme_vl.hub import Shareable, find_folder
from tempme_vl.merging import MergeSchedule, is_of_merging
from tempme_vl.precision import at_least_float32
from tempme_vl.pretrained import CONFIG_FILE, build, load_model, load_vocabulary, save_model
from tempme_vl.tasks.cards import retrieval_card
from tempme_vl.tasks.inputs import Inputs
from tempme_vl.tasks.losses import (
    Temperature,
    draw_negatives,
    gather_pairs,
    matching_loss,
    negative_weights,
    readable_video,
    same_pairs,
    soft_contrastive_loss,
)
from tempme_vl.tasks.umt_text import TEXT_OF, load_bert_side
from tempme_vl.text import BertFusion, BertShape, BertTextEncoder, VideoKeys, bert_from_umt
from tempme_vl.text.tokenizers import BertWords
from tempme_vl.tuning.model import TunableModel
from tempme_vl.weights.exports import find_export, load_exported_rest, part_of, require_vocabulary

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from tempme_vl.hub import HubOptions

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class UMTRetrievalConfig(ModelConfig):
    """config.json of a `UMTRetrievalModel`."""

    kind: ClassVar[str] = "umt_retrieval"
    what: ClassVar[str] = "a UMT retrieval model"
    text: BertShape
    input: Inputs


class UMTRetrievalModel(Shareable, TunableModel):
    """Video and text encoders with one embedding space, and fusion layers with a matching head (UMT, section 3.2).

    Args:
        frontend: the visual tower; its normed tokens are what captions attend to in fusion.
        text, fusion: BERT's lower and upper layers.
        vocabulary: the words that text ids stand for, in order.
        input: how videos and captions were sampled and cut in training.

    Attributes:
        candidates, fine_video_parts, fine_text_parts: of re-ranking, as a `SimilarityHead` with two stages has them.
        adds_similarity: whether the score of re-ranking is the logit of a match and the cosine.
    """

    candidates: ClassVar[int] = 128
    fine_video_parts: ClassVar[tuple[str, ...]] = ("tokens",)
    fine_text_parts: ClassVar[tuple[str, ...]] = ("states", "text_mask")
    adds_similarity: ClassVar[bool] = False
    lora_parts = ("frontend", "text", "fusion")

    def __init__(
        self,
        frontend: VisualFrontend,
        text: BertTextEncoder,
        fusion: BertFusion,
        vocabulary: tuple[str, ...],
        input: Inputs | None = None,
    ):
        super().__init__()
        width = text.shape.width
        self.frontend, self.text, self.fusion, self.words = frontend, text, fusion, BertWords(vocabulary)
        self.text_proj = nn.Linear(width, frontend.shape.embed_dim)
        self.match_head = nn.Linear(width, 2)
        self.temperature = Temperature()
        self.input = input or Inputs("segment", 32)

    @property
    def vocabulary(self) -> tuple[str, ...]:
        """The words that text ids stand for, in order."""
        return self.words.vocabulary

    def forward(self, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Encodes what a batch holds of either side; with both sides it also matches them with hard negatives.

        Args:
            batch: video (B, F, 3, H, W) and frame_mask (B, F), and/or text_ids and text_mask (B, L); with both also
                video_id, text_id (B,) int64 and valid (B,).

        Returns:
            video (B, E) and tokens (B, M, D), and/or text (B, E), L2-normalised, and states (B, L, D_text);
            temperature, a scalar; with both match (3B, 2) and match_valid (3B,), see `matching_loss`.
        """
        features = {"temperature": self.temperature()}
        if "video" in batch:
            features["video"], features["tokens"] = self.encode_video(readable_video(batch), batch["frame_mask"])
        if "text_ids" in batch:
            features["text"], features["states"] = self.encode_text(batch["text_ids"], batch["text_mask"])
        if "video" in batch and "text_ids" in batch:
            features["match"], features["match_valid"] = self._match_with_negatives(features, batch)
        return features

    def encode_video(self, video: Tensor, frame_mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """(B, F, 3, H, W) -> (B, E), mean of normalised frame embeddings, not normalised again; (B, M, D) tokens."""
        output = self.frontend(video, frame_mask)
        return output.pooled, self.frontend.norm(output.tokens)

    def encode_text(self, ids: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """(B, L) -> (B, E), L2-normalised, from the first word; (B, L, D_text) states of all words."""
        states = self.text(ids, mask)
        return F.normalize(at_least_float32(self.text_proj(states[:, 0])), dim=-1), states

    def keys_values(self, tokens: Tensor) -> VideoKeys:
        """(B, M, D) tokens -> what fusion needs of each video, computed once for all its captions."""
        return self.fusion.keys_values(tokens)

    def fuse(self, states: Tensor, mask: Tensor, keys: VideoKeys) -> Tensor:
        """P captions' states (P, L, D_text) and mask (P, L), each with its video -> (P, 2), index 1 for a match."""
        return self.match_head(self.fusion(states, mask, keys)[:, 0])

    def match_logits(self, states: Tensor, mask: Tensor, keys: VideoKeys) -> Tensor:
        """As `fuse`, (P,): the logit of a match alone."""
        return self.fuse(states, mask, keys)[:, 1]

    def _match_with_negatives(
        self, features: Mapping[str, Tensor], batch: Mapping[str, Tensor]
    ) -> tuple[Tensor, Tensor]:
        valid = batch["valid"].bool()
        same = same_pairs(batch["video_id"], batch["text_id"])
        similarity_TV = features["text"] @ features["video"].T / features["temperature"]
        own = torch.arange(len(valid), device=valid.device)
        other_video = draw_negatives(negative_weights(similarity_TV, same, valid))
        other_text = draw_negatives(negative_weights(similarity_TV.T, same, valid))
        text, video = torch.cat([own, own, other_text]), torch.cat([own, other_video, own])
        keys = self.keys_values(features["tokens"])
        logits = self.fuse(features["states"][text], batch["text_mask"][text], keys.select(video))
        return logits, torch.cat([valid, valid & (other_video != own), valid & (other_text != own)])

    def loss(self, features: Mapping[str, Tensor], batch: Mapping[str, Tensor]) -> Tensor:
        """VTC over all ranks' pairs plus VTM over this rank's, weighted 1 : 1 (UMT's fine-tuning)."""
        video, text, video_id, text_id, valid = gather_pairs(features, batch)
        same = same_pairs(video_id, text_id)
        contrast = soft_contrastive_loss(video, text, features["temperature"], same, valid)
        return contrast + matching_loss(features["match"], features["match_valid"])

    def is_new_parameter(self, name: str) -> bool:
        """Whether a parameter was in no pretrained model: TempMe's clip positions, and what tuning added."""
        return super().is_new_parameter(name) or is_of_merging(self, name)

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recomputes the blocks of all parts in the backward pass."""
        self.frontend.set_grad_checkpointing(enable)
        self.text.grad_checkpointing = self.fusion.grad_checkpointing = enable

    def save_pretrained(self, directory: str | Path, state: Mapping[str, Tensor] | None = None) -> None:
        """Writes config.json, vocab.txt, model.safetensors, README.md; what tuning added is merged into plain weights.

        Args:
            state: full weights when the module's own are partitioned (ZeRO-3) or half precision; default its own.
        """
        config = UMTRetrievalConfig(self.frontend.full_config(), self.text.shape, self.input)
        Path(directory).mkdir(parents=True, exist_ok=True)
        self.words.save(Path(directory))
        save_model(directory, config, self.plain_state(state), self.card())

    def card(self) -> Card:
        """What is known of it, for people (`tempme_vl.card`)."""
        return retrieval_card(self.frontend, self.input, self.tuning)

    @classmethod
    def from_umt_state_dict(
        cls,
        state: Mapping[str, Tensor],
        heads: int,
        text_heads: int,
        image_size: int,
        mode: Mode,
        schedule: MergeSchedule,
        vocabulary: tuple[str, ...] = (),
    ) -> UMTRetrievalModel:
        """A model on UMT-named weights with a text side; all other sizes follow from their shapes.

        Args:
            heads, text_heads: of the visual and the text tower.
            others: see `VisualFrontend.from_umt_state_dict`.

        Raises:
            ValueError: weights of another family, or missing or unknown keys.
        """
        frontend = VisualFrontend.from_umt_state_dict(state, heads, image_size, mode, schedule)
        text, fusion = bert_from_umt(part_of(convert(state, "retrieval").state, "text_encoder."), text_heads)
        model = cls(frontend, text, fusion, vocabulary)
        if trouble := load_umt_text(model, state).trouble:
            raise ValueError(f"not the weights of UMT's retrieval model: {trouble}")
        return model

    @classmethod
    def from_pretrained(cls, source: str | Path, **hub: Unpack[HubOptions]) -> UMTRetrievalModel:
        """Reads what `save_pretrained` wrote.

        Args:
            source, hub: see `VisualFrontend.from_pretrained`.

        Raises:
            ValueError: a folder without the files, one of another kind of model, or weights that do not fit; or see
                `tempme_vl.hub.find_folder`.
        """
        directory = find_folder(source, **hub)
        config, state = load_model(directory, UMTRetrievalConfig)
        shape = config.text
        vocabulary = load_vocabulary(directory, shape.vocab_size)

        def make() -> UMTRetrievalModel:
            frontend = VisualFrontend.from_config(config.frontend, f"{directory / CONFIG_FILE}, 'frontend'")
            return cls(frontend, BertTextEncoder(shape), BertFusion(shape), vocabulary, config.input)

        return build(make, state, directory)


def create_umt_retrieval_model(
    name: str,
    vocabulary: tuple[str, ...],
    pretrained: str | None = None,
    method: str = "tempme",
    num_frames: int = 12,
    clip_position_std: float = 0.0,
    **options: Any,
) -> UMTRetrievalModel:
    """UMT's retrieval model by name ("umt:tiny", "umt:b16", "umt:l16").

    Args:
        vocabulary: words in the order of their ids (`tempme_vl.text.tokenizers.bert_vocabulary` for public weights).
        pretrained: a public UMT checkpoint in any form, or a folder that this package wrote, whose vocabulary it must
            be; what it lacks starts at random. None for random weights.
        others: see `tempme_vl.create_frontend`.

    Raises:
        ValueError: see `tempme_vl.create_frontend`; or a vocabulary of another size than the checkpoint's.
    """
    family, model_name = split_name(name)
    if family != "umt":
        raise ValueError(f"expected one of UMT's models, such as 'umt:b16'; got {name!r}")
    frontend = create_frontend(name, pretrained, method, num_frames, clip_position_std, **options)
    shape = BertShape.named(TEXT_OF[model_name], cross_width=frontend.shape.width, vocab_size=len(vocabulary))
    model = UMTRetrievalModel(frontend, BertTextEncoder(shape), BertFusion(shape), vocabulary)
    if pretrained is None:
        return model
    export = find_export(pretrained)
    if export is None:
        _log.info("%s", load_umt_text(model, read_checkpoint(pretrained)))
    elif export.kind == UMTRetrievalConfig.kind:
        require_vocabulary(export, vocabulary)
        load_exported_rest(model, export)
    else:
        _log.warning("%s: a %s model has no text side for retrieval, which starts at random", pretrained, export.kind)
    return model


def load_umt_text(model: UMTRetrievalModel, state: Mapping[str, Tensor]) -> KeyReport:
    """Loads the text side, the projections and the temperature of a public UMT checkpoint, as far as it has them.

    Returns:
        what became of every key of the file, the visual ones included.

    Raises:
        ValueError: a text side of other sizes than the model's.
    """
    converted = convert(state, "retrieval", model.text.shape.fusion_layer)
    load_bert_side(model.text, model.fusion, part_of(converted.state, "text_encoder."))
    renamed = {"text_proj": "text_proj", "itm_head": "match_head"}
    heads_state = {
        f"{ours}.{part}": converted.state[f"{theirs}.{part}"]
        for theirs, ours in renamed.items()
        for part in ("weight", "bias")
        if f"{theirs}.{part}" in converted.state
    }
    if "temp" in converted.state:
        heads_state["temperature.temperature"] = converted.state["temp"].reshape(1)
    try:
        model.load_state_dict(heads_state, strict=False)
    except RuntimeError as error:
        raise ValueError(f"the checkpoint's projections do not fit the model: {error}") from error
    return converted.report
