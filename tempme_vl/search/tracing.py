"""What a front end does with tokens while a model embeds a video: where each went, and how much each was looked at.

Letters: B videos, R clips of all videos, N tokens of a clip, M merged tokens of a video, S input tokens of a clip.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from tempme_vl.frontend import VisualFrontend
from tempme_vl.state import AttentionContext, FrontendOutput, TokenState


@dataclass
class Trace:
    """Of one call.

    Attributes:
        outputs: what the front end gave.
        last: the last block's state behind its attention, and that attention.
    """

    outputs: list[FrontendOutput] = field(default_factory=list)
    last: list[tuple[TokenState, AttentionContext]] = field(default_factory=list)


@contextmanager
def traced(frontend: VisualFrontend) -> Iterator[Trace]:
    """Makes a front end trace inside of a model's own call, and takes what it gives."""
    trace = Trace()

    def ask(module: Any, args: Any, kwargs: Mapping[str, Any]) -> tuple[Any, dict[str, Any]]:
        return args, {**kwargs, "trace_source": True}

    def take(module: Any, args: Any, output: FrontendOutput) -> None:
        trace.outputs.append(output)

    def look(module: Any, args: tuple[TokenState, AttentionContext]) -> None:
        trace.last.append(args)

    hooks = (
        frontend.register_forward_pre_hook(ask, with_kwargs=True),
        frontend.register_forward_hook(take),
        frontend.blocks[-1].get_submodule("after_attention").register_forward_pre_hook(look),
    )
    try:
        yield trace
    finally:
        for hook in hooks:
            hook.remove()


def attention_of_cls(trace: Trace, registers: int) -> Tensor:
    """(B, M) float: the attention that an input token in each merged token gets from the CLS tokens of its clip in the
    last block, by the mean over heads; 1 is what an input token gets on average.

    By input token, since a merged token of size s counts as s keys and would get s times as much.

    Args:
        registers: of a frame, behind its CLS token, both together (`TowerShape.num_prefix`).
    """
    (output,), ((state, attention),) = trace.outputs, trace.last
    assert state.source is not None and output.source is not None
    rows = attention.rows(0, state.num_prefix - state.num_inserted)[:, :, ::registers]
    given = rows.mean(dim=(1, 2)) / state.size.squeeze(2)  # (R, N)
    by_input = given.gather(1, state.source.clamp(min=0)).masked_fill(state.source < 0, 0.0)  # (R, S)
    by_input = by_input.unflatten(0, (-1, state.num_clips))
    by_input = by_input.flatten(1) if state.clip_of is None else by_input.amax(1)  # of merged clips one holds it
    count = output.tokens.shape[1]
    into = torch.where(output.source < 0, count, output.source)
    mean = given.new_zeros(len(into), count + 1).scatter_reduce(1, into, by_input, "mean", include_self=False)
    return mean[:, :count] / by_input.mean(1, keepdim=True)
