"""The model that a comparison is on, without any compression of its own, and how it is asked."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from tempme_vl.evaluation.videollm.rows import Inputs
from tempme_vl.integrations import Compressed, load_host
from tempme_vl.tasks.inputs import Sampling
from tempme_vl.tasks.videollm import CONFIG_FILE, VideoLLM, load_video_llm

FRAMES, SIDE, ANSWER_TOKENS = 8, 224, 8  # where neither the user nor training says so


@dataclass(frozen=True)
class Manner:
    """How a model is asked; None: as it was trained, or as is usual.

    Attributes:
        prompt: with {question} and the host's placeholder.
        answer_tokens: the most of a written answer.
    """

    num_frames: int | None = None
    image_size: int | None = None
    sampling: Sampling | None = None
    prompt: str | None = None
    answer_tokens: int | None = None


@dataclass(frozen=True)
class LoadedHost:
    """A model to be compressed.

    Attributes:
        model: perhaps in peft's wrapper.
        inputs: what the model is given of a video.
        prompt: None for the host's own chat format.
        trained: whether a recipe trained it and exported what is not in the host's own folder.
    """

    model: Any
    processor: Any
    inputs: Inputs
    sampling: Sampling
    prompt: str | None
    answer_tokens: int
    trained: bool

    def asked(self, compressed: Compressed) -> VideoLLM:
        """What answers questions by a compression of the model."""
        return VideoLLM(compressed, self.prompt, self.answer_tokens).eval()


def load(source: str, manner: Manner, dtype: torch.dtype, device: torch.device) -> LoadedHost:
    """A host by its folder or its name on the hub, or what a recipe exported, without its own compression.

    Raises:
        ValueError: see `load_video_llm` and `load_host`.
    """
    if not (Path(source) / CONFIG_FILE).is_file():
        model, processor = load_host(source, dtype=dtype)
        inner: nn.Module = model
        usual = Manner(FRAMES, SIDE, "uniform", None, ANSWER_TOKENS)
        return _loaded(inner.to(device).eval(), processor, manner, usual, trained=False)
    trained = load_video_llm(source, dtype=dtype).to(device).eval()
    host, input_ = trained.compressed.host, trained.input
    usual = Manner(
        host.num_frames, input_.image_size or SIDE, input_.sampling or "uniform", trained.prompt, trained.answer_tokens
    )
    return _loaded(trained.compressed.model, host.processor, manner, usual, trained=True)


def _loaded(model: Any, processor: Any, manner: Manner, usual: Manner, trained: bool) -> LoadedHost:
    said = {name: value for name, value in vars(manner).items() if value is not None}
    chosen = replace(usual, **said)
    assert chosen.num_frames and chosen.image_size and chosen.sampling and chosen.answer_tokens
    inputs = Inputs(chosen.num_frames, chosen.image_size)
    return LoadedHost(model, processor, inputs, chosen.sampling, chosen.prompt, chosen.answer_tokens, trained)
