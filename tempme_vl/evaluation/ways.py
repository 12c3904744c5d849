"""Ways to run one encoder: without its kernels, with one kernel of attention, compiled, as a recorded CUDA graph.

The result is the same within rounding (`tempme_vl.evaluation.fast_paths`); time is what differs.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from tempme_vl import kernels
from tempme_vl.frontend import VisualFrontend

Step = Callable[[], object]
_BEFORE = ", "  # between a row and its way: "tempme, compiled"


@dataclass(frozen=True)
class Way:
    """What happens to an encoder once, and what stands around each step."""

    prepare: Callable[[nn.Module], object] = lambda encoder: None
    around: Callable[[Step], Step] = lambda step: step


def compile_blocks(encoder: nn.Module) -> None:
    """Compiles block by block: of a front end the two branches, between which merging stays as it is, of another
    encoder every module of a list of modules. All blocks share what is compiled for the first."""
    if isinstance(encoder, VisualFrontend):
        for block in encoder.blocks:
            adapter = block.block
            for branch in ("attention_branch", "mlp_branch"):
                setattr(adapter, branch, torch.compile(getattr(adapter, branch)))
        return
    lists = [module for module in encoder.modules() if isinstance(module, nn.ModuleList)]
    for block in (block for blocks in lists for block in blocks):
        block.compile()


def recorded(step: Step) -> Step:
    """The step as a CUDA graph, which the host launches at once.

    Raises:
        ValueError: no GPU.
    """
    if not torch.cuda.is_available():
        raise ValueError("a CUDA graph needs a GPU, and torch finds none: leave out the way 'graph'")
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):  # libraries choose their kernels and workspaces outside of the recording
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    return graph.replay


def _inside(context: Callable[[], AbstractContextManager[object]]) -> Callable[[Step], Step]:
    def around(step: Step) -> Step:
        def run() -> object:
            with context():
                return step()

        return run

    return around


WAYS = {
    "plain": Way(around=_inside(kernels.plain)),
    "efficient": Way(around=_inside(partial(sdpa_kernel, SDPBackend.EFFICIENT_ATTENTION))),
    "flash": Way(around=_inside(partial(sdpa_kernel, SDPBackend.FLASH_ATTENTION))),
    "compiled": Way(compile_blocks),
    "whole": Way(lambda encoder: encoder.compile()),
    "graph": Way(around=recorded),
}


def name_of(row: str, way: str | None) -> str:
    """The name of a row that runs in a way."""
    return row if way is None else f"{row}{_BEFORE}{way}"


def row_and_way(name: str) -> tuple[str, Way]:
    """What `name_of` joined; a row without a way runs as it is."""
    row, _, way = name.partition(_BEFORE)
    return row, WAYS[way] if way else Way()
