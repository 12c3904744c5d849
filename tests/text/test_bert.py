"""BERT's text and fusion layers: blind to padding, keys of a video shared by its texts, exact in every way to run."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from copy import deepcopy

import pytest
import torch
from peft import LoraConfig, inject_adapter_in_model
from torch import Tensor

from tempme_vl.text import BertFusion, BertShape, BertTextEncoder, bert_from_umt, bert_to_umt

SHAPE = BertShape(
    width=24, layers=4, heads=3, mlp_width=40, fusion_layer=2, cross_width=16, vocab_size=50, positions=12
)
LENGTHS = (9, 4, 6, 1)
VIDEOS, TOKENS = 3, 7


def models(shape: BertShape = SHAPE) -> tuple[BertTextEncoder, BertFusion]:
    """Both in eval mode, with weights large enough that a wrong mask shows."""
    torch.manual_seed(0)
    text, fusion = BertTextEncoder(shape), BertFusion(shape)
    for parameter in (*text.parameters(), *fusion.parameters()):
        parameter.data.add_(0.2 * torch.randn_like(parameter))
    return text.eval(), fusion.eval()


def texts() -> tuple[Tensor, Tensor]:
    ids = torch.randint(3, 50, (len(LENGTHS), 9), generator=torch.Generator().manual_seed(1))
    mask = (torch.arange(9) < torch.tensor(LENGTHS)[:, None]).long()
    ids[:, 0] = 2
    return ids * mask, mask


def videos(width: int = 16) -> Tensor:
    return torch.randn(VIDEOS, TOKENS, width, generator=torch.Generator().manual_seed(2))


def assert_close(actual: Tensor, expected: Tensor, atol: float = 2e-6) -> None:
    torch.testing.assert_close(actual, expected, rtol=0, atol=atol)


def test_a_token_that_holds_several_gets_their_attention() -> None:
    text, fusion = models()
    (ids, mask), tokens = texts(), videos()[[0, 1, 2, 0]]
    times = torch.tensor([1, 3, 1, 2, 1, 1, 4])
    states = text(ids, mask)
    repeated = fusion(states, mask, fusion.keys_values(tokens.repeat_interleave(times, dim=1)))
    keys = fusion.keys_values(tokens, times.view(1, -1, 1).expand(4, -1, -1).float())
    assert_close(fusion(states, mask, keys), repeated)
    assert (fusion(states, mask, fusion.keys_values(tokens)) - repeated).abs().max() > 1e-3
    rows = torch.tensor([2, 2, 0])
    assert_close(fusion(states[rows], mask[rows], keys.select(rows)), repeated[rows])
    (one,) = fusion(states[:1], mask[:1], fusion.keys_values(tokens[:1], times.view(1, -1, 1).float()).expand(1))
    assert_close(one, repeated[0])


def test_keys_of_a_video_serve_all_its_texts() -> None:
    text, fusion = models()
    (ids, mask), tokens = texts(), videos()
    rows = torch.tensor([2, 0, 0, 1])
    states = text(ids, mask)
    keys = fusion.keys_values(tokens)
    assert len(keys) == VIDEOS and len(keys.select(rows)) == 4
    assert all(key.shape == (VIDEOS, 3, TOKENS, 8) for key in (*keys.keys, *keys.values))
    assert len(keys.keys) == len(keys.values) == 2

    shared = fusion(states, mask, keys.select(rows))
    assert_close(shared, fusion(states, mask, fusion.keys_values(tokens[rows])))
    for pair in range(4):
        row = slice(pair, pair + 1)
        alone = fusion(states[row], mask[row], fusion.keys_values(tokens[rows[row]]))
        assert_close(shared[row], alone)
    assert not torch.isclose(shared[1], fusion(states, mask, keys.select(rows.roll(1)))[1]).all(), "videos matter"


def test_one_video_for_many_texts_is_not_copied() -> None:
    text, fusion = models()
    (ids, mask), tokens = texts(), videos()[:1]
    keys = fusion.keys_values(tokens)
    views = keys.expand(4)
    assert len(views) == 4
    pairs = zip((*views.keys, *views.values), (*keys.keys, *keys.values), strict=True)
    assert all(view.data_ptr() == key.data_ptr() for view, key in pairs)
    states = text(ids, mask)
    assert_close(fusion(states, mask, views), fusion(states, mask, keys.select(torch.zeros(4, dtype=torch.int64))))
    with pytest.raises(ValueError, match="expected the keys of one video; got 3 videos"):
        fusion.keys_values(videos()).expand(4)


def test_words_of_one_text_do_not_depend_on_its_padding() -> None:
    text, fusion = models()
    ids, mask = texts()
    keys = fusion.keys_values(videos()).select(torch.tensor([0, 1, 2, 0]))
    states = text(ids, mask)
    fused = fusion(states, mask, keys)
    other = torch.where(mask.bool(), ids, 7)
    changed = text(other, 2.0 * mask)
    assert torch.equal(changed[mask.bool()], states[mask.bool()])
    assert not torch.isclose(changed[~mask.bool()], states[~mask.bool()]).all()
    assert torch.equal(fusion(changed, 2.0 * mask, keys)[mask.bool()], fused[mask.bool()])
    for row, length in enumerate(LENGTHS):
        short, ones = text(ids[row : row + 1, :length], torch.ones(1, length)), torch.ones(1, length)
        assert_close(short[0], states[row, :length])
        seen = fusion(short, ones, keys.select(torch.tensor([row])))
        assert_close(seen[0], fused[row, :length])


def test_words_look_both_ways() -> None:
    text, fusion = models()
    ids, mask = texts()
    keys = fusion.keys_values(videos()).select(torch.tensor([0, 1, 2, 0]))
    states = text(ids, mask)
    changed = states.clone()
    changed[0, 8] += 1
    assert not torch.isclose(fusion(changed, mask, keys)[0, 0], fusion(states, mask, keys)[0, 0]).all()
    ids[0, 8] = ids[0, 8] % 40 + 5
    assert not torch.isclose(text(ids, mask)[0, 0], states[0, 0]).all()


def test_masked_video_tokens_are_as_if_absent() -> None:
    text, fusion = models()
    (ids, mask), tokens = texts(), videos()[[0, 1, 2, 0]]
    states = text(ids, mask)
    real = torch.tensor([7, 4, 1, 6])
    size = (torch.arange(TOKENS) < real[:, None]).float().unsqueeze(-1)
    fused = fusion(states, mask, fusion.keys_values(tokens, size))
    for pair, count in enumerate(real):
        row = slice(pair, pair + 1)
        alone = fusion(states[row], mask[row], fusion.keys_values(tokens[row, :count]))
        assert_close(fused[row], alone)
    everything = torch.ones(4, TOKENS, 1)
    assert_close(
        fusion(states, mask, fusion.keys_values(tokens, everything)), fusion(states, mask, fusion.keys_values(tokens))
    )


def test_the_order_of_video_tokens_does_not_matter() -> None:
    text, fusion = models()
    ids, mask = texts()
    states, tokens = text(ids, mask), videos()[[0, 1, 2, 0]]
    order = torch.randperm(TOKENS)
    assert_close(
        fusion(states, mask, fusion.keys_values(tokens[:, order])), fusion(states, mask, fusion.keys_values(tokens))
    )


def fused_of(text: BertTextEncoder, fusion: BertFusion, dtype: torch.dtype = torch.float32) -> Tensor:
    ids, mask = texts()
    keys = fusion.keys_values(videos().to(dtype)).select(torch.tensor([0, 1, 2, 0]))
    return fusion(text(ids, mask), mask, keys)


def loss_of(text: BertTextEncoder, fusion: BertFusion) -> Tensor:
    return fused_of(text, fusion)[:, 0].square().sum()


@pytest.mark.parametrize("training", [False, True])
def test_checkpointing_is_exact(training: bool) -> None:
    plain = models()
    checkpointed = deepcopy(plain)
    losses = []
    for pair in (plain, checkpointed):
        for model in pair:
            model.train(training)
            model.grad_checkpointing = pair is checkpointed
        torch.manual_seed(3)  # the dropout of a recomputed layer is that of its first pass
        losses.append(loss_of(*pair))
        losses[-1].backward()
    assert torch.equal(*losses)
    for a, b in zip(plain, checkpointed, strict=True):
        for (name, p), q in zip(a.named_parameters(), b.parameters(), strict=True):
            assert torch.equal(p.grad, q.grad), name


def test_every_weight_gets_a_gradient_and_padding_none() -> None:
    text, fusion = models()
    loss_of(text, fusion).backward()
    unused = ("word_embeddings", "position_embeddings", "token_type_embeddings")
    for name, parameter in (*text.named_parameters(), *fusion.named_parameters()):
        # softmax does not see what is added to all keys, so a key's bias has no gradient
        if not name.endswith("key.bias") and not any(part in name for part in unused):
            assert parameter.grad.abs().sum() > 0, name
    ids, mask = texts()
    used = text.embeddings.word_embeddings.weight.grad.abs().sum(1).nonzero().flatten()
    assert set(used.tolist()) == set(ids[mask.bool()].tolist())
    assert not text.embeddings.position_embeddings.weight.grad[max(LENGTHS) :].any()


def test_dropout_only_in_training_and_as_strong_as_told() -> None:
    text, fusion = models()
    assert torch.equal(loss_of(text, fusion), loss_of(text, fusion))
    assert loss_of(text.train(), fusion) != loss_of(text, fusion)
    assert loss_of(text.eval(), fusion.train()) != loss_of(text, fusion)
    text, fusion = models(BertShape(**{**SHAPE.to_dict(), "dropout": 0.0}))
    assert torch.equal(loss_of(text, fusion), loss_of(text.train(), fusion.train()))


def test_attention_dropout_reaches_the_cross_attention() -> None:
    text, fusion = models()
    for module in (*text.modules(), *fusion.modules()):
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    expected = loss_of(text, fusion)
    assert torch.equal(loss_of(text.train(), fusion.train()), expected)
    fusion.layers[0].crossattention.self.dropout.p = 0.5
    assert loss_of(text, fusion) != expected


def test_precisions() -> None:
    text, fusion = models()
    expected = fused_of(text, fusion).detach()
    with torch.autocast("cpu", torch.bfloat16):
        half = fused_of(text, fusion)
    torch.testing.assert_close(half.float(), expected, rtol=0, atol=0.05)
    half.float().square().sum().backward()
    assert all(p.grad.isfinite().all() for p in (*text.parameters(), *fusion.parameters()))
    double = fused_of(text.double(), fusion.double(), torch.float64)
    torch.testing.assert_close(double, expected.double(), rtol=0, atol=1e-5)


def test_lora_on_queries_keys_and_values() -> None:
    text, fusion = models()
    before = loss_of(text, fusion)
    config = LoraConfig(r=2, lora_alpha=4, target_modules=["query", "key", "value"])
    for model in (text, fusion):
        inject_adapter_in_model(config, model)
    assert loss_of(text, fusion).item() == pytest.approx(before.item(), rel=1e-6), "B starts at zero"
    for name, parameter in (*text.named_parameters(), *fusion.named_parameters()):
        if "lora_B" in name:
            torch.nn.init.normal_(parameter)
    loss = loss_of(text, fusion)
    assert abs(loss.item() - before.item()) > 1e-3
    loss.backward()
    adapters = [(n, p) for model in (text, fusion) for n, p in model.named_parameters() if "lora_" in n]
    assert len(adapters) == 2 * 3 * (2 + 2 * 2)  # A and B; self-attention everywhere, cross-attention in the last two
    for name, parameter in adapters:
        assert parameter.grad.abs().sum() > 0, name


def test_names_and_round_trip() -> None:
    text, fusion = models()
    assert all(name.startswith(("embeddings.", "layers.")) for name in text.state_dict())
    assert not any("position_ids" in name for name in text.state_dict())
    assert "layers.1.crossattention.self.key.weight" in fusion.state_dict()
    state = bert_to_umt(text, fusion)
    assert "encoder.layer.3.crossattention.self.key.weight" in state
    state["embeddings.position_ids"] = torch.arange(12)[None]
    again = bert_from_umt(state, heads=3)
    for model, copy in zip((text, fusion), again, strict=True):
        assert all(torch.equal(value, copy.state_dict()[name]) for name, value in model.state_dict().items())
    assert torch.equal(loss_of(*(model.eval() for model in again)), loss_of(text, fusion))


def without(part: str) -> Callable[[dict[str, Tensor]], dict[str, Tensor]]:
    return lambda state: {name: value for name, value in state.items() if part not in name}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (without("layer.1.output.dense.bias"), "1 missing: encoder.layer.1.output.dense.bias$"),
        (without("layer.1."), r"16 missing: .*encoder.layer.1.attention"),
        (without("layer.3.crossattention."), r"10 missing: .*layer.3.crossattention"),
        (lambda s: {**s, "pooler.dense.bias": torch.zeros(24)}, "1 unknown: pooler.dense.bias$"),
        (lambda s: {**s, "encoder.layer.0.crossattention.self.key.weight": torch.zeros(24, 16)}, "at least one text"),
        (
            lambda s: {**s, "encoder.layer.2.crossattention.self.value.weight": torch.zeros(24, 24)},
            r"1 of other shapes: encoder.layer.2.crossattention.self.value.weight \(24, 24\) instead of \(24, 16\)$",
        ),
        (without("crossattention"), r"got layers \[0, 1, 2, 3\], with cross-attention \[\]"),
        (without("word_embeddings"), r"missing: \['embeddings.word_embeddings.weight'\]"),
        (lambda s: {f"text_encoder.{name}": value for name, value in s.items()}, "first names: .*text_encoder.embed"),
        (lambda _: {}, r"got layers \[\]"),
    ],
)
def test_weights_that_do_not_fit(change: Callable[[dict[str, Tensor]], dict[str, Tensor]], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        bert_from_umt(change(bert_to_umt(*models())), heads=3)


@pytest.mark.parametrize("init_std", [0.02, None])
def test_random_weights_are_as_bert_starts(init_std: float | None) -> None:
    torch.manual_seed(0)
    shape = BertShape.named("tiny", init_std=init_std)
    text, fusion = BertTextEncoder(shape), BertFusion(shape)
    for name, parameter in (*text.named_parameters(), *fusion.named_parameters()):
        if name.endswith("bias"):
            assert not parameter.any(), name
        elif "LayerNorm" in name:
            assert (parameter == 1).all(), name
        elif parameter.numel() > 1000:
            std = init_std or parameter.shape[1] ** -0.5
            assert parameter.std().item() == pytest.approx(std, rel=0.1), name
    assert not text.embeddings.word_embeddings.weight[0].any(), "[PAD]"


def test_named_shapes() -> None:
    base, large = BertShape.named("bert-base"), BertShape.named("bert-large", cross_width=768)
    assert (base.layers, base.fusion_layer, base.width) == (12, 9, 768)
    assert (large.layers, large.fusion_layer, large.width, large.cross_width) == (24, 19, 1024, 768)
    with torch.device("meta"):
        text, fusion = BertTextEncoder(base), BertFusion(base)
    sizes = [sum(math.prod(p.shape) for p in model.parameters()) for model in (text, fusion)]
    block, cross = 7_087_872, 4 * 768 * 769 + 2 * 768
    assert sizes == [(30522 + 512 + 2 + 2) * 768 + 9 * block, 3 * (block + cross)]
    for name in ("bert-base", "bert-large", "tiny"):
        shape = BertShape.named(name)
        assert BertShape(**json.loads(json.dumps(shape.to_dict()))) == shape


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"fusion_layer": 4}, "got fusion_layer 4 of 4 layers"),
        ({"fusion_layer": 0}, "at least one text layer"),
        ({"heads": 5}, "heads that divide the width 24; got 5"),
        ({"heads": 0}, "got 0"),
    ],
)
def test_impossible_shapes(change: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        BertShape(**{**SHAPE.to_dict(), **change})


def test_an_unknown_name() -> None:
    with pytest.raises(ValueError, match=r"expected one of \['bert-base', 'bert-large', 'tiny'\]; got 'bert'"):
        BertShape.named("bert")


def test_inputs_that_do_not_fit() -> None:
    text, fusion = models()
    ids, mask = texts()
    with pytest.raises(ValueError, match=r"L <= 12; got \(1, 13\) and \(1, 13\)"):
        text(torch.ones(1, 13, dtype=torch.int64), torch.ones(1, 13))
    with pytest.raises(ValueError, match=r"got \(4, 9\) and \(4, 8\)"):
        text(ids, mask[:, :8])
    with pytest.raises(ValueError, match=r"expected video tokens \(B, M, 16\); got \(3, 7, 24\)"):
        fusion.keys_values(videos(24))
    states, keys = text(ids, mask), fusion.keys_values(videos())
    with pytest.raises(ValueError, match=r"\(4, 9\) and 3 videos \(VideoKeys.select"):
        fusion(states, mask, keys)
    keys = keys.select(torch.tensor([0, 1, 2, 0]))
    with pytest.raises(ValueError, match=r"got \(4, 9, 24\), \(4, 8\) and 4 videos"):
        fusion(states, mask[:, :8], keys)
    with pytest.raises(ValueError, match=r"expected sizes \(3, 7, 1\); got \(3, 6, 1\)"):
        fusion.keys_values(videos(), torch.ones(3, 6, 1))
