"""EViT equals its original implementation, and its gradient that of a plain form with the whole attention matrix."""

from __future__ import annotations

import math

import pytest
import torch
from parity.cases import Case, assert_close, find
from parity.vits import frontend_of, states_of, vit_of
from timm.models import VisionTransformer
from torch import Tensor

from tempme_vl.merging.evit import AttentiveKeep

CASES = [(case, part) for case in find("compressors", "evit*") for part in case.config["cases"]]


def name(value: object) -> str:
    return value["key"] if isinstance(value, dict) else str(value)


@pytest.mark.parametrize(("case", "part"), CASES, ids=name)
def test_inside_a_vit(case: Case, part: dict) -> None:
    t, key, tolerance = case.tensors, part["key"], case.config["tol"]
    rates = part["keep_rate"]
    frontend = frontend_of(vit_of(case), "evit", keep_rate=rates, fuse=part["fuse"])
    seen: dict[int, tuple[Tensor, Tensor]] = {}
    for layer, block in enumerate(frontend.blocks):
        step = block.after_attention
        if isinstance(step, AttentiveKeep):

            def watch(module: AttentiveKeep, inputs: tuple, state, layer: int = layer) -> None:
                before, context = inputs
                attention = context.rows(0, 1)[:, :, 0, 1:].mean(1)
                # which patch of those before each kept one is
                kept = state.x.shape[1] - 1 - module.fuse
                found = (before.x.unsqueeze(1) == state.x[:, 1 : 1 + kept].unsqueeze(2)).all(-1).int().argmax(-1) - 1
                seen[layer] = found, attention

            step.register_forward_hook(watch)
    _, output = states_of(frontend, t["image"])

    assert output.tokens.shape[1] == part["n_tokens"] == frontend.schedule.output_tokens
    assert_close(output.tokens, t[f"{key}.tokens"], "tokens", tolerance)
    assert_close(output.frames.squeeze(1), t[f"{key}.logits"], "logits", tolerance)
    listed = {int(what.split(".")[0]) for what in case.group(f"{key}.block")}
    assert set(seen) == listed
    for layer, (kept, attention) in seen.items():
        assert torch.equal(kept, t[f"{key}.block{layer}.idx"])
        assert_close(attention, t[f"{key}.block{layer}.cls_attn"], "attention", tolerance)


def plain(vit: VisionTransformer, images: Tensor, rates: list[float], fuse: bool) -> Tensor:
    """The logits, by the whole matrix of attention and one image at a time."""
    logits = []
    for image in images:
        x = torch.cat([vit.cls_token[0], vit.patch_embed(image[None])[0]]) + vit.pos_embed[0]
        for block, rate in zip(vit.blocks, rates, strict=True):
            q, k, v = block.attn.qkv(block.norm1(x)).unflatten(-1, (3, block.attn.num_heads, -1)).permute(1, 2, 0, 3)
            matrix = (q @ k.mT * block.attn.scale).softmax(-1)
            x = x + block.attn.proj((matrix @ v).transpose(0, 1).flatten(1))
            left = math.ceil(rate * (len(x) - 1))
            if left < len(x) - 1:
                row = matrix[:, 0, 1:].mean(0)
                order = row.argsort(descending=True)
                fused = [(row[order[left:], None] * x[1 + order[left:]]).sum(0, keepdim=True)] if fuse else []
                x = torch.cat([x[:1], x[1 + order[:left]], *fused])
            x = x + block.mlp(block.norm2(x))
        logits.append(vit.head(vit.norm(x)[0]))
    return torch.stack(logits)


@pytest.mark.parametrize("rates", [None, 0.3, 0.92, 0.01])
@pytest.mark.parametrize(("case", "part"), CASES, ids=name)
def test_gradients(case: Case, part: dict, rates: float | None) -> None:
    """0.92 leaves one patch of 16 out, so that a fused token takes its place."""
    images, fuse = case.tensors["image"].double(), part["fuse"]
    given = part["keep_rate"] if rates is None else [rates] * len(part["keep_rate"])
    vit = vit_of(case).double()
    _, output = states_of(frontend_of(vit, "evit", keep_rate=given, fuse=fuse), images)
    expected = plain(vit, images, given, fuse)
    torch.testing.assert_close(output.frames.squeeze(1), expected, rtol=0, atol=1e-10)
    weights = torch.linspace(-1, 2, expected.shape[1], dtype=torch.float64)
    gradients = [
        torch.autograd.grad((logits.square() * weights).sum(), list(vit.parameters()))
        for logits in (output.frames.squeeze(1), expected)
    ]
    for (name, _), ours, theirs in zip(vit.named_parameters(), *gradients, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-9, msg=name)
