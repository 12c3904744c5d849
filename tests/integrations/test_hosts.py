"""What must hold for every host whose tower merges inside: the host itself without merging, and all uses with it."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from accelerate import cpu_offload
from integrations import tiny
from peft import LoraConfig, get_peft_model
from torch import Tensor

from tempme_vl.integrations import Compressed, compress, load_compressed
from tempme_vl.integrations.videos import sample

HOSTS = list(tiny.MODELS)
OFTEN = [(name, method) for name in HOSTS for method in ("tempme", "tome")]
FEEDS = [(name, feed) for name in HOSTS for feed in tiny.feeds(name)]
# a way in knows no method, and what is fed is the same by each
TOME = [pytest.param(name, "tome", feed, marks=pytest.mark.slow) for name, feed in dict(FEEDS).items()]
FED = [(name, "tempme", feed) for name, feed in FEEDS] + TOME
SHORT, LONG = "why <video>", "what is the red dog doing in this <video> and how many"

shared = cache(tiny.build)


def compressed_by(name: str, method: str, feed: Any = None) -> Compressed:
    """A compressed model; it shares its weights with the others of the same name, so tests leave them alone."""
    torch.manual_seed(1)
    model, processor = shared(name)
    layers = 4 if name in ("LlavaOnevision", "InstructBlipVideo", "PerceptionLM") else 3
    return compress(
        model,
        processor,
        method,
        tiny.FRAMES,
        clip_position_std=0.1 if method == "tempme" else 0.0,
        feed=feed,
        **tiny.schedule(method, layers),
    )


@torch.no_grad()
def last_logits(compressed: Compressed, text: Any, videos: Any) -> Tensor:
    return compressed(**compressed.prepare(text, videos)).logits[:, -1]


@pytest.mark.parametrize(("name", "feed"), FEEDS)
def test_without_merging_it_is_the_host_itself(
    name: str, feed: Any, record_property: Callable[[str, object], None]
) -> None:
    model, processor = shared(name)
    compressed = compressed_by(name, "none", feed)
    text, videos = [tiny.ASK, "why " + tiny.ASK[5:]], [tiny.video(0), tiny.video(1)]
    native = tiny.native_inputs(processor, text, videos)
    with torch.no_grad():
        expected, ours = model(**native).logits, compressed(**compressed.prepare(text, videos)).logits
        torch.testing.assert_close(ours, expected, rtol=0, atol=1e-5)
        assert expected.std() > 0.5 and (expected[0] - expected[1]).abs().max() > 0.1
    for options in ({}, {"num_beams": 3}):
        written = tiny.native_words(compressed.host, native, record_property, **options)
        assert torch.equal(tiny.new_tokens(compressed, text, videos, **options), written)


@torch.no_grad()
def unpooled(name: str, model: Any, pixels: Tensor) -> Tensor:
    """What the host's modules make of (F, 3, H, W) without any pooling on the grid: (M, D_llm)."""
    if name == "PerceptionLM":
        projector = model.model.multi_modal_projector
        patches = model.model.vision_tower(pixels).last_hidden_state[:, 1:]
        return projector.linear_2(projector.gelu(projector.linear_1(patches))).flatten(0, 1)
    tower = model.model.video_tower if name == "VideoLlava" else model.model.vision_tower
    states = tower(pixels, output_hidden_states=True).hidden_states
    state = {"VideoLlava": states[-2], "LlavaNextVideo": states[-2][:, 1:], "LlavaOnevision": states[-1]}[name]
    features = model.model.multi_modal_projector(state).flatten(0, 1)
    return torch.cat([features, model.model.image_newline[None]]) if name == "LlavaOnevision" else features


