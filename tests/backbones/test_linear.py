"""Linear layers on a CPU by oneDNN: the same values as torch's own, and only where nobody could tell the difference."""

from __future__ import annotations

import copy
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from tempme_vl import create_frontend, kernels
from tempme_vl.backbones import linear
from tempme_vl.backbones.linear import Linear, use_onednn

pytestmark = pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="this torch was built without oneDNN")
LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": lambda x: x,
    "columns first": lambda x: x.mT.contiguous().mT,
    "every second number": lambda x: x.repeat_interleave(2, dim=-1)[..., ::2],
    "one row as often": lambda x: x[..., :1, :].expand_as(x),
    "frames turned": lambda x: x.transpose(0, 1).contiguous().transpose(0, 1),
}


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """Shapes that oneDNN's product got."""
    product, shapes = linear._onednn(), []
    assert product is not None

    def counted(x: Tensor, *others: Any) -> Tensor:
        shapes.append(tuple(x.shape))
        return product(x, *others)

    monkeypatch.setattr(linear, "_onednn", lambda: counted)
    return shapes


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    shape=st.tuples(st.integers(1, 4), st.integers(1, 130)),
    widths=st.tuples(st.integers(1, 200), st.integers(1, 200)),
    bias=st.booleans(),
    layout=st.sampled_from(sorted(LAYOUTS)),
    turned=st.booleans(),
    seed=st.integers(0, 999),
)
def test_it_is_torchs_product(
    shape: tuple[int, int], widths: tuple[int, int], bias: bool, layout: str, turned: bool, seed: int
) -> None:
    torch.manual_seed(seed)
    layer = Linear(*widths, bias=bias)
    if turned:  # as the weights of open_clip's projections are
        layer.weight = nn.Parameter(layer.weight.detach().T.contiguous().T)
    x = LAYOUTS[layout](torch.randn(*shape, widths[0]))
    exact = F.linear(x.double(), layer.weight.double(), layer.bias.double() if bias else None)
    with torch.no_grad():
        y = layer(x)
    assert y.is_contiguous()
    torch.testing.assert_close(y.double(), exact, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("around", "change", "served"),
    [
        (torch.no_grad, lambda x: x, True),
        (torch.inference_mode, lambda x: x, True),
        (nullcontext, lambda x: x, False),
        (torch.no_grad, lambda x: x.double(), False),
        (torch.no_grad, lambda x: x.bfloat16(), False),
        (torch.no_grad, lambda x: x[:0], False),
    ],
    ids=["without gradients", "inference mode", "with gradients", "float64", "bfloat16", "no rows"],
)
def test_where_it_serves(
    calls: list[tuple[int, ...]],
    around: Callable[[], AbstractContextManager[object]],
    change: Callable[[Tensor], Tensor],
    served: bool,
) -> None:
    x = change(torch.randn(3, 5, 8))
    layer = Linear(8, 4, dtype=x.dtype)
    with around():
        assert layer(x).shape == (len(x), 5, 4)
    assert calls == [(3, 5, 8)] * served


@pytest.mark.parametrize(
    "around",
    [
        kernels.plain,
        lambda: torch.backends.mkldnn.flags(enabled=False),
        lambda: torch.autocast("cpu", dtype=torch.bfloat16),
    ],
    ids=["kernels.plain", "switched off in torch", "autocast"],
)
def test_where_it_is_told_not_to(
    calls: list[tuple[int, ...]], around: Callable[[], AbstractContextManager[object]]
) -> None:
    layer, x = Linear(8, 4), torch.randn(3, 8)
    with torch.no_grad(), around():
        torch.testing.assert_close(layer(x), F.linear(x, layer.weight, layer.bias), rtol=0, atol=0)
    assert not calls


@torch.no_grad()
def test_counters_and_exporters_see_torchs_operators() -> None:
    layer, x = Linear(8, 16), torch.randn(5, 8)
    with FlopCounterMode(display=False) as counter:
        layer(x)
    assert counter.get_total_flops() == 2 * 5 * 8 * 16
    program = torch.export.export(nn.Sequential(layer), (x,))
    assert [str(node.target) for node in program.graph.nodes if node.op == "call_function"] == ["aten.linear.default"]


@torch.no_grad()
def test_torch_says_what_does_not_fit() -> None:
    with pytest.raises(RuntimeError, match="cannot be multiplied"):
        Linear(8, 4)(torch.randn(3, 7))


@torch.no_grad()
def test_new_weights_count_at_once(calls: list[tuple[int, ...]]) -> None:
    layer, x = Linear(8, 4), torch.randn(3, 8)
    before = layer(x)
    layer.weight.data.mul_(2)
    layer.bias.data.mul_(2)
    torch.testing.assert_close(layer(x), 2 * before)
    assert len(calls) == 2


def test_a_layer_is_the_same_but_for_its_class(monkeypatch: pytest.MonkeyPatch) -> None:
    class Scaled(nn.Linear):
        """Computes something else."""

    monkeypatch.setattr(linear, "_LEAST_WEIGHTS", 512)
    module = nn.Sequential(nn.Linear(16, 32), nn.Linear(32, 8), Scaled(8, 64))
    first, weight, seen = module[0], module[0].weight, []
    module[0].register_forward_hook(lambda *_: seen.append(True))
    shown, keys = repr(module), list(module.state_dict())
    use_onednn(module)
    assert [type(part) for part in module] == [Linear, nn.Linear, Scaled]
    assert module[0] is first and module[0].weight is weight
    assert (repr(module), list(module.state_dict())) == (shown, keys)
    with torch.no_grad():
        copied = copy.deepcopy(module)
        torch.testing.assert_close(copied(torch.ones(2, 16)), module(torch.ones(2, 16)))
    assert seen == [True, True]


@pytest.mark.parametrize("name", ["open_clip:tiny", "umt:tiny", "testa:tiny"])
def test_towers(calls: list[tuple[int, ...]], monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """All layers of the blocks, and what a video becomes."""
    monkeypatch.setattr(linear, "_LEAST_WEIGHTS", 0)
    torch.manual_seed(0)
    frontend = create_frontend(name, num_frames=4, method="none").eval()
    layers = [part for part in frontend.blocks.modules() if isinstance(part, nn.Linear)]
    assert layers and {type(part) for part in layers} == {Linear}
    side = frontend.shape.image_size
    video = torch.randn(2, 4, 3, side, side)
    with torch.no_grad():
        fast = frontend(video)
        with kernels.plain():
            plain = frontend(video)
    assert len(calls) == len(layers)
    torch.testing.assert_close(fast.tokens, plain.tokens, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(fast.pooled, plain.pooled, rtol=1e-5, atol=1e-5)


def test_small_layers_stay_as_they_are() -> None:
    block = nn.ModuleDict({"proj": nn.Linear(512, 512), "head": nn.Linear(512, 500)})
    use_onednn(block)
    assert [type(block[name]) for name in ("proj", "head")] == [Linear, nn.Linear]
