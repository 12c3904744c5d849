"""What a compressed video-language model needs of its host: the protocol `Host`, and the values that flow through it.

A host is told apart from others by little: how a video becomes features for its language model, which token of the
prompt each feature takes the place of, and what else its forward wants. Everything behind it (prompts, padding, labels,
both ways into the model, saving) is one for all, in `compressed.py`. Nothing here registers a module in the host model
or changes it.
"""

from __future__ import annotations

import inspect
import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import torch
from PIL.Image import Image
from torch import Tensor, nn
from transformers.modeling_outputs import BaseModelOutputWithPooling

from tempme_vl.integrations.images import read_images
from tempme_vl.integrations.videos import SampledVideo, without_start

Feed = Literal["encoder_outputs", "embeddings"]


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
class Costs:
    """One video: visual tokens that the language model reads, and GFLOPs of the tower; a multiply-add is 1.

    Attributes:
        frame: height and width in pixels of the frames that all of it is counted for.
    """

    native_tokens: int
    tokens: int
    native_tower: float
    tower: float
    frame: tuple[int, int]


class Host(ABC):
    """One family of video-language models, around a model that stays as it is.

    A subclass gives `create`, `restore`, `config`, `encode` and `costs`; the rest has defaults that suit a model with a
    placeholder for every visual token and one-dimensional positions.

    Attributes:
        model: the host model, without peft's wrapper.
        processor: its processor.
        num_frames: F, frames sampled of every video.
        placeholder: what stands for a video in a prompt, such as "<video>".
        token_id: id of the token that each visual token takes the place of.
        image_placeholder: what stands for an image in a prompt, such as "<image>"; None where the host knows none.
        image_token_id: id of the token that each visual token of an image takes the place of.
        merging: modules that merging adds to the model (TempMe's clip positions), which are not among the model's own.
    """

    modality: ClassVar[Literal["video", "image"]] = "video"  # the key of mm_encoder_outputs
    feeds: ClassVar[tuple[Feed, ...]] = ("encoder_outputs", "embeddings")  # ways into the model that work
    uses_time: ClassVar[bool] = False  # whether the language model is told when frames were shown

    def __init__(self, model: Any, processor: Any, num_frames: int):
        self.model, self.processor, self.num_frames = model, processor, num_frames
        self.merging = nn.ModuleDict()
        self.placeholder = str(getattr(processor, "video_token", "<video>"))  # models of images alone name none
        self.token_id: int = getattr(model.config, f"{self.modality}_token_id")
        image = getattr(processor, "image_token", None)
        self.image_placeholder = None if image is None or str(image) == self.placeholder else str(image)
        self.image_token_id: int | None = getattr(model.config, "image_token_id", None)

    # ---- what every host says

    @classmethod
    @abstractmethod
    def create(cls, model: Any, processor: Any, method: str, num_frames: int, options: Mapping[str, Any]) -> Host:
        """The host with a schedule of the method for this model.

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
    def costs(self) -> Costs:
        """Computed, without running the model."""

    # ---- what a host may say differently

    @property
    def target(self) -> Any:
        """What takes the inputs: has `forward` and `generate`."""
        return self.model

    @property
    def language_model(self) -> nn.Module:
        """The decoder, for counting its cost."""
        return self.model.model.language_model

    @property
    def image_tower(self) -> Any:
        """What the pixels of images go into."""
        return self.model.model.vision_tower

    def written(self, tokens: VisualTokens) -> str:
        """What stands in the prompt where the user wrote `placeholder`; holds token `token_id` M times."""
        return self.processor.tokenizer.convert_ids_to_tokens(self.token_id) * len(tokens.features)

    def input_ids(self, prompt: str, tokens: Sequence[VisualTokens]) -> list[int]:
        """Ids of a prompt whose placeholders, one a video, were written out."""
        parts = prompt.split(self.placeholder)
        text = parts[0] + "".join(self.written(t) + part for t, part in zip(tokens, parts[1:], strict=True))
        return self.processor.tokenizer(without_start(text, self.processor.tokenizer))["input_ids"]

    def encoder_output(self, tokens: Sequence[VisualTokens]) -> Any:
        """What stands in mm_encoder_outputs for the videos of a batch, in order. Made anew for every call: beam search
        expands it in place."""
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
        inner, tower = self.model.model, self.image_tower
        device, dtype = input_device(tower), input_dtype(tower)
        wanted = [name for name in inspect.signature(inner.get_image_features).parameters if name in values]
        given = {name: values[name].to(device, dtype if values[name].is_floating_point() else None) for name in wanted}
        with own_weights(inner):
            output = inner.get_image_features(**given)
        rows = list(pooled(output))
        features = torch.cat(rows).reshape(-1, rows[0].shape[-1])
        counts = [text.count(self.image_placeholder) for text in written]
        if sum(counts) != len(features):
            raise ValueError(
                f"{type(self.processor).__name__} writes {sum(counts)} tokens for {len(images)} images of which "
                f"{type(self.model).__name__} makes {len(features)}: check that both are of one model"
            )
        return [
            VisualTokens(row, {"written": text, **self.image_extra(number, values, output)})
            for number, (row, text) in enumerate(zip(features.split(counts), written, strict=True))
        ]

    def image_extra(self, number: int, values: Mapping[str, Any], output: Any) -> dict[str, Any]:
        """What the host wants to know of an image later, besides what is written in its place.

        Args:
            number: of the image among those of its prompt.
            values: what the processor gives for all of them.
            output: of the model's get_image_features.
        """
        return {}

    def image_output(self, images: Sequence[VisualTokens]) -> Any:
        """What stands in mm_encoder_outputs for the images of a batch, where videos have a modality of their own."""
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

    def remember(self, inputs: Mapping[str, Any]) -> None:
        """Tells the model what it remembers of its own inputs for a second turn on the first one's cache.

        Args:
            inputs: what `Compressed.prepare` gave, before they are run.
        """
        del inputs  # most models remember nothing


def input_device(module: nn.Module) -> torch.device:
    """Where the input of a module goes. Offloaded weights lie on `meta` between calls; accelerate brings them to the
    device that its hook names, and the input with them."""
    for weight in module.parameters():
        if not weight.is_meta:
            return weight.device
    for part in module.modules():
        hook = _hook(part)
        for one in (hook, *getattr(hook, "hooks", ())):
            if getattr(one, "execution_device", None) is not None:
                return torch.device(one.execution_device)
    return torch.device("cpu")


def pooled(output: Any) -> Any:
    """Features in what a host's `get_video_features` or `get_image_features` returns, of transformers 4 or 5."""
    return getattr(output, "pooler_output", output)