@pytest.mark.parametrize("name", [name for name in HOSTS if name != "InstructBlipVideo"])
def test_behind_merged_tokens_comes_the_projector_alone(name: str) -> None:
    model, processor = shared(name)
    # passes for merging and merges nothing
    idle = {"r": 0, "merge_layers": (1,), "merge_frames": (1,), "cross_percent": 0, "intra_percent": 0}
    compressed = compress(model, processor, "tempme", tiny.FRAMES, **idle)
    (tokens,) = compressed.host.encode([sample(tiny.video(0), tiny.FRAMES)], ["<video>"])
    pixels = processor.video_processor(videos=[tiny.video(0)], return_tensors="pt")["pixel_values_videos"][0]
    torch.testing.assert_close(tokens.features.detach(), unpooled(name, model, pixels), rtol=0, atol=1e-5)
    assert len(tokens.features) == compressed.host.costs().tokens


@pytest.mark.parametrize(("name", "method", "feed"), FED)
def test_a_padded_batch_equals_single_calls(name: str, method: str, feed: Any) -> None:
    compressed = compressed_by(name, method, feed)
    text, videos = [SHORT, LONG], [[tiny.video(0)], [tiny.video(1)]]
    batch = last_logits(compressed, text, videos)
    for row in range(2):
        single = last_logits(compressed, text[row], videos[row])
        torch.testing.assert_close(batch[row], single[0], rtol=0, atol=1e-4)
    other = last_logits(compressed, text[0], [tiny.video(7)])
    assert (other[0] - batch[0]).abs().max() > 1e-3  # the video matters
    for options in ({}, {"num_beams": 3}):
        together = tiny.new_tokens(compressed, text, videos, **options)
        apart = [tiny.new_tokens(compressed, t, v, **options) for t, v in zip(text, videos, strict=True)]
        assert torch.equal(together, torch.cat(apart))


@pytest.mark.parametrize(("name", "method"), OFTEN)
def test_counts_are_the_predicted_ones(name: str, method: str) -> None:
    compressed = compressed_by(name, method)
    costs, shown = compressed.host.costs(), compressed.describe()
    ids = compressed.host.input_ids(SHORT, compressed.host.encode([sample(tiny.video(0), tiny.FRAMES)], [SHORT]))
    assert ids.count(tiny.TOKEN["<video>"]) == costs.tokens
    native = tiny.native_inputs(shared(name)[1], [SHORT], [tiny.video(0)])["input_ids"]
    assert (native == tiny.TOKEN["<video>"]).sum() == costs.native_tokens
    assert f"{costs.native_tokens}" in shown and f"{costs.tokens}" in shown
    assert ("Beware" in shown) == (costs.tokens > costs.native_tokens)
    assert costs.tower < costs.native_tower
    if method == "tempme":
        assert costs.tokens < costs.native_tokens


@pytest.mark.parametrize(("name", "feed"), FEEDS)
def test_prompts_with_several_videos_and_with_none(name: str, feed: Any) -> None:
    compressed = compressed_by(name, "tempme", feed)
    text = ["what <video> and <video> why", "what is this", LONG]
    videos: list[list[np.ndarray]] = [[tiny.video(0), tiny.video(1)], [], [tiny.video(2)]]
    batch = last_logits(compressed, text, videos)
    for row in range(3):
        single = last_logits(compressed, text[row], [videos[row]])
        torch.testing.assert_close(batch[row], single[0], rtol=0, atol=1e-4)
    swapped = last_logits(compressed, text[0], [tiny.video(1), tiny.video(0)])
    assert (swapped[0] - batch[0]).abs().max() > 1e-3
    words = tiny.new_tokens(compressed, text[1], [])  # no video at all
    assert torch.equal(words, tiny.new_tokens(compressed, text, videos)[1:2])
    first = tiny.new_tokens(compressed, text[0], videos[0])
    three = tiny.new_tokens(compressed, text[0], videos[0], do_sample=True, top_k=1, num_return_sequences=3)
    assert torch.equal(three, first.expand(3, -1))  # each draws the likeliest word
    if tiny.mixes_up(compressed.prepare(text, videos, fps=1.0)):
        with pytest.raises(ValueError, match=r"mixes up the visual tokens .*num_beams=2"):
            tiny.new_tokens(compressed, text, videos, num_beams=2)
        return
    beams = tiny.new_tokens(compressed, text, videos, num_beams=2)
    apart = [tiny.new_tokens(compressed, t, [v], num_beams=2) for t, v in zip(text, videos, strict=True)]
    assert torch.equal(beams, torch.cat(apart))


