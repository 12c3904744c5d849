"""What a compressed video-language model needs of its host: the protocol `Host`, and the values that flow through it.

A host is told apart from others by little: how a video becomes features for its language model, which token of the
prompt each feature takes the place of, and what else its forward wants. Everything behind it (prompts, padding, labels,
both ways into the model, saving) is one for all, in `compressed.py`. Nothing here registers a module in the host model
or changes it.
"""

from __future__ import annotations

import inspect
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal, get_args

import numpy as np
import torch
from PIL.Image import Image
from torch import Tensor, nn
from transformers import BatchFeature, PreTrainedModel, ProcessorMixin
from transformers.modeling_outputs import BaseModelOutputWithPooling

from tempme_vl.compressors.inner import Inner
from tempme_vl.integrations.devices import as_input, own_weights
from tempme_vl.integrations.images import read_images
from tempme_vl.integrations.videos import FPS, SampledVideo, without_start

Feed = Literal["encoder_outputs", "embeddings"]
Where = Literal["auto", "tower", "behind"]


@dataclass(frozen=True)
class VisualTokens:
    """What one video or image became.

    Attributes:
        features: (M, D_llm), in the place of M tokens of the prompt.
        extra: whatever else the host wants to know of it later: positions of the tokens that were kept, features for
            deeper layers, frames a clip holds; of an image what is written in its place.
    """

    features: Tensor
    extra: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Keep:
    """How many tokens of a video are left at most.

    Attributes:
        budget: a share of the host's own, 0 to 1.
        tokens: a number.

    Raises:
        ValueError: both, or one out of bounds.
    """

    budget: float | None = None
    tokens: int | None = None

    def __post_init__(self) -> None:
        if self.budget is not None and self.tokens is not None:
            raise ValueError(f"give a budget or a number of tokens; got budget={self.budget}, tokens={self.tokens}")
        if self.budget is not None and not 0 < self.budget <= 1:
            raise ValueError(f"budget is the share of the host's own visual tokens to keep, 0 to 1; got {self.budget}")
        if self.tokens is not None and self.tokens < 1:
            raise ValueError(f"tokens counts the visual tokens of a video, 1 or more; got {self.tokens}")

    def most(self, native: int, fixed: int = 0) -> int | None:
        """Tokens to keep of so many; None without a limit.

        Args:
            fixed: those of them that always stay (CLS, newline), which count and cannot be left out.

        Raises:
            ValueError: no more than those are asked for.
        """
        if self.budget is None and self.tokens is None:
            return None
        most = self.tokens if self.budget is None else max(1, int(self.budget * native + 1e-9))
        assert most is not None
        if most <= fixed:
            raise ValueError(
                f"{most} tokens cannot be reached: of the host's own {native}, {fixed} always stay; ask for more"
            )
        return min(most, native) - fixed


@dataclass(frozen=True)
class Request:
    """What `compress` was asked for.

    Attributes:
        method: a name in `METHODS` or `COMPRESSORS`.
        num_frames: F, frames sampled of every video.
        where: inside the tower, behind it, or "auto".
        keep: the limit on a video's tokens.
        options: the method's own.
        frames_at_once: that the tower sees at a time; None for all.

    Raises:
        ValueError: another place, or no frame.
    """

    method: str
    num_frames: int
    where: Where = "auto"
    keep: Keep = Keep()
    options: Mapping[str, Any] = field(default_factory=dict)
    frames_at_once: int | None = None

    def __post_init__(self) -> None:
        if self.where not in get_args(Where):
            raise ValueError(f"where is one of {', '.join(map(repr, get_args(Where)))}; got {self.where!r}")
        if self.num_frames < 1:
            raise ValueError(f"num_frames counts the frames of every video, 1 or more; got {self.num_frames}")
        if self.frames_at_once is not None and self.frames_at_once < 1:
            raise ValueError(
                f"frames_at_once counts frames that the tower sees at a time, 1 or more; got {self.frames_at_once}"
            )


@dataclass(frozen=True)
class Costs:
    """One video: visual tokens that the language model reads, and GFLOPs of the tower; a multiply-add is 1.

    Attributes:
        tokens: None where the method decides by the data.
        frame: height and width in pixels of the frames that all of it is counted for.
    """

    native_tokens: int
    tokens: int | None
    native_tower: float
    tower: float
    frame: tuple[int, int]


