"""Text-video retrieval: two towers, and a head that compares what they give."""

from __future__ import annotations

import logging
import math
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, cast

from torch import Tensor, nn

from tempme_vl.card import Card
from tempme_vl.configs import ModelConfig, tower_name
from tempme_vl.families import FAMILIES, Pair, TextSide, find_family, split_name
from tempme_vl.fit import load_strictly
from tempme_vl.frontend import VisualFrontend, merge_in
from tempme_vl.hub import Shareable, find_folder
from tempme_vl.merging import MergeSchedule, is_of_merging
from tempme_vl.pretrained import CONFIG_FILE, build, load_kind, load_model, save_model
from tempme_vl.schema import LEFT_OUT, read
from tempme_vl.tasks.cards import retrieval_card
from tempme_vl.tasks.heads import find_head, read_options
from tempme_vl.tasks.inputs import Inputs
from tempme_vl.tasks.losses import LogitScale, Pairs, gather_ids, gather_rows, readable
from tempme_vl.tasks.similarity.base import PairContext, SimilarityHead
from tempme_vl.tasks.similarity.mean import MeanHead
from tempme_vl.tasks.testa.create import create_testa_retrieval_model
from tempme_vl.tasks.testa.model import CONTRAST, ContrastOptions
from tempme_vl.tasks.testa.pretraining import TestaPretrainingConfig
from tempme_vl.tasks.testa.retrieval import TestaRetrievalConfig, TestaRetrievalModel
from tempme_vl.tasks.umt_retrieval import UMTRetrievalConfig, UMTRetrievalModel, create_umt_retrieval_model
from tempme_vl.text.base import TextEncoder
from tempme_vl.text.tokenizers import CLIPWords, Words
from tempme_vl.tuning import Tuning, find_tuning
from tempme_vl.tuning.model import TunableModel
from tempme_vl.weights.exports import Export, find_export, load_exported_rest, part_of

_log = logging.getLogger("tempme_vl.tasks")

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
    head: str = field(default="mean", metadata=LEFT_OUT)
    head_options: Mapping[str, Any] = field(default_factory=dict, metadata=LEFT_OUT)

    def __post_init__(self) -> None:
        find_head(self.head, "retrieval")
        _text_side(self.frontend.tower.family).check(self.text_cfg, "'text_cfg'")


