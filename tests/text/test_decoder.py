"""The answer decoder: equal to transformers', causal, blind to padding; a question's answers share its keys."""

from __future__ import annotations

import itertools
from copy import deepcopy

import pytest
import torch
from bert_reference import bert_config
from peft import LoraConfig, inject_adapter_in_model
from torch import Tensor
from transformers import BertLMHeadModel

from tempme_vl.text import BertDecoder, BertShape, QuestionKeys, decoder_to_umt, load_umt_decoder

SHAPE = BertShape(width=24, layers=4, heads=3, mlp_width=40, fusion_layer=2, cross_width=16, vocab_size=20, positions=9)
START, END = 2, 3
QUESTION_LENGTHS = (7, 3, 5)
ANSWER_LENGTHS = (5, 2, 3, 4)


def decoder_of(shape: BertShape = SHAPE, layers: int = 2, seed: int = 0) -> BertDecoder:
    """In eval mode, with weights large enough that a wrong mask shows."""
    torch.manual_seed(seed)
    decoder = BertDecoder(shape, layers)
    for parameter in decoder.parameters():
        parameter.data.add_(0.2 * torch.randn_like(parameter))
    return decoder.eval()


def questions() -> tuple[Tensor, Tensor]:
    """States and mask of three questions."""
    states = torch.randn(3, 7, SHAPE.width, generator=torch.Generator().manual_seed(1))
    return states, (torch.arange(7) < torch.tensor(QUESTION_LENGTHS)[:, None]).long()


def answers() -> tuple[Tensor, Tensor]:
    """Four answers to each of three questions, (3, 4, 5), of different lengths; each ends with the end token."""
    ids = torch.randint(4, SHAPE.vocab_size, (3, 4, 5), generator=torch.Generator().manual_seed(2))
    length = torch.tensor(ANSWER_LENGTHS)[None, :, None]
    ids[..., 0] = START
    ids = torch.where(torch.arange(5) == length - 1, END, ids)
    mask = (torch.arange(5) < length).long().expand(3, -1, -1)
    return ids * mask, mask


def losses_of(decoder: BertDecoder, dtype: torch.dtype = torch.float32) -> Tensor:
    states, mask = questions()
    return decoder.sequence_loss(*answers(), decoder.keys_values(states.to(dtype), mask))


def loss_of(decoder: BertDecoder) -> Tensor:
    return losses_of(decoder).sum()


def assert_close(actual: Tensor, expected: Tensor, atol: float = 5e-6) -> None:
    torch.testing.assert_close(actual, expected, rtol=0, atol=atol)


def test_equals_transformers() -> None:
    decoder = decoder_of()
    config = bert_config(SHAPE, 2, is_decoder=True, add_cross_attention=True, tie_word_embeddings=True)
    reference = BertLMHeadModel(config)
    missing, unexpected = reference.load_state_dict(decoder_to_umt(decoder), strict=False)
    assert not unexpected and all("position_ids" in name or ".decoder." in name for name in missing)
    reference.tie_weights()
    reference.cls.predictions.decoder.bias = reference.cls.predictions.bias
    reference.eval()
    (states, question_mask), (ids, mask) = questions(), answers()
    rows = torch.arange(3).repeat_interleave(4)
    with torch.no_grad():
        expected = reference(
            input_ids=ids.flatten(0, 1),
            attention_mask=mask.flatten(0, 1),
            encoder_hidden_states=states[rows],
            encoder_attention_mask=question_mask[rows],
        ).logits
    actual = decoder(ids, decoder.keys_values(states, question_mask)).flatten(0, 1)
    real = mask.flatten(0, 1).bool()
    assert_close(actual[real], expected[real], 1e-5)


def test_words_see_only_those_before_them() -> None:
    decoder, (ids, _) = decoder_of(), answers()
    question = decoder.keys_values(*questions())
    logits = decoder(ids, question)
    for position in range(1, 5):
        changed = ids.clone()
        changed[..., position] = (ids[..., position] + 5) % SHAPE.vocab_size
        other = decoder(changed, question)
        assert torch.equal(other[..., :position, :], logits[..., :position, :])
        assert not torch.isclose(other[..., position:, :], logits[..., position:, :]).flatten(3).all(-1).any()