def _hook(module: nn.Module) -> Any:
    """accelerate's `ModelHook` of a module, or None."""
    return getattr(module, "_hf_hook", None)


def input_dtype(module: nn.Module) -> torch.dtype:
    """How precise the input of a module is: as its first weight that is no packed integer."""
    return next((weight.dtype for weight in module.parameters() if weight.is_floating_point()), torch.float32)


@contextmanager
def own_weights(module: nn.Module) -> Iterator[None]:
    """Has the weights that a module itself holds at hand, where accelerate offloads them between calls: what its hook
    does before and after a call of the module."""
    hook = _hook(module) if any(weight.is_meta for weight in module.parameters(recurse=False)) else None
    if hook is None:
        yield
        return
    hook.pre_forward(module)
    try:
        yield
    finally:
        hook.post_forward(module, None)


def count_weights(module: nn.Module) -> int:
    """Weights of its matrices, without packing: of a layer in 4 bits, which holds two in a byte, each counts."""
    total = 0
    for part in module.modules():
        own = sum(weight.numel() for weight in part.parameters(recurse=False) if weight.ndim > 1)
        rows, columns = getattr(part, "out_features", None), getattr(part, "in_features", None)
        total += rows * columns if own and rows and columns else own
    return total


def prefill_gflops(host: Host, tokens: int) -> float:
    """Cost of the decoder's layers for reading so many tokens, causal attention included; a multiply-add is 1."""
    layers = max((m for m in host.language_model.modules() if isinstance(m, nn.ModuleList)), key=len)
    width = host.model.config.get_text_config().hidden_size
    return (count_weights(layers) * tokens + len(layers) * tokens**2 * width) / 1e9


def describe(host: Host, method: str) -> str:
    """Tokens and costs of one video in the host's own way and in ours, as a table."""
    costs = host.costs()
    rows = [
        ("visual tokens", float(costs.native_tokens), float(costs.tokens), "{:.0f}"),
        ("vision tower, GFLOPs", costs.native_tower, costs.tower, "{:.4g}"),
        (
            "prefill of these tokens, GFLOPs",
            prefill_gflops(host, costs.native_tokens),
            prefill_gflops(host, costs.tokens),
            "{:.4g}",
        ),
    ]
    height, width = costs.frame
    lines = [
        f"{type(host.model).__name__}, {host.num_frames} frames of {height} x {width} pixels, method {method!r} "
        "(a multiply-add is 1 FLOP)",
        f"{'':32}{'host':>12}{'compressed':>12}{'ratio':>8}",
    ]
    for name, native, ours, form in rows:
        ratio = ours / native if native else math.nan
        lines.append(f"{name:32}{form.format(native):>12}{form.format(ours):>12}{ratio:>8.3f}")
    if more_tokens(costs):
        lines.append(
            f"Beware: {costs.tokens} tokens are more than the {costs.native_tokens} of the host's own way, which pools "
            "them: merge more, or the language model gets slower."
        )
    return "\n".join(lines)


def more_tokens(costs: Costs) -> bool:
    """Whether the language model reads more tokens than in the host's own way."""
    return costs.tokens > costs.native_tokens