class RetrievalModel(Shareable, TunableModel):
    """Video and text encoders with one embedding space, and a head that compares what they give.

    Args:
        frontend: the visual tower.
        text: the text tower.
        text_config: with which `from_pretrained` builds the text tower again.
        logit_scale: the logarithm of the initial temperature's inverse.
        words: what text ids stand for; default: CLIP's byte pairs.
        input: how frames and captions were sampled and cut in training.
        head: default: the cosine of the mean of the frames with the text.
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
        head: SimilarityHead | None = None,
    ):
        super().__init__()
        self.frontend, self.text, self.logit_scale = frontend, text, LogitScale(logit_scale)
        self.head = head or MeanHead()
        self.words: Words = words or CLIPWords()
        self.text_config = text_config
        self.input = input or Inputs("fps1", text.max_words(32))

    def forward(self, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Encodes what a batch holds of either side; the one way in under DeepSpeed, which hooks this call.

        Args:
            batch: video (B, F, 3, H, W) and frame_mask (B, F), and/or text_ids and text_mask (B, L).

        Returns:
            what the head makes of video and/or text, with the head "mean" (B, E), L2-normalised; scale: exp(logit
            scale), a scalar; of a head with weights, given both sides and valid, the loss of all ranks' pairs.
        """
        features = {"scale": self.logit_scale()}
        if "video" in batch:
            features |= self.head.encode_video(self.frontend, self.frontend(batch["video"], batch["frame_mask"]))
        if "text_ids" in batch:
            features |= self.head.encode_text(self.text, batch["text_ids"], batch["text_mask"])
        if self.head.learns and "valid" in batch and "video" in batch and "text_ids" in batch:
            features["loss"] = self._loss(features, batch)  # here, and not in `loss`: DeepSpeed hooks this call
        return features

    def encode_video(self, video: Tensor, frame_mask: Tensor | None = None) -> Tensor:
        """(B, F, 3, H, W) -> what the head makes of videos, with "mean" (B, E), L2-normalised.

        Arguments as in `VisualFrontend.forward`.
        """
        return self.head.encode_video(self.frontend, self.frontend(video, frame_mask))["video"]

    def encode_text(self, ids: Tensor, mask: Tensor) -> Tensor:
        """(B, L) -> what the head makes of texts, with "mean" (B, E), L2-normalised; see `words` for both."""
        return self.head.encode_text(self.text, ids, mask)["text"]

    def loss(self, features: Mapping[str, Tensor], batch: Mapping[str, Tensor]) -> Tensor:
        """The head's loss over all ranks' pairs.

        Args:
            features: what the model made of the batch.
            batch: video_id, text_id (B,) int64 and valid (B,), see `contrastive_loss_of`; it may hold parts that the
                head compares, too.
        """
        return features["loss"] if "loss" in features else self._loss(features, batch)

    def _loss(self, features: Mapping[str, Tensor], batch: Mapping[str, Tensor]) -> Tensor:
        there, head, pairs = {**batch, **features}, self.head, Pairs(*gather_ids(batch), self.tuning.loss_weights)
        videos, texts = (*head.video_parts, *head.fine_video_parts), (*head.text_parts, *head.fine_text_parts)
        video = {name: readable(gather_rows(there[name]), pairs.valid) for name in videos}
        text = {name: gather_rows(there[name]) for name in texts}
        return head.loss(text, video, features["scale"], pairs)

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
        """Whether a parameter was in no pretrained model: TempMe's clip positions, the head's, what tuning added."""
        if super().is_new_parameter(name) or is_of_merging(self, name):
            return True
        own = name.removeprefix("head.")
        return own != name and any(re.search(pattern, own) for pattern in self.head.new_parameters)

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
            self.frontend.full_config(),
            self.text_config,
            self.input,
            None if tuned is None else TunedBy(**tuned),
            self.head.name,
            asdict(self.head.told),
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
        kind = cast(type[SimilarityHead], find_head(config.head, "retrieval"))
        told = read_options(config.head, config.head_options)

        def make() -> RetrievalModel:
            frontend = VisualFrontend.from_config(config.frontend, place)
            texts = _text_side(tower.family).build(tower, dict(config.text_cfg), directory)
            head = kind.create(PairContext(frontend, texts.tower), told)
            model = cls(frontend, texts.tower, config.text_cfg, words=texts.words, input=config.input, head=head)
            if config.tuning is not None:
                model.extend(find_tuning(config.tuning.name, config.tuning.options))
            return model

        return build(make, state, directory)


# with a text encoder that sees the video, and a head that judges whether both match
MatchingRetrievalModel = UMTRetrievalModel | TestaRetrievalModel
AnyRetrievalModel = RetrievalModel | MatchingRetrievalModel


