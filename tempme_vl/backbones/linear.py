"""Linear layers of visual towers on a CPU by oneDNN.

torch gives products in float32 to MKL, and those of lower precision to oneDNN, which comes with it. Where tokens are
few, MKL loses most (docs/benchmarks.md), and few tokens are what merging leaves. oneDNN keeps some memory for every
number of rows that it has seen: a schedule has a dozen of them. Texts of all lengths have many, and stay with MKL.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tempme_vl import kernels
from tempme_vl.libraries import LibraryChangedError, undocumented

with undocumented("torch"):
    from torch.utils._python_dispatch import _get_current_dispatch_mode

_log = logging.getLogger(__name__)
_LEAST_WEIGHTS = 2**18  # starting takes 20 us instead of 5: with 512 x 512 weights both are equal from 3 tokens on


class Linear(nn.Linear):
    """torch's, whose products in float32 on a CPU are oneDNN's where nothing keeps gradients: equal within rounding.

    What looks for `nn.Linear` by its very class, as `torch.ao.quantization` does, passes it over; `layer.__class__ =
    nn.Linear` makes it one again.
    """

    def forward(self, x: Tensor) -> Tensor:
        if _serves(x, self.weight) and (product := _onednn()):
            return product(x, self.weight, self.bias, "none", [], "")
        return F.linear(x, self.weight, self.bias)


def use_onednn(module: nn.Module) -> None:
    """Makes every large `nn.Linear` inside a `Linear`: its class changes, and nothing else; parameters and hooks stay.

    Subclasses of `nn.Linear` stay as they are, as they compute something else.
    """
    for part in module.modules():
        if type(part) is nn.Linear and part.in_features * part.out_features >= _LEAST_WEIGHTS:
            part.__class__ = Linear


def _serves(x: Tensor, weight: Tensor) -> bool:
    """Whether this is a plain product in float32 on a CPU that nobody derives, traces or counts."""
    return (
        not torch.is_grad_enabled()
        and not torch.compiler.is_compiling()
        and not torch.jit.is_tracing()
        and x.is_cpu
        and weight.is_cpu
        and x.dtype == weight.dtype == torch.float32
        and type(x) is Tensor
        and type(weight) is nn.Parameter
        and x.numel() > 0
        and x.shape[-1] == weight.shape[-1]  # else torch says what is wrong
        and not torch.is_autocast_enabled("cpu")
        and kernels.enabled()
        and bool(torch.backends.mkldnn.enabled)
        and not _watched()
    )


def _watched() -> bool:
    """Whether somebody looks at torch's operators, such as FlopCounterMode, which does not know oneDNN's."""
    return _get_current_dispatch_mode() is not None


@cache
def _onednn() -> Callable[..., Tensor] | None:
    """oneDNN's product, or None where torch was built without it."""
    if not torch.backends.mkldnn.is_available():
        return None
    try:
        product = _product()
        product(torch.ones(1, 2), torch.ones(3, 2), torch.ones(3), "none", [], "")
    except (LibraryChangedError, RuntimeError) as error:
        _log.warning("linear layers run without oneDNN on the CPU, and slower: %s", error)
        return None
    return product


@undocumented("torch")
def _product() -> Any:
    return torch.ops.mkldnn._linear_pointwise.default
