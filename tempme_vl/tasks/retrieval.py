"""Text-video retrieval: a dual encoder and its loss."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch.nn.functional as F
from torch import Tensor, nn

from tempme_vl.card import Card
from tempme_vl.configs import ModelConfig, tower_name
from tempme_vl.families import FAMILIES, Pair, TextSide, find_family, split_name
from tempme_vl.frontend import VisualFrontend, merge_in
from tempme_vl.hub import Shareable, find_folder
from tempme_vl.merging import MergeSchedule, is_of_merging
from tempme_vl.pretrained import CONFIG_FILE, build, load_kind, load_model, save_model
from tempme_vl.schema import LEFT_OUT
from tempme_vl.state import at_least_float32
from tempme_vl.tasks.cards import retrieval_card
from tempme_vl.tasks.inputs import Inputs
from tempme_vl.tasks.losses import LogitScale, contrastive_loss, gather_pairs
from tempme_vl.tasks.umt_retrieval import UMTRetrievalConfig, UMTRetrievalModel, create_umt_retrieval_model
from tempme_vl.text.base import TextEncoder
from tempme_vl.text.tokenizers import ClipWords, Words
from tempme_vl.tuning import Tuning, find_tuning
from tempme_vl.tuning.model import TunableModel
from tempme_vl.weights.exports import load_exported_rest, part_of

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from tempme_vl.hub import HubOptions


@dataclass(frozen=True)
class TunedBy:
    """The tuning whose modules stayed in the model."""

    name: str
    options: Mapping[str, Any]


@dataclass(frozen=True)
class RetrievalConfig(ModelConfig):
    """config.json of a `RetrievalModel`; `text_cfg` is of the library that the text tower comes from."""

    kind: ClassVar[str] = "retrieval"
    what: ClassVar[str] = "a retrieval model"
    text_cfg: Mapping[str, Any]
    input: Inputs
    tuning: TunedBy | None = field(default=None, metadata=LEFT_OUT)

    def __post_init__(self) -> None:
        _text_side(self.frontend.tower.family).check(self.text_cfg, "'text_cfg'")


class RetrievalModel(Shareable, TunableModel):
    """Video and text encoders with one embedding space.

    Args:
        frontend: the visual tower.
        text: the text tower.
        text_config: with which `from_pretrained` builds the text tower again.
        logit_scale: the logarithm of the initial temperature's inverse.
        words: what text ids stand for; default: CLIP's byte pairs.
        input: how frames and captions were sampled and cut in training.
    """

    lora_parts = ("frontend", "text")
    keeps_modules = True

    def __init__(
        self,
        frontend: VisualFrontend,
        text: TextEncoder,
        text_config: Mapping[str, Any],
        logit_scale: float = math.log(1 / 0.07),
        words: Words | None = None,
        input: Inputs | None = None,
    ):
        super().__init__()
        self.frontend, self.text, self.logit_scale = frontend, text, LogitScale(logit_scale)
        self.words: Words = words or ClipWords()
        self.text_config = text_config
        self.input = input or Inputs("fps1", text.max_words(32))

    def forward(self, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Encodes what a batch holds of either side; the one way in under DeepSpeed, which hooks this call.

        Args:
            batch: video (B, F, 3, H, W) and frame_mask (B, F), and/or text_ids and text_mask (B, L).

        Returns:
            video and/or text: (B, E), L2-normalised; scale: exp(logit scale), a scalar.
        """
        features = {"scale": self.logit_scale()}
        if "video" in batch:
            features["video"] = self.encode_video(batch["video"], batch["frame_mask"])
        if "text_ids" in batch:
            features["text"] = self.encode_text(batch["text_ids"], batch["text_mask"])
        return features

    def encode_video(self, video: Tensor, frame_mask: Tensor | None = None) -> Tensor:
        """(B, F, 3, H, W) -> (B, E), L2-normalised; arguments as in `VisualFrontend.forward`."""
        return F.normalize(self.frontend(video, frame_mask).pooled, dim=-1)

    def encode_text(self, ids: Tensor, mask: Tensor) -> Tensor:
        """(B, L) -> (B, E), L2-normalised; ids and mask as `words` gives them."""
        return F.normalize(at_least_float32(self.text(ids, mask)), dim=-1)

    def loss(self, features: Mapping[str, Tensor], batch: Mapping[str, Tensor]) -> Tensor:
        """The contrastive loss over all ranks' pairs.

        Args:
            features: what the model made of the batch.
            batch: video_id, text_id (B,) int64 and valid (B,), see `contrastive_loss`.
        """
        video, text, video_id, text_id, valid = gather_pairs(features, batch)
        weights = self.tuning.loss_weights
        return contrastive_loss(video, text, features["scale"], video_id, text_id, valid, weights)

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recomputes the blocks of both towers in the backward pass."""
        self.frontend.set_grad_checkpointing(enable)
        self.text.grad_checkpointing = enable

    @classmethod
    def from_openai_state_dict(
        cls,
        state: Mapping[str, Tensor],
        heads: int,
        schedule: MergeSchedule,
        text_heads: int | None = None,
        quick_gelu: bool = True,
    ) -> RetrievalModel:
        """A dual encoder on the weights of a whole CLIP ViT; arguments and errors as in `VisualFrontend`'s."""
        from tempme_vl.families import open_clip

        pair = open_clip.pair_from_openai(state, heads, text_heads, quick_gelu)
        frontend = VisualFrontend(pair.backbone, schedule, pair.config)
        frontend.take_clip_positions(pair.backbone.clip_positions)
        return _assemble(frontend, pair)

    def is_new_parameter(self, name: str) -> bool:
        """Whether a parameter was in no pretrained model: TempMe's clip positions, and what tuning added."""
        return super().is_new_parameter(name) or is_of_merging(self, name)

    def input_side(self) -> list[nn.Module]:
        """Token, position and class embeddings, conv1 and ln_pre, which CLIP4Clip freezes."""
        return [self.frontend.embed, self.text.input_side()]

    def openai_state_dict(self) -> dict[str, Tensor]:
        """Both towers' weights and the logit scale under open_clip's names, bit for bit; merging is left out.

        What tuning added is merged into them.

        Raises:
            ValueError: a model that is none of open_clip's with both towers its own, or with modules of a tuning that
                cannot be merged into its weights.
        """
        from tempme_vl.backbones.clip_checkpoint import to_openai_names
        from tempme_vl.backbones.open_clip import Config

        given = self.frontend.config
        if not isinstance(given, Config) or given.family != "open_clip" or given.is_mixed:
            raise ValueError(f"OpenAI's names are those of CLIP; this model is of {tower_name(given)!r}")
        if self.tuning.stays:
            raise ValueError(
                f"CLIP's names are those of its towers; {self.tuning} has added modules that cannot be merged into them"
            )
        state = self.plain_state()
        visual = self.frontend.openai_state_dict(part_of(state, "frontend."))
        text = to_openai_names(part_of(state, "text."))
        scale = self.logit_scale.log_scale.detach().squeeze(0)
        return {**{f"visual.{key}": value for key, value in visual.items()}, **text, "logit_scale": scale}

    def save_pretrained(self, directory: str | Path, state: Mapping[str, Tensor] | None = None) -> None:
        """Writes config.json, model.safetensors, README.md and the words' files; what tuning added is merged into plain
        weights where it can be, and else saved beside them.

        Args:
            state: full weights when the module's own are partitioned (ZeRO-3) or half precision; default its own.
        """
        Path(directory).mkdir(parents=True, exist_ok=True)
        self.words.save(Path(directory))
        tuned = self.tuning_config()
        config = RetrievalConfig(
            self.frontend.full_config(), self.text_config, self.input, None if tuned is None else TunedBy(**tuned)
        )
        save_model(directory, config, self.plain_state(state), self.card())

    def card(self) -> Card:
        """What is known of it, for people (`tempme_vl.card`)."""
        return retrieval_card(self.frontend, self.input, self.tuning)

    @classmethod
    def from_pretrained(cls, source: str | Path, **hub: Unpack[HubOptions]) -> RetrievalModel:
        """Reads what `save_pretrained` wrote.

        Args:
            source, hub: see `VisualFrontend.from_pretrained`.

        Raises:
            ValueError: a folder without the two files, one of another kind of model, or weights that do not fit; or see
                `tempme_vl.hub.find_folder`.
        """
        directory = find_folder(source, **hub)
        config, state = load_model(directory, RetrievalConfig)
        tower, place = config.frontend.tower, f"{directory / CONFIG_FILE}, 'frontend'"

        def make() -> RetrievalModel:
            frontend = VisualFrontend.from_config(config.frontend, place)
            texts = _text_side(tower.family).build(tower, dict(config.text_cfg), directory)
            model = cls(frontend, texts.tower, config.text_cfg, words=texts.words, input=config.input)
            if config.tuning is not None:
                model.extend(find_tuning(config.tuning.name, config.tuning.options))
            return model

        return build(make, state, directory)