def test_padding_of_answers_does_not_matter() -> None:
    decoder, (ids, mask) = decoder_of(), answers()
    question = decoder.keys_values(*questions())
    losses = decoder.sequence_loss(ids, mask, question)
    assert torch.equal(decoder.sequence_loss(ids.where(mask.bool(), 7), 2.0 * mask, question), losses)
    longer = [torch.cat([t, torch.zeros(3, 4, 3, dtype=t.dtype)], dim=-1) for t in (ids, mask)]
    assert_close(decoder.sequence_loss(*longer, question), losses)
    for number, length in enumerate(ANSWER_LENGTHS):
        one = slice(number, number + 1)
        short = ids[:, one, :length]
        assert_close(decoder.sequence_loss(short, torch.ones_like(short), question), losses[:, one])


def test_padding_of_questions_does_not_matter() -> None:
    decoder, (states, question_mask) = decoder_of(), questions()
    losses = decoder.sequence_loss(*answers(), decoder.keys_values(states, question_mask))
    noisy = torch.where(question_mask.bool()[..., None], states, 9.0)
    assert torch.equal(decoder.sequence_loss(*answers(), decoder.keys_values(noisy, question_mask)), losses)
    for number, length in enumerate(QUESTION_LENGTHS):
        one = slice(number, number + 1)
        question = decoder.keys_values(states[one, :length], question_mask[one, :length])
        assert_close(decoder.sequence_loss(*(t[one] for t in answers()), question), losses[one])
    everything = decoder.keys_values(states, torch.ones_like(question_mask))
    assert not torch.isclose(decoder.sequence_loss(*answers(), everything)[1:], losses[1:]).any()


def test_answers_share_their_question_and_do_not_see_each_other() -> None:
    decoder, (ids, mask) = decoder_of(), answers()
    question = decoder.keys_values(*questions())
    losses = decoder.sequence_loss(ids, mask, question)
    assert len(question) == 3 and losses.shape == (3, 4)
    for row, number in itertools.product(range(3), range(4)):
        alone = question.select(torch.tensor([row]))
        one = decoder.sequence_loss(ids[row, number][None, None], mask[row, number][None, None], alone)
        assert_close(one.squeeze(), losses[row, number])
    rows = torch.arange(3).repeat_interleave(4)
    each = decoder.sequence_loss(ids.flatten(0, 1)[:, None], mask.flatten(0, 1)[:, None], question.select(rows))
    assert_close(each.view(3, 4), losses)
    assert not torch.isclose(decoder.sequence_loss(ids, mask, question.select(torch.tensor([1, 2, 0]))), losses).any()


def test_losses_are_log_likelihoods() -> None:
    """The probabilities of all answers of two words sum to 1."""
    decoder = decoder_of()
    question = decoder.keys_values(*questions())
    pairs = torch.cartesian_prod(torch.arange(SHAPE.vocab_size), torch.arange(SHAPE.vocab_size))
    ids = torch.cat([torch.full((len(pairs), 1), START), pairs], dim=1).expand(3, -1, -1)
    losses = decoder.sequence_loss(ids, torch.ones_like(ids), question)
    assert_close(losses.neg().exp().sum(1), torch.ones(3), 1e-4)
    first = decoder(ids[:, :1, :1], question).log_softmax(-1)[:, 0, 0]
    one_word = decoder.sequence_loss(ids[..., :2], torch.ones_like(ids[..., :2]), question)
    assert_close(one_word, -first[:, pairs[:, 0]])


@pytest.mark.parametrize("seed", range(3))
@torch.no_grad()
def test_generation_equals_argmax_without_cache(seed: int) -> None:
    decoder = decoder_of(seed=seed)
    decoder.head.bias[END] += 2.0 * seed  # answers of different lengths
    question = decoder.keys_values(*questions())
    generated = decoder.generate(question, START, END, 8)
    assert generated.shape == (3, 8) and generated.dtype == torch.int64
    for row in range(3):
        one, words = question.select(torch.tensor([row])), [START]
        while len(words) < 9 and words[-1] != END:
            words.append(int(decoder(torch.tensor(words)[None, None], one)[0, 0, -1].argmax()))
        assert generated[row].tolist() == words[1:] + [0] * (9 - len(words))


