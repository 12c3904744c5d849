"""When the parts of one answer of a video-language model are done: by hooks on two of its modules, for one run."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from tempme_vl.evaluation.measure import synchronize


@dataclass(frozen=True)
class Times:
    """Seconds of one answer, from uint8 frames to the last token.

    Attributes:
        preprocessing: frames to pixels on the device.
        tower: ViT, projector, and merging inside or behind it, until the inputs of the language model are there.
        prefill: until the first token's logits.
        token: each further token.
        total: all of it, on one clock.
    """

    preprocessing: float
    tower: float
    prefill: float
    token: float
    total: float


@dataclass(frozen=True)
class Watched:
    """Modules that every way of answering calls once a pass: the tower's first, and the language model's last."""

    patches: nn.Module
    words: nn.Module
    device: torch.device


def first_convolution(tower: nn.Module) -> nn.Module:
    """What makes tokens of pixels: a tower's first convolution; the tower itself where there is none."""
    return next((module for module in tower.modules() if isinstance(module, (nn.Conv2d, nn.Conv3d))), tower)


@torch.no_grad()
def time_answer(
    watched: Watched,
    prepare: Callable[[], Mapping[str, Any]],
    generate: Callable[..., Tensor],
    new_tokens: int,
) -> tuple[Times, Tensor]:
    """One answer with its moments noted; also what `generate` gave.

    Args:
        prepare: makes inputs of `generate`, the tower's work done.
        generate: takes them and options of transformers' `generate`.
        new_tokens: 2 or more; as many are written, whatever ends an answer.
    """
    moments: dict[str, float] = {}

    def note(moment: str) -> None:
        if moment not in moments:
            synchronize(watched.device)
            moments[moment] = time.perf_counter()

    hooks = [
        watched.patches.register_forward_pre_hook(lambda *_: note("pixels")),
        watched.words.register_forward_hook(lambda *_: note("first token")),
    ]
    try:
        note("start")
        inputs = prepare()
        note("inputs")
        ids = generate(**inputs, max_new_tokens=new_tokens, min_new_tokens=new_tokens, do_sample=False)
        note("end")
    finally:
        for hook in hooks:
            hook.remove()
    start, pixels, ready, first, end = (
        moments[moment] for moment in ("start", "pixels", "inputs", "first token", "end")
    )
    token = (end - first) / (new_tokens - 1)
    return Times(pixels - start, ready - pixels, first - ready, token, end - start), ids
