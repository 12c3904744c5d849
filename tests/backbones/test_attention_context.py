"""What merging reads of attention is the attention that ran: rows and column sums without the matrix."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
import transformers
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from tempme_vl import create_frontend
from tempme_vl.backbones import hf, umt
from tempme_vl.backbones import timm as timm_family
from tempme_vl.backbones.base import Backbone
from tempme_vl.backbones.open_clip import load_clip
from tempme_vl.backbones.open_clip_blocks import visual_backbone
from tempme_vl.state import AttentionContext

WIDTH, HEADS, TOKENS = 32, 4, 17
SIZE = {"hidden_size": WIDTH, "num_hidden_layers": 1, "num_attention_heads": HEADS, "image_size": 32, "patch_size": 8}
TIMM: dict[str, Any] = {"img_size": 32, "patch_size": 8, "embed_dim": WIDTH, "depth": 1, "num_heads": HEADS}
TIMM |= {"qk_norm": True, "scale_attn_norm": True}


def of_transformers(name: str, **options: Any) -> Backbone:
    model_class = getattr(transformers, name)
    config = model_class.config_class(**SIZE, intermediate_size=64, **options)
    return hf.backbone_of(model_class._from_config(config, attn_implementation="sdpa"))[0]


TOWERS = {
    "open_clip": lambda: visual_backbone(load_clip("tiny", None).clip.visual),
    "umt": lambda: umt.build(umt.UMTConfig(32, 8, WIDTH, 1, HEADS, None, 2)),
    "timm, qk-norm": lambda: timm_family.backbone_of(timm.create_model("vit_tiny_patch16_224", **TIMM))[0],
    "hf, scale": lambda: of_transformers("SiglipVisionModel"),
    "hf, qk-norm": lambda: of_transformers("InternVLVisionModel", use_qk_norm=True, norm_type="rms_norm"),
}


def attended(name: str, monkeypatch: pytest.MonkeyPatch, sized: bool) -> tuple[AttentionContext, Tensor, Tensor]:
    """The context of a first block, and the values and the result of the fused attention that ran in it."""
    torch.manual_seed(0)
    backbone = TOWERS[name]().double().eval()
    with torch.no_grad():
        for parameter in backbone.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    ran: list[Tensor] = []
    fused = F.scaled_dot_product_attention

    def watched(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Tensor:
        ran.extend([v, fused(q, k, v, **options)])
        return ran[-1]

    monkeypatch.setattr(F, "scaled_dot_product_attention", watched)
    x = torch.randn(3, TOKENS, backbone.shape.width, dtype=torch.float64, requires_grad=True)
    size = torch.randint(1, 9, (3, 1, 1, TOKENS)).double()
    _, context = backbone.blocks[0].attention_branch(x, size.log() if sized else None)
    return context, *ran


@pytest.mark.parametrize("sized", [True, False])
@pytest.mark.parametrize("name", TOWERS)
def test_rows_and_column_sums_are_of_the_attention_that_ran(
    name: str, sized: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    context, values, result = attended(name, monkeypatch, sized)
    matrix = context.rows(0, TOKENS)
    torch.testing.assert_close(matrix @ values, result, rtol=0, atol=1e-10)
    torch.testing.assert_close(context.rows(2, 4), matrix[:, :, 2:4], rtol=0, atol=1e-12)
    off = matrix - torch.diag_embed(matrix.diagonal(dim1=-2, dim2=-1))
    for chunk in (1, 5, TOKENS, 100):
        torch.testing.assert_close(context.column_sums(chunk=chunk), matrix.sum(2), rtol=0, atol=1e-12)
        without = context.column_sums(diagonal=False, chunk=chunk)
        torch.testing.assert_close(without, off.sum(2), rtol=0, atol=1e-12)


class Largest(TorchDispatchMode):
    """Elements of the largest tensor that was made."""

    elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        if isinstance(made, Tensor):
            self.elements = max(self.elements, made.numel())
        return made


def test_no_more_of_the_matrix_is_made_than_was_asked_for() -> None:
    queries, keys = torch.randn(2, 1, 4, 300, 2)
    context = AttentionContext(keys, queries)
    for ask, rows in (
        (lambda: context.rows(0, 1), 1),
        (lambda: context.column_sums(chunk=20), 20),
        (lambda: context.rows(0, 300), 300),
    ):
        with Largest() as largest:
            ask()
        assert largest.elements == max(rows * 300 * 4, 300 * 4 * 2)


def test_rows_have_a_gradient_and_what_is_compared_has_none(monkeypatch: pytest.MonkeyPatch) -> None:
    context, _, _ = attended("open_clip", monkeypatch, True)
    assert context.keys.requires_grad and context.rows(0, 1).requires_grad
    assert not context.column_sums().requires_grad and not context.features().requires_grad
    assert torch.equal(context.features(), context.keys.detach().mean(1))


def test_half_precision_is_judged_in_float32() -> None:
    q, k = torch.randn(2, 2, 4, 9, 8).bfloat16()
    exact = AttentionContext(k.double(), q.double(), scale=0.3).rows(0, 2)
    with torch.autocast("cpu", torch.bfloat16):
        rows, sums = AttentionContext(k, q, scale=0.3).rows(0, 2), AttentionContext(k, q).column_sums()
    assert rows.dtype == sums.dtype == torch.float32
    torch.testing.assert_close(rows.double(), exact, rtol=0, atol=1e-6)


def test_where_no_attention_has_run_the_tokens_are_compared() -> None:
    x = torch.randn(2, 5, 3)
    context = AttentionContext.of_tokens(x)
    assert torch.equal(context.features(), x)
    for read in (lambda: context.rows(0, 1), context.column_sums):
        with pytest.raises(ValueError, match="reads attention, and none has run here"):
            read()


def test_fused_attention_runs_alone_where_no_method_reads_more(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its matrix is not made a second time."""

    def refuse(*_: object) -> Tensor:
        raise AssertionError("a method of keys asked for attention")

    monkeypatch.setattr(AttentionContext, "rows", refuse)
    for method, options in (("tome", {"r": 2}), ("none", {})):
        create_frontend("open_clip:tiny", method=method, num_frames=2, **options)(torch.randn(1, 2, 3, 32, 32))


@pytest.mark.parametrize("sized", [True, False])
def test_what_is_attended_to_beside_the_tokens_keeps_its_share(sized: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    context, *_ = attended("open_clip", monkeypatch, sized)
    if context.bias is not None:
        bias = context.bias.clone()
        bias[..., -3:] = 0  # of size 1
        context = replace(context, bias=bias)
    whole, tokens = context.rows(0, TOKENS), TOKENS - 3
    cut = context.without_last(3)
    torch.testing.assert_close(cut.rows(0, tokens), whole[:, :, :tokens, :tokens], rtol=0, atol=1e-12)
    torch.testing.assert_close(cut.column_sums(), whole[:, :, :tokens, :tokens].sum(2), rtol=0, atol=1e-12)
    assert cut.keys.shape[2] == cut.features().shape[1] == tokens
