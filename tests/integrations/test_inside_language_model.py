"""Methods between the layers of a language model: equal to a plain loop over its layers, and to the host where nothing
becomes fewer."""

from __future__ import annotations

import copy
import gc
import pickle
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from math import ceil
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from integrations import test_where, tiny, tiny_letters, tiny_post
from integrations.tiny import TOKEN
from torch import Tensor, nn

from tempme_vl import COMPRESSORS
from tempme_vl.compressors import framefusion, holitom_inner
from tempme_vl.compressors.inner import Left, whole
from tempme_vl.integrations import Compressed, compress, load_compressed
from tempme_vl.integrations.costs import decoder_layers, prefill_gflops
from tempme_vl.integrations.layer_cache import LayerCache

LAYERS = 5
NAMES = [
    *("VideoLlava", "LlavaOnevision"),
    *(name for name in ("Qwen2.5-VL", "Qwen3-VL") if tiny_post.NEEDS[name]),
]
METHODS: dict[str, dict[str, Any]] = {
    "framefusion": {"cost": 0.6, "similarity": 0.95, "ratio": 0.6},  # merges, then drops
    "holitom": {"retention": 0.6, "inner_layer": 2},
    "flashvid": {"retention": 0.6, "inner_layer": 3},
    "dycoke": {"inner_layer": 2, "similarity": 0.9},  # some words read what the one before did
}
MERGING = {"LlavaOnevision": 0.7, "Qwen3-VL": 0.94}  # costs with which tokens merge in more than one layer
NOTHING: dict[str, dict[str, Any]] = {
    "framefusion": {"cost": 1.0},
    "holitom": {"inner_layer": 2, "inner_ratio": 0.0},
    "flashvid": {"inner_layer": 2, "inner_retention": 1.0},
    "dycoke": {"inner_layer": 2, "inner_ratio": 0.0},
}
WORDS = {"max_new_tokens": 5, "do_sample": False}


@cache
def host(name: str, attention: str = "sdpa") -> tuple[Any, Any]:
    """A tiny host with a language model of some layers."""
    with pytest.MonkeyPatch.context() as patch:
        for text in (tiny._TEXT, tiny_letters.TEXT):
            patch.setitem(text, "num_hidden_layers", LAYERS)
        model, processor = (tiny if name in tiny.MODELS else tiny_post).build(name)
    model.set_attn_implementation(attention)
    return model, processor


def made(name: str, method: str, attention: str = "sdpa", **options: Any) -> Compressed:
    return compress(*host(name, attention), method, test_where.FRAMES, "behind", **options)


def prepared(compressed: Compressed, name: str, labels: bool = False) -> Any:
    return compressed.prepare(test_where.prompt(name), [test_where.video()], labels, fps=2.0)


def both(name: str) -> tuple[list[str], list[Any]]:
    """Prompts of different lengths, and their videos."""
    text = test_where.prompt(name)
    return [text, f"why {text}"], [[test_where.video()], [test_where.video(1)]]


# ---- the plain loop


@dataclass
class Told:
    """What a language model is told of a prompt: states (1, L, D), positions (., 1, L), features for deeper layers."""

    states: Tensor
    positions: Tensor
    deeper: list[Tensor]


class _Stop(Exception):
    pass