class Host(ABC):
    """One family of video-language models, around a model that stays as it is: all that is particular to it.

    A subclass gives `create`, `restore`, `config`, `encode`, `costs`, and how videos are encoded part by part; the rest
    has defaults that suit a model with a placeholder for every visual token and one-dimensional positions.

    Attributes:
        model: the host model, without peft's wrapper.
        processor: its processor.
        method: of merging, a name in `tempme_vl.METHODS`.
        num_frames: F, frames sampled of every video.
        placeholder: what stands for a video in a prompt, such as "<video>".
        token_id: id of the token that each visual token takes the place of.
        image_placeholder: what stands for an image in a prompt, such as "<image>"; None where the host knows none.
        image_token_id: id of the token that each visual token of an image takes the place of.
        merging: modules that merging adds to the model (TempMe's clip positions), which are not among the model's own.
        frames_at_once: frames that the tower sees at a time, set by `see_at_once`; None for all.
        inner: (layers of the language model) -> what the method does in there; None for nothing. Then the tokens of a
            video say in `extra` their "places", a list of what `tempme_vl.compressors.inner.Left` has.
    """

    modality: ClassVar[Literal["video", "image"]] = "video"  # the key of mm_encoder_outputs
    feeds: ClassVar[tuple[Feed, ...]] = ("encoder_outputs", "embeddings")  # ways into the model that work
    uses_time: ClassVar[bool] = False  # whether the language model is told when frames were shown
    assumed_fps: float = FPS  # frames a second where nobody told
    pixel_name: ClassVar[str] = "pixel_values_videos"  # what the host's preprocessing calls a video's pixels
    # modules and parameters between tower and language model, by their names; they train when the host is fine-tuned
    projector: ClassVar[tuple[str, ...]] = ("multi_modal_projector",)
    model_class: ClassVar[type[PreTrainedModel] | None] = None  # where transformers has no class of the host's name

    def __init__(self, model: Any, processor: Any, method: str, num_frames: int):
        self.model, self.processor, self.method, self.num_frames = model, processor, method, num_frames
        self.merging = nn.ModuleDict()
        self.frames_at_once: int | None = None
        self.inner: Callable[[int], Inner | None] | None = None
        self.placeholder = str(getattr(processor, "video_token", "<video>"))  # models of images alone name none
        self.token_id: int = getattr(model.config, f"{self.modality}_token_id")
        image = getattr(processor, "image_token", None)
        self.image_placeholder = None if image is None or str(image) == self.placeholder else str(image)
        self.image_token_id: int | None = getattr(model.config, "image_token_id", None)

    # ---- what every host says

    @classmethod
    @abstractmethod
    def create(cls, model: Any, processor: Any, request: Request) -> Host:
        """The host with the method, inside the tower or behind it.

        Raises:
            ValueError: a model or options that the method does not fit.
        """

    @classmethod
    @abstractmethod
    def restore(cls, model: Any, processor: Any, config: Mapping[str, Any]) -> Host:
        """The same host again from what `config` gave; weights of `merging` are loaded behind it."""

    @abstractmethod
    def config(self) -> dict[str, Any]:
        """JSON data for `restore`: the method and its schedule."""

    @abstractmethod
    def encode(self, videos: Sequence[SampledVideo], prompts: Sequence[str]) -> list[VisualTokens]:
        """Features of videos.

        Args:
            videos: each with `num_frames` frames.
            prompts: for every video the prompt that it stands in, for hosts whose encoder reads it.
        """

    @abstractmethod
    def costs(self, frame: tuple[int, int] | None = None) -> Costs:
        """Computed, without running the model.

        Args:
            frame: height and width in pixels of the frames that come in, where the host keeps their size; default:
                usual ones.
        """

    # ---- videos part by part (`tempme_vl.integrations.parts`)

    def see_at_once(self, frames: int | None) -> None:
        """Has the tower see so many frames of a video at a time, or as many as the method allows.

        Raises:
            ValueError: a method, or a host, that needs all of them.
        """
        if frames is not None:
            self.check_cut()
        self.frames_at_once = frames

    @abstractmethod
    def check_cut(self) -> None:
        """Raises:
        ValueError: videos cannot be encoded part by part.
        """

    def check_stream(self) -> None:
        """Raises:
        ValueError: tokens of a part are not known before the video ends.
        """
        self.check_cut()

    @abstractmethod
    def cut(self, frame: tuple[int, int]) -> int:
        """Frames that can only be encoded together; parts begin at multiples of it.

        Args:
            frame: height and width in pixels.
        """

    def held(self, frames: int, cut: int) -> int:
        """How often the last of so many frames of a stream is repeated, so that what is encoded together is there."""
        return -frames % cut

    @abstractmethod
    def encode_part(self, part: SampledVideo, first: int) -> Any:
        """What frames of a video become, for `join_parts`.

        Args:
            first: the number of the first of them, which `cut` divides.
        """

    @abstractmethod
    def join_parts(self, parts: Sequence[Any], video: SampledVideo) -> VisualTokens:
        """The tokens of a video.

        Args:
            parts: what `encode_part` gave of parts that follow each other.
            video: of these frames; they may be gone, but for their size: (0, H, W, 3).
        """

    # ---- what a host may say differently

    @staticmethod
    def tower_of(model: Any) -> nn.Module:
        """The vision tower of a model, perhaps in peft's wrapper."""
        return model.model.vision_tower

    @staticmethod
    def tiny(words: Sequence[str]) -> tuple[PreTrainedModel, ProcessorMixin]:
        """A model of less than a million weights, and its processor, whose tokenizer knows the words: for
        `tempme_vl.integrations.tiny.tiny_host`, which draws the weights. A host without one leaves this as it is."""
        raise NotImplementedError

    @property
    def target(self) -> Any:
        """What takes the inputs: has `forward` and `generate`."""
        return self.model

    @property
    def language_model(self) -> nn.Module:
        """The decoder, for counting its cost."""
        return self.model.model.language_model

    @property
    def tower(self) -> Any:
        """The vision tower that runs."""
        return self.tower_of(self.model)

    @property
    def tower_parts(self) -> list[nn.Module]:
        """What of the tower runs, and so can train."""
        return [self.tower]

    @property
    def image_tower(self) -> Any:
        """What the pixels of images go into."""
        return self.tower

    def set_grad_checkpointing(self, enable: bool) -> None:
        """Recomputes in the backward pass what runs outside the model's own forward."""
        del enable  # most towers run as they are

    def preprocess(self, videos: Sequence[np.ndarray | Tensor], **options: Any) -> BatchFeature:
        """What the host's own preprocessing makes of the frames of videos, all of which it keeps.

        Args:
            options: of it.
        """
        return self.processor.video_processor(
            videos=list(videos), do_sample_frames=False, return_tensors="pt", **options
        )

    def pixels(self, videos: Sequence[SampledVideo]) -> Tensor:
        """(V, F, 3, H, W), by the host's own preprocessing, where the tower is and as precise."""
        return as_input(self.preprocess([video.frames for video in videos])[self.pixel_name], self.tower)

    def written(self, tokens: VisualTokens) -> str:
        """What stands in the prompt where the user wrote `placeholder`; holds token `token_id` M times."""
        return self.processor.tokenizer.convert_ids_to_tokens(self.token_id) * len(tokens.features)

    def input_ids(self, prompt: str, tokens: Sequence[VisualTokens]) -> list[int]:
        """Ids of a prompt whose placeholders, one a video, were written out."""
        parts = prompt.split(self.placeholder)
        text = parts[0] + "".join(self.written(t) + part for t, part in zip(tokens, parts[1:], strict=True))
        return self.processor.tokenizer(without_start(text, self.processor.tokenizer))["input_ids"]

    def encoder_output(self, tokens: Sequence[VisualTokens]) -> BaseModelOutputWithPooling:
        """What stands in mm_encoder_outputs for the videos of a batch, those of a prompt as one (`joined`). Made anew
        for every call: beam search expands it in place."""
        rows = [t.features for t in tokens]
        same = len({len(row) for row in rows}) == 1
        # hosts count all tokens, however they are grouped
        pooler_output = torch.stack(rows) if same else torch.cat(rows).unsqueeze(1)
        return BaseModelOutputWithPooling(pooler_output=pooler_output)

    # ---- images, which go the host's own way: nothing of them merges

    def check_images(self, videos: int) -> None:
        """Whether a prompt may have images.

        Args:
            videos: how many it has besides.

        Raises:
            ValueError: the host takes no images there.
        """
        if self.image_placeholder is None or getattr(self.processor, "image_processor", None) is None:
            raise ValueError(
                f"{type(self.model).__name__} takes videos alone: its {type(self.processor).__name__} reads no images "
                f"and has no placeholder for one. Give an image as a video of one frame, {self.placeholder!r} in its "
                "place"
            )

    def encode_images(self, images: Sequence[Image]) -> list[VisualTokens]:
        """The images of one prompt, by the host's own processor and model.

        Raises:
            ValueError: images that the processor refuses, or of which the model makes another number of tokens than
                the processor says.
        """
        assert self.image_placeholder is not None
        written, values = read_images(self.processor, images, self.image_placeholder)
        inner = self.model.model
        wanted = [name for name in inspect.signature(inner.get_image_features).parameters if name in values]
        given = {name: as_input(values[name], self.image_tower) for name in wanted}
        with own_weights(inner):
            output = inner.get_image_features(**given)
        rows = list(pooled(output))
        features = torch.cat(rows).reshape(-1, rows[0].shape[-1])
        token = self.processor.tokenizer.convert_ids_to_tokens(self.image_token_id)
        counts = [text.count(token) for text in written]
        if sum(counts) != len(features):
            raise ValueError(
                f"{type(self.processor).__name__} writes {sum(counts)} tokens for {len(images)} images of which "
                f"{type(self.model).__name__} makes {len(features)}: check that both are of one model"
            )
        return [
            VisualTokens(row, {"written": text, **self.image_extra(number, values, output)})
            for number, (row, text) in enumerate(zip(features.split(counts), written, strict=True))
        ]

    def image_extra(self, number: int, values: Mapping[str, Tensor], output: Any) -> dict[str, Any]:
        """What the host wants to know of an image later, besides what is written in its place.

        Args:
            number: of the image among those of its prompt.
            values: what the processor gives for all of them.
            output: of the model's get_image_features.
        """
        return {}

    def image_output(self, images: Sequence[VisualTokens]) -> BaseModelOutputWithPooling:
        """What stands in mm_encoder_outputs for the images of a batch, those of a prompt as one, where videos have a
        modality of their own."""
        return self.encoder_output(images)

    def extra_inputs(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        tokens: Sequence[Sequence[VisualTokens]],
        images: Sequence[Sequence[VisualTokens]],
    ) -> dict[str, Tensor]:
        """Further inputs, such as positions.

        Args:
            input_ids, attention_mask: (B, L), padded, answers included.
            tokens, images: the videos and the images of each prompt.
        """
        return {}

    def facts(self) -> dict[str, str]:
        """What else two runs must have in common to agree, by name."""
        return {}

    def remember(self, inputs: Mapping[str, Any]) -> None:
        """Tells the model what it remembers of its own inputs for a second turn on the first one's cache.

        Args:
            inputs: what `Compressed.prepare` gave, before they are run.
        """
        del inputs  # most models remember nothing


def joined(visuals: Sequence[VisualTokens]) -> VisualTokens:
    """All visuals of a prompt as one. Beams repeat what belongs to a prompt, and transformers 5.18, and GLM's models
    later too, repeat each visual by itself, behind which are then the features of another."""
    deeper = [visual.extra["deeper"] for visual in visuals if "deeper" in visual.extra]
    extra = {"deeper": [torch.cat(level) for level in zip(*deeper, strict=True)]} if deeper else {}
    return VisualTokens(torch.cat([visual.features for visual in visuals]), extra)


def listed(tokens: Sequence[VisualTokens]) -> BaseModelOutputWithPooling:
    """What stands in mm_encoder_outputs of models that join features by torch.cat: a list, one for each prompt."""
    features: Any = [t.features for t in tokens]
    return BaseModelOutputWithPooling(pooler_output=features)


def pooled(output: Any) -> Any:
    """Features in what a host's `get_video_features` or `get_image_features` returns, of transformers 4 or 5."""
    return getattr(output, "pooler_output", output)
