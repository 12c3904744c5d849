"""What a front end computes, counted while it runs, to compare with what is computed ahead."""

from __future__ import annotations

from collections.abc import Collection
from functools import partial
from typing import Any

import pytest
from torch import Tensor, nn

from tempme_vl import VisualFrontend
from tempme_vl.backbones.base import QueryValueBias, QuickGELU
from tempme_vl.matching import MergeMap, bipartite_match
from tempme_vl.merging import centerclip, tempme, testa, tome
from tempme_vl.tuning.adapter import Bottleneck

_MATCH_FRAMES = testa.match_frames
_ATTENTION = nn.functional.scaled_dot_product_attention


class Counter:
    """The counting of `tempme_vl.costs`, summed over what really runs in the modules of a front end.

    The projection to embeddings is left out, which by convention counts whether it is there or not.

    Args:
        left_out: modules that do not count, nor what is in them.
    """

    def __init__(self, frontend: VisualFrontend, monkeypatch: pytest.MonkeyPatch, left_out: Collection[nn.Module] = ()):
        self.total, self._before = 0, [0]
        in_head = {id(m) for m in frontend.head.modules() if frontend.shape.pool != "attention"}
        for module in frontend.modules():
            if id(module) not in in_head:
                module.register_forward_hook(self.count)
        for module in (inner for outer in left_out for inner in outer.modules()):
            module.register_forward_pre_hook(self.enter)
            module.register_forward_hook(self.leave)
        for merging in (tempme, tome, testa):
            monkeypatch.setattr(merging, "bipartite_match", self.match)
        monkeypatch.setattr(testa, "match_frames", self.match_frames)
        for name in ("kmedoids", "spectral"):
            monkeypatch.setattr(centerclip, name, partial(self.cluster, getattr(centerclip, name)))
        monkeypatch.setattr(nn.functional, "scaled_dot_product_attention", self.attend)

    def enter(self, *_: object) -> None:
        self._before.append(self.total)

    def leave(self, *_: object) -> None:
        self.total = self._before.pop()

    def count(self, module: nn.Module, inputs: tuple, output: object) -> None:
        if isinstance(module, (nn.Linear, nn.Conv2d)):
            self.total += output.numel() * module.weight[0].numel() + (output.numel() if module.bias is not None else 0)
        elif isinstance(module, QueryValueBias):
            self.total += output.numel()
        elif isinstance(module, nn.LayerNorm):
            self.total += 2 * output.numel()
        elif isinstance(module, Bottleneck):  # whose GELU is no module
            self.total += output.numel() // module.up.out_features * module.up.in_features
        elif "GELU" in type(module).__name__:
            self.total += output.numel() * (2 if isinstance(module, QuickGELU) else 1)

    def match(self, metric: Tensor, r: int, prefix: int, *order: str, less: Tensor | None = None) -> MergeMap:
        even = len(range(prefix + prefix % 2, metric.shape[1], 2))
        odd = metric.shape[1] - prefix - even
        self.total += metric.shape[0] * even * odd * metric.shape[2] if r else 0
        return bipartite_match(metric, r, prefix, *order, less=less)

    def match_frames(self, metric: Tensor, r: int, less: Tensor | None = None) -> MergeMap:
        videos, patches, frames, width = metric.shape
        self.total += videos * patches * len(range(0, frames, 2)) * len(range(1, frames, 2)) * width
        return _MATCH_FRAMES(metric, r, less)

    def cluster(self, algorithm: Any, x: Tensor, *options: object) -> tuple[Tensor, Tensor]:
        self.total += x.shape[0] * x.shape[1] ** 2 * x.shape[2]  # the distances of all points
        return algorithm(x, *options)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, *args: object, **kwargs: object) -> Tensor:
        rows, heads, queries, head_width = q.shape
        self.total += rows * heads * queries * k.shape[2] * (2 * head_width + 1)
        return _ATTENTION(q, k, v, *args, **kwargs)