def test_generation_stops_at_the_end_token() -> None:
    decoder = decoder_of()
    decoder.head.bias.data[END] = 1e4
    question = decoder.keys_values(*questions())
    assert decoder.generate(question, START, END, 4).tolist() == [[END, 0, 0, 0]] * 3
    decoder.head.bias.data[END] = -1e4
    assert (decoder.generate(question, START, END, 4) != END).all()


def test_every_weight_gets_a_gradient() -> None:
    decoder, (states, question_mask) = decoder_of(), questions()
    states.requires_grad_()
    decoder.sequence_loss(*answers(), decoder.keys_values(states, question_mask)).sum().backward()
    for name, parameter in decoder.named_parameters():
        # softmax does not see what is added to all keys, so a key's bias has no gradient
        if not name.endswith("key.bias"):
            assert parameter.grad.abs().sum() > 0, name
    real = question_mask.bool()
    assert states.grad[real].abs().sum(-1).all() and not states.grad[~real].any()


def test_the_word_table_works_both_ways() -> None:
    """One weight, stored once; the projection alone gives words that were never read a gradient."""
    decoder = decoder_of()
    assert [n for n, p in decoder.named_parameters() if p.shape == (SHAPE.vocab_size, SHAPE.width)] == [
        "embeddings.word_embeddings.weight"
    ]
    assert len(decoder.state_dict()) == len(dict(decoder.named_parameters()))
    ids = torch.full((3, 1, 2), START)
    decoder.sequence_loss(ids, torch.ones_like(ids), decoder.keys_values(*questions())).sum().backward()
    assert decoder.embeddings.word_embeddings.weight.grad.abs().sum(1).all()


@pytest.mark.parametrize("training", [False, True])
def test_checkpointing_is_exact(training: bool) -> None:
    plain = decoder_of()
    checkpointed = deepcopy(plain)
    checkpointed.grad_checkpointing = True
    losses, calls = [], []
    for decoder in (plain, checkpointed):
        decoder.layers[0].intermediate.register_forward_hook(
            lambda *_, key=decoder.grad_checkpointing: calls.append(key)
        )
        decoder.train(training)
        torch.manual_seed(3)  # the dropout of a recomputed layer is that of its first pass
        losses.append(loss_of(decoder))
        losses[-1].backward()
    assert torch.equal(*losses)
    assert calls == [False, True, True]
    for (name, p), q in zip(plain.named_parameters(), checkpointed.parameters(), strict=True):
        assert torch.equal(p.grad, q.grad), name


def test_dropout_reaches_both_attentions_and_only_in_training() -> None:
    decoder = decoder_of()
    expected = loss_of(decoder)
    assert loss_of(decoder.train()) != expected
    for module in decoder.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    assert torch.equal(loss_of(decoder), expected)
    for attention in (decoder.layers[0].attention.self, decoder.layers[0].crossattention.self):
        attention.dropout.p = 0.5
        assert loss_of(decoder) != expected
        attention.dropout.p = 0.0


def test_precisions() -> None:
    decoder = decoder_of()
    expected = losses_of(decoder).detach()
    with torch.autocast("cpu", torch.bfloat16):
        half = losses_of(decoder)
    torch.testing.assert_close(half, expected, rtol=0.02, atol=0)
    half.sum().backward()
    assert all(p.grad.isfinite().all() for p in decoder.parameters())
    torch.testing.assert_close(losses_of(decoder.double(), torch.float64), expected.double(), rtol=1e-5, atol=0)


def test_lora_reaches_training_and_generation() -> None:
    decoder = decoder_of()
    before = loss_of(decoder)
    inject_adapter_in_model(LoraConfig(r=2, lora_alpha=4, target_modules=["query", "key", "value"]), decoder)
    assert loss_of(decoder).item() == pytest.approx(before.item(), rel=1e-6), "B starts at zero"
    adapters = [(name, p) for name, p in decoder.named_parameters() if "lora_" in name]
    assert len(adapters) == 2 * 2 * 2 * 3
    for name, parameter in adapters:
        if "lora_B" in name:
            torch.nn.init.normal_(parameter)
    loss_of(decoder).backward()
    assert all(p.grad.abs().sum() > 0 for _, p in adapters)
    question = decoder.keys_values(*questions())
    words = decoder.generate(question, START, END, 3)
    start = torch.full((3, 1, 1), START)
    assert torch.equal(words[:, 0], decoder(start, question)[:, 0, 0].argmax(-1))


