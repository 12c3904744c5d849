"""Our BERT equals transformers' public BertModel, weights loaded by name: states, gradients, dropout.

An encoder is the reference of the text layers; one with causal words and cross-attention of the decoder; the same with
a mask that lets words look both ways of the fusion layers.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import pytest
import torch
import torch.nn.functional as F
import transformers
from bert_reference import bert_config
from torch import Tensor, nn
from transformers import BertModel

from tempme_vl.text import BertDecoder, BertFusion, BertShape, BertTextEncoder, load_umt_decoder

CASES = {  # width, heads, width of the MLP, layers, width of a video's tokens
    "three heads": (24, 3, 40, 2, 17, torch.float64),
    "float32": (24, 3, 40, 2, 17, torch.float32),
    "one head and layer": (16, 1, 70, 1, 16, torch.float64),
    "twelve heads": (60, 12, 30, 4, 8, torch.float64),
}
every_attention = pytest.mark.parametrize("attention", ["eager", "sdpa"])
TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-12}  # of the largest number
WORDS, SEEN = torch.tensor([9, 4, 6, 1]), torch.tensor([5, 7, 1, 4])  # of each row, the rest is padding


@pytest.fixture(params=CASES)
def shape(request: pytest.FixtureRequest) -> Iterator[BertShape]:
    """All is made in the case's precision: transformers 4 makes masks of the default one."""
    width, heads, mlp_width, layers, cross_width, dtype = CASES[request.param]
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    yield BertShape(width, layers + 1, heads, mlp_width, 1, cross_width, vocab_size=30, positions=11, dropout=0.3)
    torch.set_default_dtype(before)


def reference_of(shape: BertShape, attention: str, cross: bool = False) -> BertModel:
    """In eval mode, with weights large enough that a wrong mask shows."""
    torch.manual_seed(0)
    decoder = {"is_decoder": True, "add_cross_attention": True} if cross else {}
    config = bert_config(shape, shape.layers - 1, attn_implementation=attention, **decoder)
    model = BertModel(config, add_pooling_layer=False)
    for parameter in model.parameters():
        parameter.data.add_(0.2 * torch.randn_like(parameter))
    return model.eval()


def real(lengths: Tensor) -> Tensor:
    return (torch.arange(int(lengths.max())) < lengths[:, None]).long()


def words() -> tuple[Tensor, Tensor]:
    mask = real(WORDS)
    return torch.randint(1, 30, mask.shape) * mask, mask


