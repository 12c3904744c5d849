"""The model that answers questions about videos: a front end and a head; how it is saved and loaded."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, cast

from torch import Tensor

from tempme_vl.card import Card
from tempme_vl.configs import ModelConfig
from tempme_vl.frontend import VisualFrontend
from tempme_vl.hub import Shareable, find_folder
from tempme_vl.merging import is_of_merging
from tempme_vl.pretrained import CONFIG_FILE, load_model, require_fit, save_model, sketch
from tempme_vl.tasks.cards import qa_card
from tempme_vl.tasks.heads import find_head
from tempme_vl.tasks.inputs import VideoInput
from tempme_vl.tasks.losses import gather_rows, readable_video
from tempme_vl.tasks.qa.base import QAHead
from tempme_vl.tuning.model import TunableModel
from tempme_vl.weights.exports import part_of

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from tempme_vl.hub import HubOptions


@dataclass(frozen=True)
class QAConfig(ModelConfig):
    """config.json of a `VideoQAModel`; `head_config` is the head's (`QAHead.load`)."""

    kind: ClassVar[str] = "video_qa"
    what: ClassVar[str] = "a question answering model"
    head: str
    head_config: Mapping[str, Any]
    input: VideoInput

    def __post_init__(self) -> None:
        try:
            find_head(self.head, "qa")
        except ValueError as error:
            raise ValueError(f"'head': {error}") from error