def told(compressed: Compressed, inputs: Any) -> Told:
    """Caught in front of the language model."""
    seen: dict[str, Any] = {}

    def catch(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        seen.update(kwargs)
        raise _Stop

    hook = compressed.host.language_model.register_forward_pre_hook(catch, with_kwargs=True)
    with pytest.raises(_Stop):
        compressed(**inputs)
    hook.remove()
    states, positions = seen["inputs_embeds"], seen.get("position_ids")
    if positions is None:
        positions = torch.arange(states.shape[1]).unsqueeze(0)
    positions = positions[-3:] if positions.ndim == 3 else positions
    deeper = []
    for level in seen.get("deepstack_visual_embeds") or []:
        added = torch.zeros_like(states)
        added[seen["visual_pos_masks"]] = level
        deeper.append(added)
    return Told(states, positions, deeper)


def with_words(compressed: Compressed, given: Told, ids: Tensor) -> Told:
    """The prompt with words behind it."""
    embedded = compressed.host.target.get_input_embeddings()(ids.unsqueeze(0))
    further = given.positions.max() + 1 + torch.arange(len(ids))
    further = further.expand(*given.positions.shape[:-1], -1)
    nothing = torch.zeros_like(embedded)
    return Told(
        torch.cat([given.states, embedded], 1),
        torch.cat([given.positions, further], -1),
        [torch.cat([level, nothing], 1) for level in given.deeper],
    )


Step = Callable[[int, bool, Any, Tensor, Tensor | None], tuple[Any, Tensor]]


def plain(compressed: Compressed, given: Told, left: Any, step: Step, hides: Any = None) -> tuple[Tensor, list[int]]:
    """Last states, and the tokens of the prompt in each layer.

    Args:
        left: of the prompt, behind which words may stand.
        step: (layer, behind its attention, left, states of what is left of the prompt, attention there) -> the same.
        hides: (layer, attention of it) -> (N, N) bool, what each token does not read in the next ones.
    """
    model = compressed.host.language_model
    layers: Any = decoder_layers(compressed.host)
    states, positions, deeper = given.states[0], given.positions, [level[0] for level in given.deeper]
    counts, attention, hidden = [], None, None

    def fewer(layer: int, behind: bool) -> None:
        nonlocal left, states, positions, deeper
        size = len(left.position)
        seen = None if attention is None else attention[:, :size, :size]
        now, first = step(layer, behind, left, states[:size], seen)
        stays = torch.isin(left.position, now.position)
        stays = torch.cat([stays, torch.ones(len(states) - size).bool()])
        left, states = now, torch.cat([first, states[size:]])
        positions, deeper = positions[..., stays], [level[stays] for level in deeper]

    for number, layer in enumerate(layers):
        fewer(number, False)
        counts.append(len(left.position))
        later = torch.ones(len(states), len(states)).triu(1).bool()
        if hidden is not None:
            later = later | hidden
        mask = torch.zeros(later.shape).masked_fill(later, torch.finfo(torch.float32).min)[None, None]
        angles = model.rotary_emb(states.unsqueeze(0), position_ids=positions)
        normed = layer.input_layernorm(states.unsqueeze(0))
        added, weights = layer.self_attn(hidden_states=normed, position_embeddings=angles, attention_mask=mask)
        states, attention = states + added[0], weights[0]
        fewer(number, True)
        states = states + layer.mlp(layer.post_attention_layernorm(states.unsqueeze(0)))[0]
        if number < len(deeper):
            states = states + deeper[number]
        if hides is not None and (found := hides(number, attention)) is not None:
            hidden = found
    return model.norm(states), counts


def rule(method: str, options: dict[str, Any], place: Tensor) -> tuple[Any, Step]:
    """A method's step in the loop."""
    if method == "framefusion":
        how = framefusion.Options(**options, layers=LAYERS)

        def fuse(layer: int, behind: bool, left: Any, states: Tensor, attention: Tensor | None) -> tuple[Any, Tensor]:
            if layer and not behind:
                return left, states
            return framefusion.step(left, states, attention, how)

        return framefusion.State(torch.arange(len(place)), place), fuse

    def once(layer: int, behind: bool, left: Left, states: Tensor, attention: Tensor | None) -> tuple[Left, Tensor]:
        if behind or method == "dycoke" or layer != options["inner_layer"]:
            return left, states
        assert attention is not None
        if method == "holitom":
            return holitom_inner.step(left, states, attention, holitom_inner.Options(layer))
        received = attention[:, -1].mean(0).masked_fill(left.place < 0, torch.inf)
        words = int((left.place < 0).sum())
        stays = received.argsort(descending=True)[: words + ceil(0.3 * (len(place) - words))].sort().values
        return Left(left.position[stays], left.place[stays]), states[stays]

    return whole(place), once


def unread(place: Tensor, words: int, layer: int, attention: Tensor) -> Tensor | None:
    """DyCoke by hand: from layer 2 on each of the words behind a prompt reads the fifth of the video that it attends to
    most in layer 1."""
    if layer != METHODS["dycoke"]["inner_layer"] - 1:
        return None
    video = (place >= 0).nonzero()[:, 0]
    hidden = torch.zeros(attention.shape[1:]).bool()
    before, chosen = None, None
    for word in range(len(place), len(place) + words):
        received = attention[:, word, video].mean(0)
        if before is None or torch.cosine_similarity(received, before, dim=0) < METHODS["dycoke"]["similarity"]:
            chosen = video[received.argsort(descending=True)[: int(len(video) * 0.2)]]
        hidden[word, video], before = True, received
        hidden[word, chosen] = False
    return hidden


PAIRS = list(zip(NAMES, ("framefusion", "holitom", "dycoke", "flashvid"), strict=False))
PAIRS += [(NAMES[-1], "framefusion")]
CASES = [(name, method, options) for name in NAMES for method, options in METHODS.items()]
CASES += [
    (name, "framefusion", {"cost": cost, "similarity": 0.95, "ratio": 0.0})
    for name, cost in MERGING.items()
    if name in NAMES
]


@torch.no_grad()
@pytest.mark.parametrize(("name", "method", "options"), CASES)
def test_prompt_and_words_are_those_of_a_plain_loop(name: str, method: str, options: dict[str, Any]) -> None:
    """The words by the cache are those without one, through the same fewer states."""
    compressed, slow = made(name, method, **options), made(name, method, "eager", **options)
    place = prepared(compressed, name)["visual_places"][0]
    more = {**WORDS, "output_logits": True, "return_dict_in_generate": True}
    written = compressed.generate(**prepared(compressed, name), **more)
    logits = torch.cat(written.logits)
    left, step = rule(method, options, place)
    hides = None if method != "dycoke" else partial(unread, place, len(logits))
    given = with_words(slow, told(slow, prepared(slow, name)), written.sequences[0])
    states, counts = plain(slow, given, left, step, hides)
    expected = slow.host.target.get_output_embeddings()(states[-len(logits) - 1 : -1])
    torch.testing.assert_close(logits, expected, rtol=0, atol=2e-5)
    assert list(compressed.layer_tokens[0]) == counts
    assert (counts[-1] < len(place)) == (method != "dycoke")
    if (name, method) in PAIRS:
        slow_words = slow.generate(**prepared(slow, name), **more)
        torch.testing.assert_close(torch.cat(slow_words.logits), logits, rtol=0, atol=2e-5)


@torch.no_grad()
@pytest.mark.parametrize("name", NAMES)
def test_where_nothing_goes_it_is_the_host_itself(name: str) -> None:
    for method, options in NOTHING.items():
        compressed, outside = made(name, method, **options), made(name, "none" if method == "framefusion" else method)
        assert compressed.inside is not None and outside.inside is None
        ours = compressed(**prepared(compressed, name, labels=True))
        whole = outside(**prepared(outside, name, labels=True))
        assert torch.equal(ours.logits, whole.logits) and torch.equal(ours.loss, whole.loss), method
        if (name, method) in PAIRS:
            words = [each.generate(**prepared(each, name), **WORDS) for each in (compressed, outside)]
            assert torch.equal(*words), method


@torch.no_grad()
@pytest.mark.parametrize(("name", "method"), PAIRS)
def test_batches_beams_and_samples_are_as_single_prompts(name: str, method: str) -> None:
    compressed = made(name, method, **METHODS[method])
    text, videos = both(name)
    ways: list[dict[str, Any]] = [{}, {"num_beams": 3, "num_return_sequences": 2}]
    for way in ways:
        batch = compressed.generate(**compressed.prepare(text, videos, fps=2.0), **{**WORDS, **way})
        counts, read = compressed.layer_tokens, compressed.read
        for row in range(2):
            single = compressed.generate(**compressed.prepare(text[row], videos[row], fps=2.0), **{**WORDS, **way})
            size = way.get("num_return_sequences", 1)
            assert torch.equal(batch[row * size : (row + 1) * size], single)
            assert compressed.layer_tokens == counts[row : row + 1] and compressed.read == read[row : row + 1]
    words = [
        compressed.generate(**compressed.prepare(text, videos, fps=2.0), **{**WORDS, **way})
        for way in ({}, {"do_sample": True, "top_k": 1, "num_return_sequences": 2})
    ]
    assert torch.equal(words[1], words[0].repeat_interleave(2, 0))


@torch.no_grad()
@pytest.mark.parametrize(("name", "method"), PAIRS)
def test_a_second_turn_goes_on_from_the_cache(name: str, method: str) -> None:
    """Words that come in together read all that is there."""
    compressed, slow = made(name, method, **METHODS[method]), made(name, method, "eager", **METHODS[method])
    inputs = prepared(compressed, name)
    place = inputs["visual_places"][0]
    first = compressed.generate(**inputs, **WORDS, return_dict_in_generate=True)
    assert isinstance(first.past_key_values, LayerCache)
    if "input_ids" not in inputs:  # a cache goes on by ids
        return
    more = first.sequences[:, [2, 0, 1]]
    ids = torch.cat([inputs["input_ids"], first.sequences, more], dim=1)
    again = compressed.generate(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        past_key_values=first.past_key_values,
        **{**WORDS, "max_new_tokens": 1, "output_logits": True, "return_dict_in_generate": True},
    )
    left, step = rule(method, METHODS[method], place)
    hides = None if method != "dycoke" else partial(unread, place, first.sequences.shape[1] - 1)
    given = with_words(slow, told(slow, prepared(slow, name)), ids[0, len(place) :])
    states, _ = plain(slow, given, left, step, hides)
    expected = slow.host.target.get_output_embeddings()(states[-1:])
    torch.testing.assert_close(again.logits[0], expected, rtol=0, atol=2e-5)


@pytest.mark.parametrize(("name", "method"), PAIRS)
def test_an_answer_learns_the_same_in_a_batch(name: str, method: str) -> None:
    """Losses of answers, padded on the right, reach the weights in front of what became fewer."""
    compressed = made(name, method, **METHODS[method])
    text, videos = both(name)
    answers = [" is".join(" why" for _ in range(number + 1)) for number in range(2)]
    weight = next(compressed.host.tower.parameters())
    losses = []
    for row in range(2):
        inputs = compressed.prepare(text[row], videos[row], labels=answers[row : row + 1], fps=2.0)
        losses.append(float(compressed(**inputs).loss) * int((inputs["labels"][:, 1:] != -100).sum()))
    inputs = compressed.prepare(text, videos, labels=answers, fps=2.0)
    loss = compressed(**inputs, use_cache=False).loss
    assert float(loss) * int((inputs["labels"][:, 1:] != -100).sum()) == pytest.approx(sum(losses), rel=1e-5)
    (gradient,) = torch.autograd.grad(loss, weight, allow_unused=True)
    assert gradient is not None and gradient.abs().max() > 0 and torch.isfinite(gradient).all()


@torch.no_grad()
@pytest.mark.parametrize("method", METHODS)
def test_half_precision(method: str) -> None:
    for name in NAMES[1::2]:
        model, processor = host(name)
        half = copy.deepcopy(model).to(torch.bfloat16)
        compressed = compress(half, processor, method, test_where.FRAMES, "behind", **METHODS[method])
        for implementation in ("sdpa", "eager"):
            half.set_attn_implementation(implementation)
            logits = compressed(**prepared(compressed, name)).logits
            assert torch.isfinite(logits).all() and len(set(compressed.layer_tokens[0])) > (method != "dycoke")


@torch.no_grad()
@pytest.mark.parametrize("method", METHODS)
def test_pickle(method: str) -> None:
    compressed = made("VideoLlava", method, **METHODS[method])
    inputs = prepared(compressed, "VideoLlava")
    again = pickle.loads(pickle.dumps(compressed))
    assert torch.equal(again(**inputs).logits, compressed(**inputs).logits)
    assert again.layer_tokens == compressed.layer_tokens


@torch.no_grad()
@pytest.mark.parametrize("method", ["framefusion", "dycoke"])
def test_a_cache_in_another_order(method: str) -> None:
    """What each of two prompts holds goes with it."""
    once = {"similarity": -1.0} if method == "dycoke" else {}  # what a word reads is chosen for the first alone
    compressed = made("LlavaOnevision", method, **{**METHODS[method], **once})
    text, videos = both("LlavaOnevision")
    found = []
    for order in ([0, 1], [1, 0]):
        inputs = compressed.prepare(text, videos, fps=2.0)
        cache = compressed(**inputs).past_key_values
        mask, word = inputs["attention_mask"], torch.tensor([[TOKEN["dog"]], [TOKEN["red"]]])
        for again in range(3):
            mask = torch.cat([mask, torch.ones_like(mask[:, :1])], 1)
            if again == 2:
                cache.reorder_cache(torch.tensor(order))
                word, mask = word[order], mask[order]
            logits = compressed(input_ids=word, attention_mask=mask, past_key_values=cache).logits
        found.append(logits[order])
    torch.testing.assert_close(*found, rtol=0, atol=1e-5)
    assert not torch.allclose(found[0][0], found[0][1], atol=0.1)


@torch.no_grad()
def test_what_has_gone_tells_what_is_left_in_front_of_it() -> None:
    """So that labels behind a video count the same whichever of its tokens are left."""
    compressed = made("VideoLlava", "flashvid", **METHODS["flashvid"])
    output = compressed(**prepared(compressed, "VideoLlava", labels=True))
    left = output.past_key_values.windows[LAYERS - 1].index[0]
    gone = [place for place in range(output.logits.shape[1]) if place not in left]
    assert gone and all(torch.equal(output.logits[0, place], output.logits[0, place - 1]) for place in gone)
    assert torch.isfinite(output.loss)


@torch.no_grad()
def test_places_are_the_same_in_all_frames_and_each_videos_own() -> None:
    """Of 8 frames of 4 tokens: what a host puts behind a video has none, nor have words, and CLS tokens."""
    compressed = made("LlavaOnevision", "framefusion", budget=0.9)
    text = ["what <video> and <video> ?", "why <video>"]
    videos = [[test_where.video(), test_where.video(1)], [test_where.video(2)]]
    inputs = compressed.prepare(text, videos, fps=2.0)
    first, second = (row[row >= 0].tolist() for row in inputs["visual_places"])
    assert first == [0, 1, 2, 3] * 8 + [4, 5, 6, 7] * 8 and second == [0, 1, 2, 3] * 8
    assert not (inputs["visual_places"] >= 0)[inputs["attention_mask"] == 0].any()
    words = compressed.generate(**inputs, **WORDS)
    for row in range(2):
        assert torch.equal(
            compressed.generate(**compressed.prepare(text[row], [videos[row]], fps=2.0), **WORDS)[0], words[row]
        )
    with_cls = prepared(made("VideoLlava", "framefusion", budget=0.9), "VideoLlava")["visual_places"]
    assert with_cls[with_cls >= 0].tolist() == list(range(16)) * 8


@torch.no_grad()
@pytest.mark.parametrize("name", NAMES[:2])
def test_both_ways_into_the_model(name: str) -> None:
    words = []
    for feed in tiny.feeds(name):
        compressed = compress(
            *host(name), "framefusion", test_where.FRAMES, "behind", feed=feed, **METHODS["framefusion"]
        )
        words.append(compressed.generate(**prepared(compressed, name), **WORDS))
        assert len(set(compressed.layer_tokens[0])) > 1
    assert all(torch.equal(each, words[0]) for each in words)


def as_flash(module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Any, **given: Any) -> tuple[Tensor, None]:
    """What flash attention computes of what it is given: queries are the last of the keys, a mask is of keys."""
    groups, sees = query.shape[1] // key.shape[1], torch.ones(query.shape[2], key.shape[2]).bool()
    sees = sees.tril(key.shape[2] - query.shape[2])[None, None]
    if mask is not None:
        assert mask.shape == (len(query), key.shape[2])
        sees = sees & (mask[:, None, None].bool() | torch.eye(key.shape[2]).bool()[-query.shape[2] :])
    key, value = (each.repeat_interleave(groups, 1) for each in (key, value))
    mixed = torch.nn.functional.scaled_dot_product_attention(query, key, value, sees, scale=given["scaling"])
    return mixed.transpose(1, 2), None


@torch.no_grad()
@pytest.mark.parametrize(("name", "method"), PAIRS)
def test_attention_with_masks_of_keys(name: str, method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    transformers.AttentionInterface.register("as_flash", as_flash)
    masks = transformers.AttentionMaskInterface
    masks.register("as_flash", masks()["flash_attention_2"])
    usual, flash = made(name, method, **METHODS[method]), made(name, method, "eager", **METHODS[method])
    monkeypatch.setattr(flash.host.model.config.get_text_config(), "_attn_implementation", "as_flash")
    text, videos = both(name)
    more = {**WORDS, "output_logits": True, "return_dict_in_generate": True}
    for prompts, shown in ((text, videos), (text[:1], videos[:1])):
        made_by = [each.generate(**each.prepare(prompts, shown, fps=2.0), **more) for each in (usual, flash)]
        ours, theirs = (torch.stack(each.logits) for each in made_by)
        torch.testing.assert_close(ours, theirs, rtol=0, atol=2e-5)


@torch.no_grad()
@pytest.mark.parametrize("budget", [0.5, 0.9])
@pytest.mark.parametrize("name", NAMES)
def test_framefusion_meets_its_budget(name: str, budget: float) -> None:
    """Of the mean over the layers; where it drops, up to what rounding leaves."""
    compressed = made(name, "framefusion", budget=budget)
    compressed(**prepared(compressed, name))
    native, ours = compressed.counts((32, 32))
    assert ours is None and compressed._whole[0].visual == native
    fixed = native - int((prepared(compressed, name)["visual_places"] >= 0).sum())  # CLS and newline tokens
    compressed(**prepared(compressed, name))
    read = sum(compressed.layer_tokens[0]) / LAYERS - compressed._whole[0].prompt + native - fixed
    assert budget * (native - fixed) == pytest.approx(read, abs=1)
    assert compressed.read[0].visual == round(read + fixed)


@torch.no_grad()
def test_costs_are_of_the_tokens_that_layers_read() -> None:
    compressed = made("LlavaOnevision", "framefusion", budget=0.5)
    compressed(**prepared(compressed, "LlavaOnevision"))
    whole = compressed._whole[0].prompt
    most = prefill_gflops(compressed.host, whole)
    ours = prefill_gflops(compressed.host, compressed.layer_tokens[0])
    assert prefill_gflops(compressed.host, [whole] * LAYERS) == pytest.approx(most)
    linear = (sum(compressed.layer_tokens[0]) / LAYERS) / whole
    assert linear**2 * most < ours < linear * most
    assert "nothing is known ahead" in compressed.describe()


@torch.no_grad()
@pytest.mark.parametrize("method", METHODS)
def test_folders_come_back(method: str, tmp_path: Path) -> None:
    options = {"budget": 0.6} if method == "framefusion" else METHODS[method]
    compressed = made("LlavaOnevision", method, **options)
    compressed.save_pretrained(tmp_path)
    again = load_compressed(tmp_path)
    assert again.host.config() == compressed.host.config() and again.counts() == compressed.counts()
    words = [each.generate(**prepared(each, "LlavaOnevision"), **WORDS) for each in (compressed, again)]
    assert torch.equal(*words) and again.layer_tokens == compressed.layer_tokens


@torch.no_grad()
def test_nothing_stays_in_the_model() -> None:
    model, _ = host("LlavaOnevision")

    def hooks() -> int:
        return sum(len(part._forward_hooks) + len(part._forward_pre_hooks) for part in model.modules())

    before, usual = hooks(), model.config.get_text_config()._attn_implementation
    expected = made("LlavaOnevision", "none")
    whole = expected.generate(**prepared(expected, "LlavaOnevision"), **WORDS)
    compressed = made("LlavaOnevision", "framefusion", **METHODS["framefusion"])
    compressed(**prepared(compressed, "LlavaOnevision"))
    assert hooks() == before
    with pytest.raises(ValueError, match="expected a cost of at least"):
        short = made("LlavaOnevision", "framefusion", cost=0.1, ratio=0.9, similarity=1.0)
        short(**prepared(short, "LlavaOnevision"))
    assert hooks() == before and model.config.get_text_config()._attn_implementation == usual
    assert torch.equal(expected.generate(**prepared(expected, "LlavaOnevision"), **WORDS), whole)
    seen = weakref.ref(compressed)
    del compressed
    gc.collect()
    assert seen() is None


@torch.no_grad()
def test_what_does_not_fit_is_refused() -> None:
    name = "LlavaOnevision"
    compressed = made(name, "framefusion", budget=0.6)
    inputs = prepared(compressed, name)
    with pytest.raises(ValueError, match=r"expected 'visual_places' among the inputs, as `prepare` gives it"):
        compressed(**{key: value for key, value in inputs.items() if key != "visual_places"})
    with pytest.raises(
        ValueError, match="expected the cache of an answer of this compressed model, or none; got a Dyn"
    ):
        compressed(**inputs, past_key_values=transformers.DynamicCache())
    with pytest.raises(ValueError, match="without a cache it would for each new word: expected use_cache=True"):
        compressed.generate(**inputs, **WORDS, use_cache=False)
    if tiny_post.NEW:  # an older transformers cannot prefill embeddings in chunks by itself
        with pytest.raises(ValueError, match="no prefill in chunks"):
            compressed.generate(**prepared(compressed, name), **WORDS, prefill_chunk_size=7)
    with pytest.raises(ValueError, match="visual_places"):  # transformers' own
        compressed.model.generate(**prepared(compressed, name), **WORDS)
    with pytest.raises(ValueError, match="where embeddings do not reach: serve the model whole"):
        compressed.prompt_embeds(test_where.prompt(name), [test_where.video()])
    with pytest.raises(
        ValueError, match=r"expected a budget, the share of the visual tokens that the layers .* tokens=9"
    ):
        made(name, "framefusion", tokens=9)
    with pytest.MonkeyPatch.context() as patch, pytest.raises(ValueError, match="does not say where a video's tokens"):
        patch.setattr(compressed.host, "encode", lambda *given: made(name, "none").host.encode(*given))
        prepared(compressed, name)
    with pytest.raises(ValueError, match="those of LlavaOnevisionForConditionalGeneration are 5: expected 19 or more"):
        made(name, "holitom", inner_layer=18)
    with pytest.raises(ValueError, match="inner_layer"):
        made(name, "flashvid", inner_layer=0)
    with pytest.raises(ValueError, match="negative number of at most 0 written tokens to remove"):
        compressed(**prepared(compressed, name)).past_key_values.crop(-1)


REFUSED = {"Qwen3.5": "linear_attention", "Gemma 4, small": "sliding_attention", "Gemma 4, large": "sliding_attention"}


@tiny.hosts([name for name in REFUSED if name in tiny_post.MODELS and tiny_post.NEEDS[name]])
def test_layers_that_cannot_be_given_fewer_tokens_are_named(name: str) -> None:
    with pytest.raises(
        ValueError, match=rf"works between the layers .* are of .*{REFUSED[name]}: expected all of full"
    ):
        compress(*tiny_post.build(name), "framefusion", tiny_post.FRAMES)


def test_only_some_compressors_go_inside() -> None:
    assert {name for name in COMPRESSORS if COMPRESSORS[name].inner is not None} == set(METHODS)
    for name in METHODS:
        usual = made("LlavaOnevision", name)
        assert (usual.inside is not None) == (name == "framefusion")  # the others when they are asked to