AnyRetrievalModel = RetrievalModel | UMTRetrievalModel


def create_retrieval_model(
    name: str,
    pretrained: str | None = None,
    method: str = "tempme",
    num_frames: int = 12,
    tuning: str | Tuning = "full",
    *,
    clip_position_std: float = 0.0,
    vocabulary: tuple[str, ...] | None = None,
    **options: Any,
) -> AnyRetrievalModel:
    """A retrieval model by name: a dual encoder of two towers, or UMT's with fusion layers.

    Args:
        name: "family:model" of a model with a text tower: open_clip's CLIP, SigLIP and others, "umt:b16", or "hf:" and
            a CLIP, SigLIP or SigLIP 2 of transformers.
        tuning: what of it trains, one of `tempme_vl.TUNINGS` or an instance with options, `Lora(rank=16)`.
        vocabulary: words of UMT's text side (`create_umt_retrieval_model`); other models have their own.
        others: as in `tempme_vl.create_frontend`, with its errors.

    Raises:
        ValueError: see `create_frontend`, `find_tuning` and the tuning's `apply`; or a family without text towers.
    """
    way, family = find_tuning(tuning), find_family(name)
    made: AnyRetrievalModel
    if family.needs_vocabulary:
        if vocabulary is None:
            raise ValueError(
                f"the text side of {name!r} needs its vocabulary: see tempme_vl.text.tokenizers.bert_vocabulary"
            )
        made = create_umt_retrieval_model(
            name, vocabulary, pretrained, method, num_frames, clip_position_std, **options
        )
    else:
        family_name, model = split_name(name)
        side = _text_side(family_name)
        tower_options = {key: options.pop(key) for key in side.options if key in options}
        pair = side.load(model, pretrained, num_frames, **tower_options)
        frontend = merge_in(pair.backbone, pair.config, method, num_frames, clip_position_std, **options)
        made = _assemble(frontend, pair)
    made.tune(way)
    return made