def test_umt_names_and_round_trip() -> None:
    decoder, other = decoder_of(), decoder_of(seed=1)
    state = decoder_to_umt(decoder)
    assert {"bert.embeddings.word_embeddings.weight", "bert.encoder.layer.1.crossattention.self.key.weight"} < set(
        state
    )
    assert {name for name in state if name.startswith("cls.")} == {
        f"cls.predictions.{name}"
        for name in ("bias", *(f"transform.{part}.{p}" for part in ("dense", "LayerNorm") for p in ("weight", "bias")))
    }
    state["bert.embeddings.position_ids"] = torch.arange(9)[None]
    state["cls.predictions.decoder.weight"] = state["bert.embeddings.word_embeddings.weight"].clone()
    state["cls.predictions.decoder.bias"] = state["cls.predictions.bias"].clone()
    load_umt_decoder(other, state)
    expected = decoder.state_dict()
    assert all(torch.equal(weight, expected[name]) for name, weight in other.state_dict().items())
    assert torch.equal(losses_of(other), losses_of(decoder))
    kept = decoder_of(seed=1)
    load_umt_decoder(kept, {name: value for name, value in state.items() if name.startswith("cls.")})
    assert torch.equal(kept.head.bias, decoder.head.bias) and not torch.equal(loss_of(kept), loss_of(decoder))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"cls.predictions.decoder.weight": (20, 24)}, r"others: \['cls.predictions.decoder.weight'\]"),
        ({"bert.encoder.layer.2.output.dense.bias": (24,)}, r"a decoder of 2 layers has no such weights: .*layer.2"),
        ({"bert.pooler.dense.bias": (24,)}, r"no such weights: \['bert.pooler.dense.bias'\], 1 in all"),
        ({"bert.embeddings.position_embeddings.weight": (8, 24)}, r"(?s)do not fit the decoder of .*position_embedd"),
    ],
)
def test_weights_that_do_not_fit(change: dict[str, tuple[int, ...]], message: str) -> None:
    state = decoder_to_umt(decoder_of()) | {name: torch.zeros(shape) for name, shape in change.items()}
    with pytest.raises(ValueError, match=message):
        load_umt_decoder(decoder_of(), state)


def test_inputs_that_do_not_fit() -> None:
    decoder, (ids, mask), (states, question_mask) = decoder_of(), answers(), questions()
    question: QuestionKeys = decoder.keys_values(states, question_mask)
    with pytest.raises(ValueError, match=r"expected answers \(B, K, L\) to B = 3 questions .*; got \(2, 4, 5\)"):
        decoder(ids[:2], question)
    with pytest.raises(ValueError, match=r"with L <= 9; got \(3, 1, 10\)"):
        decoder(torch.zeros(3, 1, 10, dtype=torch.int64), question)
    with pytest.raises(ValueError, match=r"answers and their mask \(B, K, L\).*; got \(3, 4, 5\) and \(3, 4, 4\)"):
        decoder.sequence_loss(ids, mask[..., 1:], question)
    with pytest.raises(ValueError, match=r"L of at least 2; got \(3, 4, 1\)"):
        decoder.sequence_loss(ids[..., :1], mask[..., :1], question)
    with pytest.raises(ValueError, match=r"question states \(B, L, 24\).*; got \(3, 7, 23\) and \(3, 7\)"):
        decoder.keys_values(states[..., 1:], question_mask)
    with pytest.raises(ValueError, match=r"got \(3, 7, 24\) and \(3, 6\)"):
        decoder.keys_values(states, question_mask[:, 1:])
    for most in (0, 10):
        with pytest.raises(ValueError, match=f"expected max_words of 1 to 9; got {most}"):
            decoder.generate(question, START, END, most)