class VideoQAModel(Shareable, TunableModel):
    """A front end with a head that answers questions about its tokens.

    Args:
        frontend: any visual tower, merged or not. Its own head, which pools tokens for retrieval, has no part in an
            answer and is frozen.
        head: see `QAHead`.
        input: how frames were sampled in training.
    """

    lora_parts = ("frontend",)
    kept: tuple[str, ...] = ("tokens", "size")  # what forward needs of a video, however many questions follow

    def __init__(self, frontend: VisualFrontend, head: QAHead, input: VideoInput | None = None):
        super().__init__()
        self.frontend, self.head = frontend, head
        self.frontend.head.requires_grad_(False)
        self.input = input or VideoInput("uniform")

    def forward(self, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Encodes videos and answers questions, whichever a batch holds; the one way in under DeepSpeed.

        Args:
            batch: video (B, F, 3, H, W), frame_mask (B, F) and, in training, valid (B,), 0 for unreadable videos; or
                tokens and size, as an earlier call gave them. To ask, what `QAHead.tokenize` gives, stacked.

        Returns:
            tokens (B, M, D), normed, and size (B, M, 1); with questions what `QAHead.forward` returns.
        """
        features = self._encode(batch) if "video" in batch else {name: batch[name] for name in self.kept}
        if any(name.startswith(("question_", "option_")) for name in batch):
            features |= self.head(features["tokens"], features["size"], batch)
        return features

    def _encode(self, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        output = self.frontend(readable_video(batch), batch["frame_mask"])
        return {"tokens": self.frontend.norm(output.tokens), "size": output.size}

    @property
    def answers(self) -> tuple[str, ...]:
        """See `QAHead.answers`."""
        return self.head.answers

    @property
    def writes(self) -> bool:
        """See `QAHead.writes`."""
        return self.head.writes

    def tokenize(self, question: str, answer: str | None = None, options: Sequence[str] = ()) -> dict[str, Tensor]:
        """See `QAHead.tokenize`."""
        return self.head.tokenize(question, answer, options)

    def tokenizer(self) -> Callable[..., dict[str, Tensor]]:
        """`tokenize` without the model: a loader's workers need no weights."""
        return self.head.without_weights().tokenize

    def text(self, prediction: Sequence[int]) -> str:
        """See `QAHead.text`."""
        return self.head.text(prediction)

    def loss(self, features: Mapping[str, Tensor], batch: Mapping[str, Tensor]) -> Tensor:
        """The sum of weight * loss of all answers over the number of questions; 0 if no video was readable.

        Args:
            features: what the model made of the batch.
            batch: valid (B,); questions of unreadable videos do not count. answer_row (A,) int64, the answer's
                question, where they are not one each in order; answer_weight (A,), all 1 without it (UMT: how often
                an answer was given to its question; 0 for one that the head cannot give).
        """
        losses = features["losses"]
        if "answer_weight" in batch:
            losses = losses * batch["answer_weight"]
        valid = batch["valid"].bool()
        losses = losses.where(valid[batch["answer_row"]] if "answer_row" in batch else valid, 0.0)
        # per question of the global batch: DeepSpeed averages over ranks, which may hold unequal numbers of valid ones
        everywhere = gather_rows(valid.long())
        ranks = len(everywhere) // len(valid)
        return losses.sum() * ranks / everywhere.sum().clamp(min=1)

    def is_new_parameter(self, name: str) -> bool:
        """Whether a parameter was in no pretrained model and learns at its own rate."""
        if super().is_new_parameter(name) or is_of_merging(self, name):
            return True
        if not name.startswith("head."):
            return False
        return any(re.search(pattern, name.removeprefix("head.")) for pattern in self.head.new_parameters)

    def trains_beside(self, name: str) -> bool:
        """The head trains as it does without; of the front end only what no pretrained model had."""
        return name.startswith("head.") or super().trains_beside(name)

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recomputes the blocks of all parts in the backward pass."""
        self.frontend.set_grad_checkpointing(enable)
        self.head.set_grad_checkpointing(enable)

    def is_saved(self, name: str) -> bool:
        """Whether `save_pretrained` writes a parameter; others are found again."""
        return not name.startswith("head.") or self.head.is_saved(name.removeprefix("head."))

    def save_pretrained(self, directory: str | Path, state: Mapping[str, Tensor] | None = None) -> None:
        """Writes config.json, model.safetensors, README.md and the head's own files; `load_qa_model` reads them.

        What tuning added is merged into plain weights.

        Args:
            state: full weights when the module's own are partitioned (ZeRO-3) or half precision; default its own.
        """
        state = self.plain_state(state)
        of_head = {key.removeprefix("head."): value for key, value in state.items() if key.startswith("head.")}
        directory = Path(directory)
        directory.mkdir(parents=True, exist_ok=True)
        head_config, of_head = self.head.save(directory, of_head)
        config = QAConfig(self.frontend.full_config(), self.head.name, head_config, self.input)
        of_frontend = {key: value for key, value in state.items() if key.startswith("frontend.")}
        weights = of_frontend | {f"head.{key}": value for key, value in of_head.items()}
        save_model(directory, config, weights, self.card())

    def card(self) -> Card:
        """What is known of it, for people (`tempme_vl.card`)."""
        return qa_card(self.frontend, self.head.name, self.answers, self.input, self.tuning)


def load_qa_model(source: str | Path, **hub: Unpack[HubOptions]) -> VideoQAModel:
    """Reads what `VideoQAModel.save_pretrained` wrote.

    Args:
        source, hub: a folder, or a name on the Hugging Face hub with its options (`VisualFrontend.from_pretrained`).

    Raises:
        ValueError: a folder without the files, one of another kind of model, or weights that do not fit; or see
            `tempme_vl.hub.find_folder`.
    """
    directory = find_folder(source, **hub)
    saved, state = load_model(directory, QAConfig)
    file = directory / CONFIG_FILE
    head_class = cast(type[QAHead], find_head(saved.head, "qa"))

    def make() -> VideoQAModel:
        frontend = VisualFrontend.from_config(saved.frontend, f"{file}, 'frontend'")
        return VideoQAModel(frontend, head_class.load(saved.head_config, directory, frontend.shape), saved.input)

    def complete(model: VideoQAModel) -> dict[str, Any]:
        of_head = model.head.complete_state(part_of(state, "head."))
        return state | {f"head.{key}": value for key, value in of_head.items()}

    if head_class.is_whole(saved.head_config):
        drawn = sketch(make, directory)
        require_fit(drawn, complete(drawn), directory)
    model = make()
    weights = complete(model)
    require_fit(model, weights, directory)
    model.load_state_dict(weights)
    return model