def load_retrieval_model(source: str | Path, **hub: Unpack[HubOptions]) -> AnyRetrievalModel:
    """Reads what `save_pretrained` of either model wrote.

    Args:
        source, hub: a folder, or a name on the Hugging Face hub with its options (`VisualFrontend.from_pretrained`).

    Raises:
        ValueError: see their `from_pretrained`.
    """
    directory = find_folder(source, **hub)
    of_umt = load_kind(directory) == UMTRetrievalConfig.kind
    return (UMTRetrievalModel if of_umt else RetrievalModel).from_pretrained(directory)


def _text_side(family: str) -> TextSide:
    """Raises:
    ValueError: a family without one.
    """
    side = FAMILIES[family].texts
    if side is None:
        known = [name for name in FAMILIES if FAMILIES[name].texts is not None or FAMILIES[name].needs_vocabulary]
        raise ValueError(
            f"retrieval needs a text tower, which no model of {family!r} has; models of {', '.join(known)} have one"
        )
    return side


def _assemble(frontend: VisualFrontend, pair: Pair) -> RetrievalModel:
    model = RetrievalModel(frontend, pair.texts.tower, pair.text_config, pair.log_scale, pair.texts.words)
    if pair.export is None:
        return model
    if pair.export.kind == RetrievalConfig.kind:
        load_exported_rest(model, pair.export)
    else:
        raise ValueError(f"{pair.export.folder} holds a {pair.export.kind} model, without a text tower for retrieval")
    return model