def assert_same(actual: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    assert actual.keys() == expected.keys()
    largest = max(value.abs().max().item() for value in expected.values())
    for name, value in expected.items():
        torch.testing.assert_close(actual[name], value, rtol=0, atol=TOLERANCE[value.dtype] * largest, msg=name)


def gradients(model: nn.Module, states: Tensor, mask: Tensor) -> dict[str, Tensor]:
    """Of all weights under our names, for a random function of real words' states."""
    probe = torch.randn(states.shape, dtype=states.dtype, generator=torch.Generator().manual_seed(3))
    (states * probe)[mask.bool()].sum().backward()
    return {name.replace("encoder.layer.", "layers."): p.grad for name, p in model.named_parameters()}


def text_of(reference: BertModel, shape: BertShape) -> BertTextEncoder:
    text = BertTextEncoder(BertShape(**{**shape.to_dict(), "fusion_layer": shape.layers - 1}))
    text.load_state_dict({n.replace("encoder.layer.", "layers."): v for n, v in reference.state_dict().items()})
    return text.eval()


class Bare(nn.Module):
    """Instead of the language head, which BertModel has not."""

    def forward(self, states: Tensor, words: nn.Module) -> Tensor:
        return states


def decoder_of(reference: BertModel, shape: BertShape) -> BertDecoder:
    decoder = BertDecoder(shape, shape.layers - 1)
    load_umt_decoder(decoder, {f"bert.{name}": value for name, value in reference.state_dict().items()})
    decoder.head = Bare()
    return decoder.eval()


@every_attention
def test_text_layers(shape: BertShape, attention: str) -> None:
    reference = reference_of(shape, attention)
    text, (ids, mask) = text_of(reference, shape), words()
    actual, expected = text(ids, mask), reference(input_ids=ids, attention_mask=mask).last_hidden_state
    assert_same({"states": actual[mask.bool()]}, {"states": expected[mask.bool()]})
    assert_same(gradients(text, actual, mask), gradients(reference, expected, mask))


@every_attention
def test_decoder_layers(shape: BertShape, attention: str) -> None:
    """Three answers to each of four questions; the reference reads each question three times."""
    reference = reference_of(shape, attention, cross=True)
    decoder, (ids, mask) = decoder_of(reference, shape), words()
    ids, mask = (torch.stack([t, t.roll(1, 0), t.roll(2, 0)], dim=1) for t in (ids, mask))
    question, question_mask = torch.randn(4, 7, shape.width, requires_grad=True), real(SEEN)
    again = question.detach().clone().requires_grad_()
    actual = decoder(ids, decoder.keys_values(question, question_mask)).flatten(0, 1)
    expected = reference(
        input_ids=ids.flatten(0, 1),
        attention_mask=mask.flatten(0, 1),
        encoder_hidden_states=again.repeat_interleave(3, dim=0),
        encoder_attention_mask=question_mask.repeat_interleave(3, dim=0),
    ).last_hidden_state
    mask = mask.flatten(0, 1)
    assert_same({"states": actual[mask.bool()]}, {"states": expected[mask.bool()]})
    ours, theirs = gradients(decoder, actual, mask), gradients(reference, expected, mask)
    assert_same({**ours, "question": question.grad}, {**theirs, "question": again.grad})


@every_attention
def test_fusion_layers(shape: BertShape, attention: str) -> None:
    """The reference reads tokens of its own width: ours and zeros, so that its other weights do not matter."""
    reference = reference_of(shape, attention, cross=True)
    (ids, mask), tokens, token_mask = words(), torch.randn(4, 7, shape.cross_width), real(SEEN)
    both_ways = mask[:, None, :].expand(-1, mask.shape[1], -1)
    if int(transformers.__version__.split(".")[0]) >= 5:  # what is added to the logits; before, 0 and 1
        both_ways = torch.where(both_ways.bool()[:, None], 0.0, torch.finfo().min)
    output = reference(
        input_ids=ids,
        attention_mask=both_ways,
        encoder_hidden_states=F.pad(tokens, (0, shape.width - shape.cross_width)),
        encoder_attention_mask=token_mask,
        output_hidden_states=True,
    )

    def ours(named: Mapping[str, Tensor]) -> dict[str, Tensor]:
        named = {n.replace("encoder.layer.", "layers."): v for n, v in named.items() if not n.startswith("embeddings.")}
        read = ("crossattention.self.key.weight", "crossattention.self.value.weight")
        return {name: v[:, : shape.cross_width] if name.endswith(read) else v for name, v in named.items()}

    fusion = BertFusion(shape).eval()
    fusion.load_state_dict(ours(reference.state_dict()))
    size = token_mask[..., None].to(tokens)  # a token that stands for none
    actual = fusion(output.hidden_states[0].detach(), mask, fusion.keys_values(tokens, size))
    expected = output.last_hidden_state
    assert_same({"states": actual[mask.bool()]}, {"states": expected[mask.bool()]})
    assert_same(gradients(fusion, actual, mask), ours(gradients(reference, expected, mask)))


@pytest.mark.parametrize("cross", [False, True], ids=["text", "decoder"])
def test_the_same_seed_drops_the_same(shape: BertShape, cross: bool) -> None:
    reference = reference_of(shape, "sdpa", cross).train()
    ours = (decoder_of if cross else text_of)(reference, shape).train()
    (ids, mask), question, question_mask = words(), torch.randn(4, 7, shape.width), real(SEEN)
    seen = {"encoder_hidden_states": question, "encoder_attention_mask": question_mask} if cross else {}
    states = []
    for seed in (5, 5, 6):
        torch.manual_seed(seed)
        if cross:
            states.append(ours(ids[:, None], ours.keys_values(question, question_mask)).squeeze(1))
        else:
            states.append(ours(ids, mask))
    torch.manual_seed(5)
    expected = reference(input_ids=ids, attention_mask=mask, **seen).last_hidden_state[mask.bool()]
    first, again, other = (x[mask.bool()] for x in states)
    assert torch.equal(first, again) and not torch.isclose(first, other).all(-1).any()
    assert_same({"states": first}, {"states": expected})
