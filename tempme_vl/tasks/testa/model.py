"""What TESTA's retrieval and pre-training share: two encoders, a matching head, and contrast with a momentum copy.

Letters: B pairs on this rank, G on all, L words, M tokens of a video, P (text, video) pairs, E width of an embedding.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tempme_vl.card import Card
from tempme_vl.configs import ModelConfig
from tempme_vl.frontend import VisualFrontend
from tempme_vl.hub import Shareable, find_folder
from tempme_vl.merging import is_of_merging
from tempme_vl.precision import at_least_float32
from tempme_vl.pretrained import CONFIG_FILE, build, load_model, load_vocabulary, save_model
from tempme_vl.schema import Share, Size
from tempme_vl.tasks.cards import retrieval_card
from tempme_vl.tasks.inputs import Inputs
from tempme_vl.tasks.losses import Temperature, readable, readable_video
from tempme_vl.tasks.testa.contrast import FeatureQueue, Momentum, Sides, ramp
from tempme_vl.text import BlipShape, BlipTextEncoder, VideoKeys
from tempme_vl.text.tokenizers import BlipWords
from tempme_vl.tuning.base import Tuning
from tempme_vl.tuning.model import TunableModel

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from tempme_vl.hub import HubOptions

M = TypeVar("M", bound="MatchingModel")
TEXT_OF = {"mini": "tiny", "tiny": "tiny", "b16": "base"}  # the text encoder of each tower, as `BlipShape` names it


@dataclass(frozen=True)
class ContrastOptions:
    """How TESTA trains.

    Attributes:
        queue: places of the queue, a multiple of the pairs of a step on all ranks (TESTA: 32 in retrieval, 57600 in
            pre-training).
        momentum: of the copies.
        distill: how much of a target the copies say, once `MatchingModel.begin_step` has raised it to that.
        all_ranks: whether negatives of matching are drawn among all ranks' pairs; in retrieval alone.
    """

    queue: Size = 32
    momentum: Share = 0.995
    distill: Share = 0.4
    all_ranks: bool = True


@dataclass(frozen=True)
class MatchingConfig(ModelConfig):
    """config.json of a `MatchingModel`."""

    text: BlipShape
    input: Inputs


CONTRAST = tuple(field.name for field in fields(ContrastOptions))


@dataclass(frozen=True)
class Candidates:
    """Pairs that negatives are drawn among.

    Attributes:
        tokens: (G, M, D) normed tokens of videos.
        ids, mask: (G, L) of texts.
        own: (B,), the numbers of this rank's pairs.
    """

    tokens: Tensor
    ids: Tensor
    mask: Tensor
    own: Tensor


class MatchingModel(Shareable, TunableModel):
    """Video and text encoders with one embedding space, and a head that judges whether a text and a video match.

    Args:
        frontend: the visual tower; its normed tokens are what texts attend to.
        text: BLIP's encoder.
        vocabulary: the words that text ids stand for, in order, [DEC] and [ENC] the last.
        input: how videos and texts were sampled and cut in training.
        training: to train it; None leaves out copies and queue.
        numbered: see `FeatureQueue`.

    Attributes:
        folder_config: of its folders.
        also_read: of folders of other models that have all of it.
        distill: how much of a target of contrast the copies say, from the next step on.
        ramp_epochs: after how many epochs that is the options' `distill`.
    """

    lora_parts = ("frontend", "text")
    ramp_epochs: ClassVar[int] = 1
    folder_config: ClassVar[type[MatchingConfig]]
    also_read: ClassVar[tuple[type[MatchingConfig], ...]] = ()

    def __init__(
        self,
        frontend: VisualFrontend,
        text: BlipTextEncoder,
        vocabulary: tuple[str, ...],
        input: Inputs | None = None,
        training: ContrastOptions | None = None,
        numbered: bool = True,
    ):
        super().__init__()
        self.input = input or Inputs("uniform", 64)
        width = text.shape.width
        self.frontend, self.text, self.words = frontend, text, BlipWords(vocabulary)
        self.text_proj, self.match_head = nn.Linear(width, frontend.shape.embed_dim), nn.Linear(width, 2)
        self.temperature = Temperature()
        self.options, self.distill = training, 0.0 if training is None else training.distill
        self._has_followed = False
        if training is not None:
            self.momentum = self._copies(training)
            self.queue = FeatureQueue(frontend.shape.embed_dim, training.queue, numbered)

    def tune(self, tuning: Tuning) -> None:
        """As `TunableModel.tune`; where it adds something, the momentum copies start anew, with that."""
        super().tune(tuning)
        if self.options is not None and not self.momentum.fits(self._followed()):
            self.momentum = self._copies(self.options)

    def _copies(self, options: ContrastOptions) -> Momentum:
        return Momentum({name: copy.deepcopy(module) for name, module in self._followed().items()}, options.momentum)

    def reset_copies(self) -> None:
        """Makes the momentum copies equal to what they follow."""
        if self.options is not None:
            for name, module in self._followed().items():
                self.momentum.copies[name].load_state_dict(module.state_dict())

    def begin_step(self, step: int, steps: int) -> None:
        """Sets `distill` for a step of a training and moves the copies, which `Trainer` asks for in front of each.

        Args:
            step: its number, from 0.
            steps: of an epoch.
        """
        if self.options is not None:
            self.distill = ramp(0, step, steps, self.ramp_epochs, self.options.distill)
            self.follow()
            self._has_followed = True

    def check_training(self, batch_size: int, bf16: bool) -> None:
        """Whether it can be trained so, which `Trainer` asks first.

        Args:
            batch_size: of all ranks.

        Raises:
            ValueError: a queue that does not hold whole steps; or weights in bf16, where most of what a step of 0.5
                percent adds to the copies is rounded away.
        """
        if self.options is None:
            return
        if self.options.queue % batch_size:
            raise ValueError(
                f"expected a queue of a multiple of {batch_size} places, the pairs of a step; it has "
                f"{self.options.queue}: give --contrast-options queue=N, or another --batch-size"
            )
        if bf16:
            raise ValueError("momentum copies follow float32 weights: use --precision fp32; got bf16")

    def _followed(self) -> dict[str, nn.Module]:
        return {"frontend": self.frontend, "text": self.text, "text_proj": self.text_proj}

    @property
    def vocabulary(self) -> tuple[str, ...]:
        """The words that text ids stand for, in order."""
        return self.words.vocabulary

    def encode_video(self, video: Tensor, frame_mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """(B, F, 3, H, W) -> (B, E), L2-normalised, of the mean of all tokens; (B, M, D) normed tokens."""
        output = self.frontend(video, frame_mask)
        return output.pooled, self.frontend.norm(output.tokens)

    def encode_text(self, ids: Tensor, mask: Tensor) -> Tensor:
        """(B, L) -> (B, E), L2-normalised, from the first word."""
        return embed_text(self.text, self.text_proj, ids, mask)

    def keys_values(self, tokens: Tensor) -> VideoKeys:
        """(B, M, D) tokens -> what matching needs of each video, computed once for all its texts."""
        return self.text.keys_values(tokens)

    def fuse(self, ids: Tensor, mask: Tensor, keys: VideoKeys) -> Tensor:
        """P texts, ids and mask (P, L), each with its video -> (P, 2), index 1 for a match."""
        return self.match_head(self.text.fuse(ids, mask, keys)[:, 0])

    def match_logits(self, ids: Tensor, mask: Tensor, keys: VideoKeys) -> Tensor:
        """As `fuse`, (P,): the logit of a match alone."""
        return self.fuse(ids, mask, keys)[:, 1]

    def follow(self) -> None:
        """Moves the copies one step towards the encoders."""
        self.momentum.follow(self._followed())

    def follow_once(self) -> None:
        """The same in a forward pass of a training, unless `begin_step` has done it for this step."""
        if not self._has_followed:
            self.follow()
        self._has_followed = False

    @torch.no_grad()
    def encode_by_copies(self, batch: Mapping[str, Tensor]) -> Sides:
        """Features of the momentum copies; zeros for a video that could not be read."""
        copies, valid = self.momentum.copies, batch["valid"].bool()
        video = copies["frontend"](readable_video(batch), batch.get("frame_mask")).pooled
        text = embed_text(copies["text"], copies["text_proj"], batch["text_ids"], batch["text_mask"])
        return Sides(readable(video, valid), text)

    def match(self, among: Candidates, other_video: Tensor, other_text: Tensor) -> Tensor:
        """Logits (3 B, 2) of this rank's pairs, of each text with another video, and of each video with another text.

        Args:
            other_video, other_text: (B,), numbers of the candidates.
        """
        text = torch.cat([among.own, among.own, other_text])
        video, place = torch.cat([among.own, other_video, among.own]).unique(return_inverse=True)
        keys = self.keys_values(among.tokens[video]).select(place)
        return self.fuse(among.ids[text], among.mask[text], keys)

    def is_new_parameter(self, name: str) -> bool:
        """Whether a parameter was in no pretrained model: a method's own, and what tuning added."""
        return super().is_new_parameter(name) or is_of_merging(self, name)

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recomputes the blocks of both encoders in the backward pass."""
        self.frontend.set_grad_checkpointing(enable)
        self.text.grad_checkpointing = enable

    def require_copies(self) -> None:
        """Raises:
        ValueError: it was made without `training`.
        """
        if self.options is None:
            raise ValueError("contrast wants momentum copies and a queue: create the model with `training` options")

    def save_pretrained(self, directory: str | Path, state: Mapping[str, Tensor] | None = None) -> None:
        """Writes config.json, vocab.txt, model.safetensors, README.md; what tuning added is merged into plain weights,
        and momentum copies and queue are left out.

        Args:
            state: full weights when the module's own are partitioned (ZeRO-3) or half precision; default its own.
        """
        config = self.folder_config(self.frontend.full_config(), self.text.shape, self.input)
        Path(directory).mkdir(parents=True, exist_ok=True)
        self.words.save(Path(directory))
        save_model(directory, config, self.inference_state(state), self.card())

    def card(self) -> Card:
        """What is known of it, for people (`tempme_vl.card`)."""
        return retrieval_card(self.frontend, self.input, self.tuning)

    @classmethod
    def from_pretrained(cls: type[M], source: str | Path, **hub: Unpack[HubOptions]) -> M:
        """Reads what `save_pretrained` wrote.

        Args:
            source, hub: see `VisualFrontend.from_pretrained`.

        Raises:
            ValueError: a folder without the files, one of another kind of model, or weights that do not fit; or see
                `tempme_vl.hub.find_folder`.
        """
        directory = find_folder(source, **hub)
        config, state = load_model(directory, cls.folder_config, *cls.also_read)
        vocabulary = load_vocabulary(directory, config.text.vocab_size)

        def make() -> M:
            frontend = VisualFrontend.from_config(config.frontend, f"{directory / CONFIG_FILE}, 'frontend'")
            return cls(frontend, BlipTextEncoder(config.text), vocabulary, config.input)

        return build(make, cls.complete_state(state), directory)

    @staticmethod
    def complete_state(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The model's weights, all of them and no others, of those that a folder holds."""
        return dict(state)

    def is_saved(self, name: str) -> bool:
        """Whether a weight belongs to the model, and not to its training as copies and queue do."""
        return not name.startswith(("momentum.", "queue."))

    def inference_state(self, state: Mapping[str, Tensor] | None = None) -> dict[str, Tensor]:
        """The weights without copies and queue."""
        plain = self.plain_state(state)
        return {key: value for key, value in plain.items() if self.is_saved(key)}


def embed_text(text: nn.Module, text_proj: nn.Module, ids: Tensor, mask: Tensor) -> Tensor:
    """(B, L) -> (B, E), L2-normalised."""
    return F.normalize(at_least_float32(text_proj(text(ids, mask)[:, 0])), dim=-1)
