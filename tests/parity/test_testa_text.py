"""BLIP's text models equal the original: a text alone, with a video, and written word by word; gradients."""

from __future__ import annotations

import pytest
import torch
from parity.cases import Case, assert_close, find
from parity.testa import decoder_of, text_of
from torch import Tensor, nn

from tempme_vl.text import BertDecoder, decoder_to_umt
from tempme_vl.text.blip import started, text_to_public

CASES = find("testa", "testa_text*", outside=True)
SMOOTHING = 0.1


def layers_of(model: nn.Module) -> list[Tensor]:
    """Fills with what leaves the embeddings and every layer, when the model runs."""
    seen: list[Tensor] = []
    for module in (model.embeddings, *model.layers):
        module.register_forward_hook(lambda _, __, x: seen.append(x))
    return seen


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("mode", ["text", "fusion"])
@torch.no_grad()
def test_every_layer(case: Case, mode: str) -> None:
    t, text = case.tensors, text_of(case, case.config["config"]["heads"])
    seen = layers_of(text)
    if mode == "text":
        text(t["in.ids"], t["in.mask"])
    else:
        text.fuse(t["in.ids"], t["in.mask"], text.keys_values(t["in.video"].double(), sizes(t)))
    assert len(seen) == text.shape.layers + 1
    for number, x in enumerate(seen):
        assert_close(x, t[f"out.{mode}.h{number}"], f"states {number}")


def sizes(t: dict[str, Tensor]) -> Tensor:
    """A token that is not real counts as none."""
    return t["in.video_mask"].unsqueeze(-1).double()


def grads_of(model: nn.Module, public: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """Of the weights, by the names of the file."""
    pointers = {p.data_ptr(): p.grad for p in model.parameters()}
    given = {prefix + key: pointers[value.data_ptr()] for key, value in public.items()}
    return {key: grad for key, grad in given.items() if grad is not None}


@pytest.mark.parametrize("case", CASES, ids=str)
def test_gradients_of_fusion(case: Case) -> None:
    t, text = case.tensors, text_of(case, case.config["config"]["heads"])
    video = t["in.video"].double().requires_grad_()
    states = text.fuse(t["in.ids"], t["in.mask"], text.keys_values(video, sizes(t)))
    weights = t["in.gradw_fusion"] * t["in.mask"].unsqueeze(-1)  # of real words
    (states * weights).sum().backward()
    compare(case, "fusion", {"in.video": video.grad, **grads_of(text, text_to_public(text), "text_encoder.")})


def compare(case: Case, part: str, found: dict[str, Tensor]) -> None:
    expected = case.group(f"grad.{part}.")
    assert expected and expected.keys() <= found.keys()
    for key, grad in expected.items():
        assert_close(found[key], grad, key, 1e-5 * max(1, grad.abs().max().item()))


def decoder_parts(case: Case) -> tuple[BertDecoder, Tensor, Tensor]:
    """The decoder, and ids and targets (B, 1, L) that start with [DEC]."""
    t, text = case.tensors, text_of(case, case.config["config"]["heads"])
    decoder = decoder_of(case, text.shape, text.shape.cross_width)
    return decoder, started(t["in.ids"], text.shape.decode).unsqueeze(1), (t["in.targets"] >= 0).unsqueeze(1)


@pytest.mark.parametrize("case", CASES, ids=str)
@torch.no_grad()
def test_decoder(case: Case) -> None:
    t, (decoder, ids, targets) = case.tensors, decoder_parts(case)
    keys = decoder.keys_values(t["in.video"].double(), t["in.video_mask"])
    logits, real = decoder(ids, keys).squeeze(1), t["in.mask"].bool()
    assert_close(logits[real], t["out.decoder.logits"].double()[real], "logits")
    for name, smoothing in (("loss_none", SMOOTHING), ("loss_none_without_smoothing", 0.0)):
        losses = decoder.sequence_loss(ids, targets, keys, smoothing)
        assert_close(losses.squeeze(1), t[f"out.decoder.{name}"], name)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_gradients_of_the_decoder(case: Case) -> None:
    t, (decoder, ids, targets) = case.tensors, decoder_parts(case)
    video = t["in.video"].double().requires_grad_()
    losses = decoder.sequence_loss(ids, targets, decoder.keys_values(video, t["in.video_mask"]), SMOOTHING)
    loss = losses.sum() / targets[..., 1:].sum()
    assert_close(loss, t["out.decoder.loss_mean"], "mean loss")
    loss.backward()
    compare(case, "decoder", {"in.video": video.grad, **grads_of(decoder, decoder_to_umt(decoder), "text_decoder.")})