def create_retrieval_model(
    name: str,
    pretrained: str | None = None,
    method: str = "tempme",
    num_frames: int = 12,
    tuning: str | Tuning = "full",
    head: str = "mean",
    *,
    clip_position_std: float = 0.0,
    vocabulary: tuple[str, ...] | None = None,
    **options: Any,
) -> AnyRetrievalModel:
    """A retrieval model by name: a dual encoder of two towers, or UMT's or TESTA's, which also match pairs.

    Args:
        name: "family:model" of a model with a text tower: open_clip's CLIP, SigLIP and others, "umt:b16", "testa:b16",
            or "hf:" and a CLIP, SigLIP or SigLIP 2 of transformers.
        tuning: what of it trains, one of `tempme_vl.TUNINGS` or an instance with options, `Lora(rank=16)`.
        head: what compares videos and texts, one of `tempme_vl.HEADS`, such as "mean", "xpool", "seqtransf", "eercf".
        vocabulary: words of UMT's and TESTA's text side (`create_umt_retrieval_model`); other models have their own.
        options: the head's own, and those of `tempme_vl.create_frontend`, as all others; for TESTA those of
            `tempme_vl.tasks.testa.model.ContrastOptions`.

    Raises:
        ValueError: see `create_frontend`, `find_tuning` and the tuning's `apply`, `find_head` and the head; or a family
            without text towers.
    """
    way, family = find_tuning(tuning), find_family(name)
    kind = cast(type[SimilarityHead], find_head(head, "retrieval"))
    own = {field.name for field in fields(kind.options)}
    told = read_options(head, {key: options.pop(key) for key in own & options.keys()})
    made: AnyRetrievalModel
    if family.needs_vocabulary:
        if head != "mean":
            raise ValueError(f"{name!r} has layers of its own that compare videos and texts: leave the head 'mean'")
        if vocabulary is None:
            raise ValueError(
                f"the text side of {name!r} needs its vocabulary: see tempme_vl.text.tokenizers.bert_vocabulary"
            )
        given = name, vocabulary, pretrained, method, num_frames
        if split_name(name)[0] == "testa":
            contrast = {key: options.pop(key) for key in CONTRAST if key in options}
            training = read(ContrastOptions, contrast, f"contrast of {name!r}")
            made = create_testa_retrieval_model(*given, training, **options)
        else:
            made = create_umt_retrieval_model(*given, clip_position_std, **options)
    else:
        family_name, model = split_name(name)
        side = _text_side(family_name)
        tower_options = {key: options.pop(key) for key in side.options if key in options}
        pair = side.load(model, pretrained, num_frames, **tower_options)
        frontend = merge_in(pair.backbone, pair.config, method, num_frames, clip_position_std, **options)
        made = _assemble(frontend, pair, kind.create(PairContext(frontend, pair.texts.tower), told))
        if made.head.learns and pretrained is not None:
            if export := find_export(pretrained):
                _load_head(made.head, export)
            elif pair.beside:
                _load_public_head(made.head, pair.beside, pretrained)
    made.tune(way)
    return made


def load_retrieval_model(source: str | Path, **hub: Unpack[HubOptions]) -> AnyRetrievalModel:
    """Reads what `save_pretrained` of any of these models wrote, or of TESTA's pre-training.

    Args:
        source, hub: a folder, or a name on the Hugging Face hub with its options (`VisualFrontend.from_pretrained`).

    Raises:
        ValueError: see their `from_pretrained`.
    """
    directory = find_folder(source, **hub)
    kinds: dict[str, type[AnyRetrievalModel]] = {
        UMTRetrievalConfig.kind: UMTRetrievalModel,
        TestaRetrievalConfig.kind: TestaRetrievalModel,
        TestaPretrainingConfig.kind: TestaRetrievalModel,
    }
    return kinds.get(load_kind(directory), RetrievalModel).from_pretrained(directory)


def _load_head(head: SimilarityHead, export: Export) -> None:
    """Starts a head from a folder of the package, where that has the same.

    Raises:
        ValueError: weights that do not fit.
    """
    theirs = export.config.get("head", "mean") if export.kind == RetrievalConfig.kind else "none"
    if theirs == head.name:
        load_strictly(head, part_of(export.state, "head."), f"the head of {export.folder}")
    else:
        _log.warning("%s: its head is %s, so %s starts anew", export.folder, theirs, head.name)


def _load_public_head(head: SimilarityHead, beside: Mapping[str, Tensor], source: str) -> None:
    """Starts a head from what lies beside CLIP in a file of its authors, where that has all of it.

    Raises:
        ValueError: weights that do not fit.
    """
    theirs = head.from_public(beside)
    if theirs.keys() >= head.state_dict().keys():
        load_strictly(head, theirs, f"the head in {source}")
        _log.info("%s: %d weights of the head %s", source, len(theirs), head.name)
    else:
        _log.warning("%s holds no whole head %s, which starts anew", source, head.name)


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


def _assemble(frontend: VisualFrontend, pair: Pair, head: SimilarityHead | None = None) -> RetrievalModel:
    model = RetrievalModel(frontend, pair.texts.tower, pair.text_config, pair.log_scale, pair.texts.words, None, head)
    if pair.export is None:
        return model
    if pair.export.kind == RetrievalConfig.kind:
        of_heads = model.head.learns or any(name.startswith("head.") for name in pair.export.state)
        load_exported_rest(model, pair.export, anew=("head.",) if of_heads else ())  # the head: see `_load_head`
    else:
        raise ValueError(f"{pair.export.folder} holds a {pair.export.kind} model, without a text tower for retrieval")
    return model