@pytest.mark.parametrize("name", HOSTS)
def test_feeds_give_the_same_or_are_refused(name: str, record_property: Callable[[str, object], None]) -> None:
    one, other = compressed_by(name, "tempme"), compressed_by(name, "tempme", "embeddings")
    several = ["what <video> and <video> why"], [[tiny.video(0), tiny.video(1)]]
    assert torch.equal(*(tiny.new_tokens(way, *several, num_beams=3) for way in (one, other)))
    assert one.feed == tiny.feeds(name)[0]
    if one.feed == other.feed:
        record_property("note", tiny.ONE_WAY["embeddings"])
        with pytest.raises(ValueError, match="takes video features by"):
            compressed_by(name, "tempme", "encoder_outputs")
        return
    other.merging.load_state_dict(one.merging.state_dict())
    text, videos = [SHORT, LONG], [tiny.video(0), tiny.video(1)]
    torch.testing.assert_close(last_logits(one, text, videos), last_logits(other, text, videos), rtol=0, atol=1e-6)
    for options in ({}, {"num_beams": 3, "num_return_sequences": 2}):
        written = tiny.new_tokens(one, text, videos, **options)
        assert torch.equal(written, tiny.new_tokens(other, text, videos, **options))


@pytest.mark.parametrize(("name", "feed"), FEEDS)
def test_gradients_reach_the_tower_and_the_clip_positions(name: str, feed: Any) -> None:
    compressed = compressed_by(name, "tempme", feed)
    inputs = compressed.prepare([SHORT, LONG], [tiny.video(0), tiny.video(1)], labels=["two dog runs", "red"])
    loss = compressed(**inputs).loss
    loss.backward()
    first = next(p for key, p in compressed.host.tower.named_parameters() if "layers.0." in key or "blocks.0." in key)
    assert torch.isfinite(loss) and first.grad is not None and first.grad.abs().max() > 0
    assert len(compressed.merging) == 2
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in compressed.merging.parameters())
    compressed.model.zero_grad()


@pytest.mark.parametrize("name", HOSTS)
def test_the_model_beside_it_stays_what_it_was(name: str) -> None:
    model, processor = tiny.build(name)
    native = tiny.native_inputs(processor, [tiny.ASK], [tiny.video(0)])
    with torch.no_grad():
        before = model(**native).logits
        state = {key: value.clone() for key, value in model.state_dict().items()}
        modules = {key: (type(m), m.forward.__func__, id(m)) for key, m in model.named_modules()}
        compressed = compress(model, processor, "tome", tiny.FRAMES, r=3)
        compressed.answer([SHORT, LONG], [tiny.video(0), tiny.video(1)], max_new_tokens=2, num_beams=2)
        assert torch.equal(model(**native).logits, before)
    assert {key: (type(m), m.forward.__func__, id(m)) for key, m in model.named_modules()} == modules
    assert model.state_dict().keys() == state.keys()
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    assert processor.tokenizer.padding_side == "right"


