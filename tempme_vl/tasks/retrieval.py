"""Text-video retrieval: a dual encoder and its loss."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import open_clip
import torch.nn.functional as F
from torch import Tensor, nn

from tempme_vl.backbones import open_clip as clip_family
from tempme_vl.backbones import split_name
from tempme_vl.backbones.clip_checkpoint import name_clip, to_openai_names
from tempme_vl.backbones.open_clip_blocks import tower_shape
from tempme_vl.frontend import VisualFrontend
from tempme_vl.merging import MergeSchedule, is_of_merging
from tempme_vl.pretrained import CONFIG_FILE, build, load_kind, load_model, save_model
from tempme_vl.scheduling import schedule_for
from tempme_vl.schema import read
from tempme_vl.state import at_least_float32
from tempme_vl.tasks.inputs import Inputs
from tempme_vl.tasks.losses import LogitScale, contrastive_loss, gather_pairs
from tempme_vl.tasks.umt_retrieval import UMT_RETRIEVAL, UMTRetrievalModel, create_umt_retrieval_model
from tempme_vl.text import ClipTextEncoder
from tempme_vl.tuning import TunableModel, Tuning, find_tuning
from tempme_vl.weights.exports import part_of

RETRIEVAL = {"retrieval": "a retrieval model"}


@dataclass(frozen=True)
class _Saved:
    """config.json."""

    kind: Literal["retrieval"]
    frontend: Mapping[str, Any]
    text_cfg: Mapping[str, Any]
    input: Inputs

    def __post_init__(self) -> None:
        clip_family.check_text_config(self.text_cfg, "'text_cfg'")


class RetrievalModel(TunableModel):
    """Video and text encoders with one embedding space.

    Args:
        frontend: the visual tower.
        text: the text tower.
        config: JSON data with which `from_pretrained` builds both again; its "input" says how clips and captions
            were sampled and cut in training (sampling, max_words).
        logit_scale: the logarithm of the initial temperature's inverse.
    """

    lora_parts = ("frontend", "text")

    def __init__(
        self,
        frontend: VisualFrontend,
        text: ClipTextEncoder,
        config: Mapping[str, Any],
        logit_scale: float = math.log(1 / 0.07),
    ):
        super().__init__()
        self.frontend, self.text, self.logit_scale = frontend, text, LogitScale(logit_scale)
        self.vocabulary: tuple[str, ...] | None = None  # CLIP's own
        self.config: dict[str, Any] = {"input": {"sampling": "fps1", "max_words": 32}, **config}

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
        """(B, L) -> (B, E), L2-normalised; arguments as in `ClipTextEncoder.forward`."""
        return F.normalize(at_least_float32(self.text(ids, mask)), dim=-1)

    def loss(self, features: Mapping[str, Tensor], batch: Mapping[str, Tensor]) -> Tensor:
        """The contrastive loss over all ranks' pairs.

        Args:
            features: what the model made of the batch.
            batch: video_id, text_id (B,) int64 and valid (B,), see `contrastive_loss`.
        """
        video, text, video_id, text_id, valid = gather_pairs(features, batch)
        return contrastive_loss(video, text, features["scale"], video_id, text_id, valid)

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
        clip, config = clip_family.clip_from_openai(state, heads, text_heads, quick_gelu)
        model = _assemble(clip, config, schedule)
        model.frontend.take_clip_positions(name_clip(state).clip_positions)
        return model

    def is_new_parameter(self, name: str) -> bool:
        """Whether a parameter was in no pretrained model: TempMe's clip positions, and what tuning added."""
        return super().is_new_parameter(name) or is_of_merging(self, name)

    def input_side(self) -> list[nn.Module]:
        """Token, position and class embeddings, conv1 and ln_pre, which CLIP4Clip freezes."""
        return [self.frontend.embed, self.text.embed]

    def openai_state_dict(self) -> dict[str, Tensor]:
        """Both towers' weights and the logit scale under open_clip's names, bit for bit; merging is left out.

        What tuning added is merged into them.
        """
        state = self.plain_state()
        visual = self.frontend.openai_state_dict(part_of(state, "frontend."))
        text = to_openai_names(part_of(state, "text."))
        scale = self.logit_scale.log_scale.detach().squeeze(0)
        return {**{f"visual.{key}": value for key, value in visual.items()}, **text, "logit_scale": scale}

    def save_pretrained(self, directory: str | Path, state: Mapping[str, Tensor] | None = None) -> None:
        """Writes config.json and model.safetensors; what tuning added is merged into plain weights.

        Args:
            state: full weights when the module's own are partitioned (ZeRO-3) or half precision; default its own.
        """
        shared = {key: self.config[key] for key in ("text_cfg", "input")}
        config = {"kind": "retrieval", "frontend": self.frontend.full_config(), **shared}
        save_model(directory, config, self.plain_state(state))

    @classmethod
    def from_pretrained(cls, directory: str | Path) -> RetrievalModel:
        """Reads what `save_pretrained` wrote.

        Raises:
            ValueError: a folder without the two files, one of another kind of model, or weights that do not fit.
        """
        config, state = load_model(directory, RETRIEVAL)
        file = Path(directory) / CONFIG_FILE
        read(_Saved, config, str(file))

        def make() -> RetrievalModel:
            frontend = VisualFrontend.from_config(config["frontend"], f"{file}, 'frontend'")
            text = clip_family.build_clip({**config["frontend"], "text_cfg": config["text_cfg"]})
            return cls(frontend, ClipTextEncoder(text), config)

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
    """A retrieval model by name: a dual encoder on an open_clip model, or UMT's with fusion layers.

    Args:
        tuning: what of it trains, one of `tempme_vl.TUNINGS` or an instance with options, `Lora(rank=16)`.
        vocabulary: words of UMT's text side (`create_umt_retrieval_model`); CLIP has its own.
        others: as in `tempme_vl.create_frontend`, with its errors.

    Raises:
        ValueError: see `create_frontend`, `find_tuning` and the tuning's `apply`.
    """
    way = find_tuning(tuning)
    family, model = split_name(name)
    made: AnyRetrievalModel
    if family == "umt":
        if vocabulary is None:
            raise ValueError("UMT's text side needs its vocabulary: see tempme_vl.text.tokenizers.bert_vocabulary")
        made = create_umt_retrieval_model(
            name, vocabulary, pretrained, method, num_frames, clip_position_std, **options
        )
    elif family == "open_clip":
        clip, config, clip_positions = clip_family.load_clip(model, pretrained)
        shape, layers = tower_shape(clip.visual), len(clip.visual.transformer.resblocks)
        schedule = schedule_for(method, layers, shape, num_frames, **options)
        made = _assemble(clip, config, schedule, clip_position_std)
        made.frontend.take_clip_positions(clip_positions)
    else:
        raise ValueError(f"retrieval needs a text tower, which only open_clip and umt models have; got {name!r}")
    made.tune(way)
    return made


def load_retrieval_model(directory: str | Path) -> AnyRetrievalModel:
    """Reads what `save_pretrained` of either model wrote.

    Raises:
        ValueError: see their `from_pretrained`.
    """
    kind = load_kind(directory)
    return (UMTRetrievalModel if kind in UMT_RETRIEVAL else RetrievalModel).from_pretrained(directory)


def _assemble(
    clip: open_clip.CLIP, config: dict[str, Any], schedule: MergeSchedule, clip_position_std: float = 0.0
) -> RetrievalModel:
    text, initial = ClipTextEncoder(clip), clip.logit_scale.item()
    tower = {key: value for key, value in config.items() if key != "text_cfg"}
    frontend = VisualFrontend(clip_family.visual_backbone(clip.visual), schedule, tower)
    frontend.init_clip_positions(clip_position_std)
    return RetrievalModel(frontend, text, config, initial)