@pytest.mark.parametrize("name", HOSTS)
def test_a_tower_that_peft_trains_as_a_copy_is_the_one_that_runs(name: str) -> None:
    """`modules_to_save`, before and after compressing."""
    model, processor = tiny.build(name)
    options = {"clip_position_std": 0.1, **tiny.schedule("tempme", 3)}
    before = compress(model, processor, num_frames=tiny.FRAMES, **options)
    before.host.set_grad_checkpointing(True)
    text, videos = [SHORT, LONG], [tiny.video(0), tiny.video(1)]
    expected = last_logits(before, text, videos)
    tower = "vision_model" if name == "InstructBlipVideo" else "video_tower" if name == "VideoLlava" else "vision_tower"
    lora = LoraConfig(r=2, target_modules=r".*language_model.*(q_proj|v_proj)", modules_to_save=[tower])
    wrapped = get_peft_model(model, lora)
    after = compress(wrapped, processor, num_frames=tiny.FRAMES, **options)
    after.merging.load_state_dict(before.merging.state_dict())
    positions = list(before.merging.parameters())
    copies = {key: p for key, p in wrapped.named_parameters() if "modules_to_save" in key and p.requires_grad}
    for compressed in (before, after):
        torch.testing.assert_close(last_logits(compressed, text, videos), expected, rtol=0, atol=1e-5)
        compressed(**compressed.prepare(text, videos, labels=["two dog runs", "red"])).loss.backward()
        blocks = [key for key, p in copies.items() if ("layers.0." in key or "blocks.0." in key) and p.grad is not None]
        assert len(blocks) > 8 and all(copies[key].grad.abs().max() > 0 for key in blocks if "k_proj.b" not in key)
        assert all(p.grad is not None and p.grad.abs().max() > 0 for p in compressed.merging.parameters())
        wrapped.zero_grad()
    assert all(new is old for new, old in zip(before.merging.parameters(), positions, strict=True))
    assert before.host.frontend.grad_checkpointing
    with torch.no_grad():
        for copy in copies.values():
            copy.add_(0.05 * torch.randn_like(copy))
    trained = last_logits(before, text, videos)
    assert torch.equal(last_logits(after, text, videos), trained) and not torch.allclose(trained, expected, atol=1e-2)
    with wrapped.disable_adapter():
        torch.testing.assert_close(last_logits(before, text, videos), expected, rtol=0, atol=1e-5)
    assert torch.equal(last_logits(before, text, videos), trained)


@torch.no_grad()
@pytest.mark.parametrize("method", ["tempme", "none"])
@pytest.mark.parametrize("name", HOSTS)
def test_offloaded_weights_are_fetched(name: str, method: str) -> None:
    model, processor = tiny.build(name)
    options = {**tiny.schedule(method, 3), "num_frames": tiny.FRAMES}
    expected = tiny.new_tokens(compress(model, processor, method, **options), tiny.ASK, [tiny.video(0)])
    cpu_offload(model, execution_device=torch.device("cpu"))
    assert all(weight.is_meta for weight in model.parameters())
    offloaded = compress(model, processor, method, **options)
    if name == "PerceptionLM":  # nor does the host itself run
        with pytest.raises(ValueError, match=r"cls_token, pos_embed are offloaded.* keep the tower on a device"):
            offloaded.prepare(tiny.ASK, [tiny.video(0)])
        return
    assert torch.equal(tiny.new_tokens(offloaded, tiny.ASK, [tiny.video(0)]), expected)
    assert not any(weight.is_meta for weight in offloaded.merging.parameters())


@pytest.mark.parametrize("name", HOSTS)
def test_folders_come_back(name: str, tmp_path: Any) -> None:
    compressed = compressed_by(name, "tempme")
    compressed.save_pretrained(tmp_path)
    again = load_compressed(tmp_path)
    assert again.host.config() == compressed.host.config() and again.host.num_frames == tiny.FRAMES
    saved, loaded = (dict(made.merging.named_parameters()) for made in (compressed, again))
    assert saved.keys() == loaded.keys() and saved
    assert all(weight.any() and torch.equal(weight, saved[part]) for part, weight in loaded.items())
    text, videos = [SHORT, LONG], [tiny.video(0), tiny.video(1)]
    torch.testing.assert_close(last_logits(again, text, videos), last_logits(compressed, text, videos))
