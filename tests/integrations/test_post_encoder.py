"""What must hold for every host whose features merge behind its tower: the host itself without merging, all uses with
it, and positions, times and deeper features that belong to the kept tokens."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable, Sequence
from functools import cache
from itertools import product
from typing import Any

import numpy as np
import pytest
import torch
from accelerate import cpu_offload
from accelerate.utils import send_to_device
from integrations import tiny_post as tiny
from integrations.tiny import NEW_WORDS, ONE_WAY, READS_IN_PARTS, mixes_up, native_words, new_tokens
from integrations.tiny_post import NEEDS, NEW, PLACED
from torch import Tensor

from tempme_vl.compressors import Clip, FrameFeatures
from tempme_vl.integrations import Compressed, compress, load_compressed
from tempme_vl.integrations.base import SampledVideo
from tempme_vl.integrations.post_encoder import clip_seconds
from tempme_vl.integrations.reduction import make_plan, merge
from tempme_vl.integrations.videos import sample

HOSTS = [name for name in tiny.MODELS if NEEDS.get(name, True)]
REFUSED = [name for name in tiny.MODELS if name not in HOSTS]
IN_TOWER = ("Qwen2-VL", "Qwen2.5-VL", "Qwen3-VL")
AXES = [name for name in tiny.AXES if name in HOSTS]
TOLD = [name for name in tiny.TIMED if name in HOSTS]
FEEDS = [(name, "embeddings") for name in HOSTS if name not in tiny.BY_OUTPUTS]
FEEDS += [(name, "encoder_outputs") for name in HOSTS if NEW]
METHODS: dict[str, dict[str, Any]] = {
    "tempme": {"merge_frames": (2, 2), "cross_percent": 40, "intra_percent": 10},
    "tome": {"r": 3, "steps": 2},
    "none": {},
}
OFTEN = [(name, method) for name in HOSTS for method in ("tempme", "tome")]
# a way in knows no method, and what is fed is the same by each
TOME = [pytest.param(name, "tome", feed, marks=pytest.mark.slow) for name, feed in dict(FEEDS).items()]
FED = [(name, "tempme", feed) for name, feed in FEEDS] + TOME
TIMED = [(name, feed, None) for name, feed in FEEDS]
TIMED += [(name, feed, 0.7) for name, feed in FEEDS if name in TOLD]

shared = cache(tiny.build)
pytestmark = pytest.mark.filterwarnings("ignore:.*nobody said so")  # but in the tests of times


def prompt(name: str, words: str = "what is the red dog doing in * and how many") -> str:
    return words.replace("*", tiny.placeholder(name))


def compressed_by(name: str, method: str, feed: Any = None) -> Compressed:
    model, processor = shared(name)
    return compress(model, processor, method, tiny.FRAMES, feed=feed, **METHODS[method])


@torch.no_grad()
def row_of(compressed: Compressed, text: str, video: np.ndarray, fps: float | None = None) -> list[int]:
    """The ids of a prompt, whatever the feed."""
    tokens = compressed.host.encode([sample(video, compressed.host.num_frames, fps)], [text])
    return compressed.host.input_ids(text, tokens)


@torch.no_grad()
def last_logits(compressed: Compressed, text: Any, videos: Any) -> Tensor:
    return compressed(**compressed.prepare(text, videos)).logits[:, -1]


def native_inputs(
    name: str,
    text: list[str],
    videos: list[np.ndarray],
    fps: float | None = None,
    indices: Sequence[int] = range(tiny.FRAMES),
    total: int = tiny.FRAMES,
) -> Any:
    """What the host's own processor makes of prompts with one video of FRAMES frames each, out of `total`."""
    options: dict[str, Any] = {"use_token_compression": False} if name == "VideoLLaMA 3" else {}
    if fps is not None:
        frames = {"frames_indices": list(indices), "total_num_frames": total}
        options["video_metadata"] = [[{**frames, "fps": fps, "duration": total / fps}]] * len(videos)
        if name == "Qwen2.5-Omni":  # is told of the frames that it gets
            options = {"fps": len(indices) / total * fps}
    nested: Any = [[video] for video in videos] if name == "SmolVLM" else videos
    return shared(name)[1](
        text=text, videos=nested, do_sample_frames=False, return_tensors="pt", padding=True, **options
    )


@pytest.mark.parametrize(("name", "feed", "fps"), TIMED)
def test_without_merging_it_is_the_host_itself(
    name: str, feed: Any, fps: float | None, record_property: Callable[[str, object], None]
) -> None:
    model, _ = shared(name)
    compressed = compressed_by(name, "none", feed)
    text, videos = [prompt(name), prompt(name, "why * ?")], [tiny.video(0, tiny.FRAMES), tiny.video(1, tiny.FRAMES)]
    native = native_inputs(name, text, videos, fps)
    inputs = compressed.prepare(text, videos, fps=fps)
    if feed == "encoder_outputs":
        assert torch.equal(inputs["input_ids"], native["input_ids"])
    seen = native["attention_mask"].bool()
    with torch.no_grad():
        expected, ours = model(**native).logits[seen], compressed(**inputs).logits[seen]
        torch.testing.assert_close(ours, expected, rtol=0, atol=1e-5)
        assert expected.std() > 0.5
        for options in ({}, {"num_beams": 3}):
            if name in tiny.BY_OUTPUTS:  # whose embeddings alone tell it less
                written = model.generate(**native, max_new_tokens=NEW_WORDS, do_sample=False, **options)[:, -NEW_WORDS:]
            else:
                written = native_words(compressed.host, native, record_property, **options)
            inputs = compressed.prepare(text, videos, fps=fps)
            assert torch.equal(
                compressed.generate(**inputs, max_new_tokens=NEW_WORDS, do_sample=False, **options), written
            )


@torch.no_grad()
@tiny.hosts([name for name in ("VideoLLaMA 3",) if name in HOSTS])
def test_tokens_that_the_host_drops_by_itself_stay(name: str) -> None:
    """Of a still video all but the first frame's, and one of each, where its processor is not told otherwise."""
    model, processor = shared(name)
    compressed, still = compressed_by(name, "none"), tiny.video(0, 1).repeat(tiny.FRAMES, axis=0)
    own = processor(text=[prompt(name)], videos=[still], return_tensors="pt")
    frame = compressed.host.count(32, 32)[0] // tiny.FRAMES
    assert (own["input_ids"] == compressed.host.token_id).sum() == frame + tiny.FRAMES - 1
    whole = native_inputs(name, [prompt(name)], [still])
    logits = compressed(**compressed.prepare(prompt(name), [still])).logits
    torch.testing.assert_close(logits, model(**whole).logits, rtol=0, atol=1e-5)


@torch.no_grad()
@tiny.hosts(TOLD)
def test_times_are_those_of_the_hosts_own_processor(name: str) -> None:
    """Also where more frames come than are taken, or fewer."""
    model, _ = shared(name)
    compressed = compressed_by(name, "none")
    assert compressed.host.uses_time
    for total, fps in ((tiny.FRAMES, 8 / 15), (20, 2.0), (37, 0.4), (3, 0.1)):
        video = tiny.video(0, total)
        chosen = sample(video, tiny.FRAMES)
        native = native_inputs(name, [prompt(name)], [chosen.frames], fps, chosen.indices, total)
        expected = model(**native).logits
        told: list[dict[str, Any]] = [{"fps": fps}, {"fps": [fps]}, {"fps": [[fps]]}]
        if name != "SmolVLM" or total > tiny.FRAMES:  # else nobody can know how long the last frame was shown
            seconds = np.arange(total) / fps
            told += [{"times": seconds}, {"times": [torch.from_numpy(seconds).float()]}, {"times": [[list(seconds)]]}]
        for times in told:
            logits = model(**compressed.prepare(prompt(name), [video], **times)).logits
            torch.testing.assert_close(logits, expected, rtol=0, atol=1e-5)
        other = model(**compressed.prepare(prompt(name), [video], fps=3 * fps))
        assert other.logits.shape != expected.shape or (other.logits - expected).abs().max() > 1e-2


@tiny.hosts(TOLD)
def test_every_video_has_times_of_its_own(name: str) -> None:
    compressed = compressed_by(name, "tempme")
    text, videos = [prompt(name, "why * and *"), prompt(name)], [[tiny.video(0), tiny.video(1)], [tiny.video(2)]]
    together = [compressed.prepare(text, videos, fps=fps) for fps in ([0.2, 0.5, 1.1], [[0.2, 0.5], [1.1]])]
    seconds = [[np.arange(4) / fps for fps in row] for row in ([0.2, 0.5], [1.1])]
    together += [compressed.prepare(text, videos, times=times) for times in (seconds, [*seconds[0], *seconds[1]])]
    first = compressed.prepare(text[0], videos[0], fps=[0.2, 0.5])
    second = compressed.prepare(text[1], videos[1], fps=1.1)
    for inputs in together[:2] if name == "SmolVLM" else together:
        with torch.no_grad():
            logits = compressed(**inputs).logits[:, -1]
            torch.testing.assert_close(logits[:1], compressed(**first).logits[:, -1], rtol=0, atol=1e-4)
            torch.testing.assert_close(logits[1:], compressed(**second).logits[:, -1], rtol=0, atol=1e-4)


@pytest.mark.parametrize("name", HOSTS)
def test_untold_times_are_said_where_they_matter(name: str) -> None:
    compressed = compressed_by(name, "tempme")
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        compressed.prepare(prompt(name), [tiny.video(0)])
    assumed = {"VideoLLaMA 3": 1, "Qwen2.5-Omni": 2, "Molmo2": 2}.get(name, 24)
    expected = [f"nobody said so of 1 of 1 videos: {assumed} frames a second"] if compressed.host.uses_time else []
    said = [one for one in said if "frames a second" in str(one.message)]
    assert len(said) == len(expected) and all(expected[0] in str(one.message) for one in said)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        compressed.prepare(prompt(name), [tiny.video(0)], fps=24)
        compressed.prepare("why", [])


@torch.no_grad()
@pytest.mark.parametrize(
    ("name", "method"),
    [*product(HOSTS, ("tempme", "none")), *((name, "in the tower") for name in HOSTS if name.startswith(IN_TOWER))],
)
def test_a_second_turn_on_the_cache_of_the_first(name: str, method: str) -> None:
    """The model's own `generate` goes on from there as from scratch, whatever was prepared in between."""
    options: dict[str, Any] = {"max_new_tokens": 5, "do_sample": False}
    if method == "in the tower":
        compressed = compress(*shared(name), "tempme", tiny.FRAMES, "tower", budget=0.5)
    else:
        compressed = compressed_by(name, method)
    model, words, video = compressed.model, compressed.tokenizer, tiny.video(0)
    feed_ids = compressed.feed == "encoder_outputs"
    plain = new_tokens(compressed, prompt(name), [video], fps=1.0, max_new_tokens=5)
    inputs = compressed.prepare(prompt(name), [video], fps=1.0)
    compressed.prepare("why", [])
    first = compressed.generate(**inputs, **options, return_dict_in_generate=True)
    assert torch.equal(first.sequences, plain)
    if not feed_ids:  # a cache goes on by ids
        return
    more = torch.tensor([words(" why is it red", add_special_tokens=False)["input_ids"]])
    ids = torch.cat([inputs["input_ids"], first.sequences, more], dim=1)
    cache = {"past_key_values": first.past_key_values}
    again = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), **cache, **options)[:, ids.shape[1] :]
    written = words.decode(first.sequences[0])
    whole = compressed.prepare(f"{prompt(name)}{written} why is it red", [video], fps=1.0)
    assert torch.equal(whole["input_ids"], ids)
    assert torch.equal(compressed.generate(**whole, **options), again)


@torch.no_grad()
@pytest.mark.parametrize(("name", "feed"), FEEDS)
def test_inputs_that_others_make_anew(name: str, feed: Any) -> None:
    """Trainer and the hooks of a device_map copy the inputs field by field, chunked prefill feeds them in parts."""
    compressed, options = compressed_by(name, "tempme", feed), {"max_new_tokens": 4, "do_sample": False}
    text, videos = [prompt(name, "why *"), prompt(name)], [tiny.video(0), tiny.video(1)]
    expected = compressed(**compressed.prepare(text, videos, fps=1.0)).logits
    copied = send_to_device(dict(compressed.prepare(text, videos, fps=1.0)), torch.device("cpu"))
    assert torch.equal(compressed(**copied).logits, expected)
    if feed == "encoder_outputs":
        written = compressed.generate(**compressed.prepare(text[1], videos[1:], fps=1.0), **options)
        inputs = compressed.prepare(text[1], videos[1:], fps=1.0)
        if not READS_IN_PARTS:
            with pytest.raises(ValueError, match=r"and writes other words; got prefill_chunk_size=7"):
                compressed.generate(**inputs, **options, prefill_chunk_size=7)
            return
        same = torch.equal(compressed.generate(**inputs, **options, prefill_chunk_size=7), written)
        assert same or name in tiny.TWO_WAYS
        native = native_inputs(name, text[1:], [tiny.video(1, tiny.FRAMES)], 1.0)
        if not same:  # nor is it so for the host itself
            own = compressed.model.generate(**native, **options)
            assert not torch.equal(compressed.model.generate(**native, **options, prefill_chunk_size=7), own)


@torch.no_grad()
@pytest.mark.parametrize("name", HOSTS)
def test_offloaded_weights_are_fetched(name: str) -> None:
    model, processor = tiny.build(name)
    expected = new_tokens(compress(model, processor, "tempme", tiny.FRAMES), prompt(name), [tiny.video(0)])
    cpu_offload(model, execution_device=torch.device("cpu"))
    assert all(weight.is_meta for weight in model.parameters())
    if name.startswith(("PerceptionLM", "GLM", "Gemma 4, small")):  # they take weights of modules that are not called
        with pytest.raises((NotImplementedError, RuntimeError), match="meta"):
            model(**native_inputs(name, [prompt(name)], [tiny.video(0, tiny.FRAMES)]))
        return
    offloaded = compress(model, processor, "tempme", tiny.FRAMES)
    assert torch.equal(new_tokens(offloaded, prompt(name), [tiny.video(0)]), expected)


@pytest.mark.parametrize("name", HOSTS)
def test_an_odd_number_of_frames(name: str) -> None:
    model, processor = shared(name)
    video = tiny.video(0, 5)
    native = native_inputs(name, [prompt(name)], [video])
    with torch.no_grad():
        inputs = compress(model, processor, "none", 5).prepare(prompt(name), [video])
        torch.testing.assert_close(model(**inputs).logits, model(**native).logits, rtol=0, atol=1e-5)


@pytest.mark.parametrize(("name", "method", "feed"), FED)
def test_a_padded_batch_equals_single_calls(name: str, method: str, feed: Any) -> None:
    compressed = compressed_by(name, method, feed)
    text, videos = [prompt(name, "why *"), prompt(name)], [[tiny.video(0)], [tiny.video(1)]]
    batch = last_logits(compressed, text, videos)
    for row in range(2):
        single = last_logits(compressed, text[row], videos[row])
        torch.testing.assert_close(batch[row], single[0], rtol=0, atol=1e-4)
    other = last_logits(compressed, text[0], [tiny.video(7)])
    assert (other[0] - batch[0]).abs().max() > 1e-3  # the video matters
    for options in ({}, {"num_beams": 3}):
        together = new_tokens(compressed, text, videos, **options)
        apart = [new_tokens(compressed, t, v, **options) for t, v in zip(text, videos, strict=True)]
        assert torch.equal(together, torch.cat(apart))


@pytest.mark.parametrize(("name", "feed"), FEEDS)
def test_prompts_with_several_videos_and_with_none(name: str, feed: Any) -> None:
    compressed = compressed_by(name, "tempme", feed)
    text = [prompt(name, "what * and * why"), "what is this", prompt(name)]
    # Qwen keeps the shape of a video, and then videos of one batch have unlike numbers of tokens
    videos: list[list[np.ndarray]] = [[tiny.video(0), tiny.video(1, side=20)], [], [tiny.video(2)]]
    batch = last_logits(compressed, text, videos)
    for row in range(3):
        single = last_logits(compressed, text[row], [videos[row]])
        torch.testing.assert_close(batch[row], single[0], rtol=0, atol=1e-4)
    swapped = last_logits(compressed, text[0], [videos[0][::-1]])
    assert (swapped[0] - batch[0]).abs().max() > 1e-3
    first = new_tokens(compressed, text[:1], videos[:1])  # and so does each of three rows that draw the likeliest word
    three = new_tokens(compressed, text[:1], videos[:1], do_sample=True, top_k=1, num_return_sequences=3)
    assert torch.equal(three, first.expand(3, -1))
    for options in ({}, {"num_beams": 2}):
        if options and mixes_up(compressed.prepare(text, videos, fps=1.0)):
            with pytest.raises(ValueError, match=r"mixes up the visual tokens .*num_beams=2"):
                new_tokens(compressed, text, videos, **options)
            continue
        together = new_tokens(compressed, text, videos, **options)
        apart = [new_tokens(compressed, t, [v], **options) for t, v in zip(text, videos, strict=True)]
        assert torch.equal(together, torch.cat(apart))


@pytest.mark.parametrize("name", HOSTS)
def test_feeds_give_the_same_or_are_refused(name: str, record_property: Callable[[str, object], None]) -> None:
    ways = [feed for host, feed in FEEDS if host == name]
    if len(ways) == 1:
        record_property("note", ONE_WAY[ways[0]])
        missing = next(feed for feed in ONE_WAY if feed not in ways)
        with pytest.raises(ValueError, match=rf"takes video features by \['{ways[0]}'\]; .*got feed='{missing}'"):
            compressed_by(name, "tempme", missing)
        return
    one, other = (compressed_by(name, "tempme", feed) for feed in ("encoder_outputs", "embeddings"))
    pair = [prompt(name, "what * and * why")], [[tiny.video(0), tiny.video(1, side=20)]]
    assert torch.equal(*(new_tokens(way, *pair, num_beams=3) for way in (one, other)))
    text, videos = [prompt(name, "why *"), prompt(name)], [tiny.video(0), tiny.video(1)]
    torch.testing.assert_close(last_logits(one, text, videos), last_logits(other, text, videos), rtol=0, atol=1e-6)
    for options in ({}, {"num_beams": 3, "num_return_sequences": 2}):
        written = new_tokens(one, text, videos, **options)
        assert torch.equal(written, new_tokens(other, text, videos, **options))


@pytest.mark.parametrize(("name", "method"), OFTEN)
def test_counts_are_the_predicted_ones(name: str, method: str) -> None:
    compressed = compressed_by(name, method)
    host, shown = compressed.host, compressed.describe()
    assert f"{host.costs().native_tokens}" in shown and f"{host.costs().tokens}" in shown
    for height, width in ((32, 32), (20, 48)):
        video = np.random.default_rng(0).integers(0, 256, (tiny.FRAMES, height, width, 3), dtype=np.uint8)
        native, ours = host.count(height, width)
        ids = row_of(compressed, prompt(name), video)
        assert ids.count(host.token_id) == ours < native
        assert (native_inputs(name, [prompt(name)], [video])["input_ids"] == host.token_id).sum() == native
    if method == "tempme":
        assert host.count(32, 32)[1] <= 0.35 * host.count(32, 32)[0]


@pytest.mark.parametrize(("name", "feed"), FEEDS)
def test_gradients_reach_the_tower(name: str, feed: Any) -> None:
    compressed = compressed_by(name, "tempme", feed)
    text, videos = [prompt(name, "why *"), prompt(name)], [tiny.video(0), tiny.video(1)]
    loss = compressed(**compressed.prepare(text, videos, labels=["two dogs run", "red"])).loss
    loss.backward()
    tower = compressed.host.tower
    blocks = ("layer.0.", "layers.0.", "blocks.0.")
    first = next(p for key, p in tower.named_parameters() if any(block in key for block in blocks))
    assert torch.isfinite(loss) and first.grad is not None and first.grad.abs().max() > 0
    compressed.model.zero_grad()


@pytest.mark.parametrize("name", HOSTS)
def test_half_precision_and_train_mode(name: str) -> None:
    model, processor = tiny.build(name)
    compressed = compress(model.to(torch.bfloat16).train(), processor, "tempme", tiny.FRAMES)
    output = compressed(**compressed.prepare(prompt(name), [tiny.video(0)], labels=True))
    output.loss.backward()
    assert output.logits.dtype == torch.bfloat16 and torch.isfinite(output.loss)


@pytest.mark.parametrize("name", HOSTS)
def test_the_model_beside_it_stays_what_it_was(name: str) -> None:
    model, processor = tiny.build(name)
    native = native_inputs(name, [prompt(name)], [tiny.video(0, tiny.FRAMES)])
    with torch.no_grad():
        state = {key: value.clone() for key, value in model.state_dict().items()}
        modules = {key: (type(m), m.forward.__func__, id(m)) for key, m in model.named_modules()}
        compressed = compress(model, processor, "tempme", tiny.FRAMES)
        inputs = [prompt(name), prompt(name, "why *")], [tiny.video(0), tiny.video(1)]
        fresh = new_tokens(compressed, *inputs)
        before = model(**native).logits
        written = model.generate(**native, max_new_tokens=4, do_sample=False)
        assert torch.equal(new_tokens(compressed, *inputs), fresh)  # nor one of the host's in ours
        assert torch.equal(new_tokens(compressed, *inputs, num_beams=1, use_cache=False), fresh)
        assert torch.equal(model(**native).logits, before)
        assert torch.equal(model.generate(**native, max_new_tokens=4, do_sample=False), written)
    assert {key: (type(m), m.forward.__func__, id(m)) for key, m in model.named_modules()} == modules
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())


@pytest.mark.parametrize("name", HOSTS)
def test_folders_come_back(name: str, tmp_path: Any) -> None:
    compressed = compressed_by(name, "tempme")
    compressed.save_pretrained(tmp_path)
    again = load_compressed(tmp_path)
    assert again.host.config() == compressed.host.config() and again.host.num_frames == tiny.FRAMES
    text, videos = [prompt(name, "why *"), prompt(name)], [tiny.video(0), tiny.video(1)]
    torch.testing.assert_close(last_logits(again, text, videos), last_logits(compressed, text, videos))


# ---- the merging


def test_features_merge_weighted_by_their_sizes() -> None:
    torch.manual_seed(0)
    frames = FrameFeatures(torch.randn(4, 10, 6, requires_grad=True), (2, 5), (torch.randn(4, 10, 6),))
    plan = make_plan("tempme", 4, (2, 5), METHODS["tempme"])
    clips = merge(frames, plan)
    assert clips.x.shape == (plan.output_tokens, 6) and clips.deeper[0].shape == clips.x.shape
    assert [(clip.first, clip.last) for clip in clips.clips] == [(0, 3)] and (clips.source.diff() > 0).all()
    # each input has a share in one output: the gradients of an output are a mean, and all sizes are 40 together
    shares = torch.stack([torch.autograd.grad(x[0], frames.x, retain_graph=True)[0][..., 0] for x in clips.x])
    torch.testing.assert_close(shares.sum((1, 2)), torch.ones(len(shares)))
    sizes = 1 / shares.amax((1, 2))
    assert sizes.sum().round() == 40 and ((shares > 0).sum(0) == 1).all()
    torch.testing.assert_close(
        clips.deeper[0], torch.einsum("ots,tsd->od", shares, frames.deeper[0])
    )  # by the same matches
    for out, token in enumerate(clips.source.tolist()):
        assert shares[out].flatten()[token] > 0


def test_still_frames_merge_without_a_loss() -> None:
    torch.manual_seed(0)
    still = torch.randn(1, 9, 6).expand(4, -1, -1)  # an odd number of tokens
    options = {"merge_frames": [2, 2], "cross_percent": 50, "intra_percent": 0}
    clips = merge(FrameFeatures(still, (3, 3)), make_plan("tempme", 4, (3, 3), options))
    torch.testing.assert_close(clips.x, still[0])
    assert clips.source.tolist() == list(range(27, 36))


def test_clips_are_named_by_the_mean_of_their_times() -> None:
    video = SampledVideo(np.zeros((5, 1, 1, 3), dtype=np.uint8), (0, 2, 4, 6, 8), fps=2.0)
    each = [Clip(1, slot, slot) for slot in range(5)]
    assert clip_seconds(video, 5, each) == [0, 1, 2, 3, 4] and clip_seconds(video, 5, [Clip(1, 0, 4)]) == [2]
    assert clip_seconds(video, 3, each[:3]) == [0.5, 2.5, 4]  # pairs of frames, the last one with itself
    assert clip_seconds(video, 5, [Clip(2, 1, 2), Clip(1, 4, 4)]) == [1.5, 4]
    unknown = SampledVideo(video.frames, video.indices)
    assert clip_seconds(unknown, 5, each)[1] == 2 / 24


@pytest.mark.parametrize("name", HOSTS)
def test_prompts_tell_the_clips(name: str) -> None:
    compressed = compressed_by(name, "tempme")
    ids = row_of(compressed, prompt(name, "*"), tiny.video(0, tiny.FRAMES), fps=0.1)
    text = compressed.tokenizer.decode([i for i in ids if i != compressed.host.token_id])
    expected = {
        "Qwen2-VL": "<|vision_start|><|vision_end|>",
        "Qwen2.5-VL": "<|vision_start|><|vision_end|>",
        "Qwen2.5-Omni": "<|vision_start|><|vision_end|>",
        "PerceptionLM, rotary": "",
        **dict.fromkeys(
            ("Qwen3-VL", "Qwen3-VL-MoE", "Qwen3.5", "Qwen3.5-MoE"),
            "<|vision_start|><35.0 seconds><|vision_start|><|vision_end|><|vision_end|>",
        ),
        **{
            f"GLM-4.{kind}V": f"<|begin_of_video|><|begin_of_image|><|end_of_image|>{time}<|end_of_video|>"
            for kind, time in ((1, "30"), (5, "30"), (6, "30.0 seconds"))
        },
        **dict.fromkeys(("Gemma 4, small", "Gemma 4, large"), "00:15 <img></img> 00:55 <img></img>"),
        "Molmo2": "<s>15.0 <frame_start><frame_end> 55.0 <frame_start><frame_end>",
        "VideoLLaMA 3": "Time 15.0s:,Time 55.0s:",
        "InternVL": "Frame1: <img></img>\nFrame2: <img></img>",
        "SmolVLM": "You are provided the following series of two frames from a 0:01:20 [H:MM:SS] video.\n"
        "\nFrame from 00:15:<fake><global-img><fake>\nFrame from 00:55:<fake><global-img><fake>\n\n",
    }
    assert text == expected[name]


@tiny.hosts(AXES)
def test_kept_tokens_have_the_positions_that_the_host_gives_them(name: str) -> None:
    model, processor = shared(name)
    compressed = compress(model, processor, "tempme", tiny.FRAMES, merge_frames=(2,), cross_percent=50, intra_percent=0)
    still = tiny.video(0, 1).repeat(tiny.FRAMES, axis=0)
    inputs = compressed.prepare([prompt(name), "why"], [[still], []], fps=1.0)
    places = torch.tensor(row_of(compressed, prompt(name), still, fps=1.0)) == compressed.host.token_id
    positions = inputs["position_ids"][:, 0, places]
    rows, columns = compressed.host.grid(32, 32)
    clips = tiny.FRAMES // 2 // 2
    assert places.sum() == clips * rows * columns
    grid = torch.cartesian_prod(torch.arange(rows), torch.arange(columns)).T
    each = {"Qwen2-VL": 1, "Qwen2.5-VL": 4, "Qwen2.5-Omni": 50}.get(name)  # positions of a slot, of 2 seconds
    if each is not None:  # of two equal slots the later one stays: a grid of every other slot
        start = int(places.nonzero()[0])
        times = (torch.tensor([1, 3]) * each).repeat_interleave(rows * columns)
        assert torch.equal(positions[0], start + times)
        assert torch.equal(positions[1:], start + grid.repeat(1, clips))
        behind = inputs["position_ids"][:, 0, int(places.nonzero()[-1]) + 1]
        assert behind.tolist() == [start + (3 * each + 1 if name == "Qwen2.5-Omni" else max(rows, columns))] * 3
    else:  # a clip stands where a temporal patch would
        first = positions[:, : rows * columns]
        assert torch.equal(first[1:] - first[0], grid) and len(first[0].unique()) == 1
    alone = compressed.prepare("why", [])["position_ids"]
    assert torch.equal(inputs["position_ids"][:, 1:, -3:], alone) and alone[0, 0].tolist() == [0, 1, 2]


# ---- what does not fit


def test_options_that_do_not_fit_are_refused() -> None:
    model, processor = tiny.build("InternVL")
    with pytest.raises(ValueError, match=r"where 'tempme' takes merge_frames, .*got merge_layers"):
        compress(model, processor, "tempme", 8, merge_layers=(1, 2))
    with pytest.raises(ValueError, match="frames do not divide"):
        compress(model, processor, "tempme", 6, merge_frames=(2, 2))
    with pytest.raises(ValueError, match="how many clips each step joins"):
        compress(model, processor, "tempme", 8, merge_frames=())
    with pytest.raises(ValueError, match="unknown method 'other'"):
        compress(model, processor, "other")


@tiny.hosts([name for name in ("Qwen2.5-VL",) if name in HOSTS])
def test_a_transformers_that_gives_all_frames_one_time_is_refused(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As 5.3 to 5.5 do, whatever attributes they have."""
    model, processor = tiny.build(name)
    own = type(model.model).get_rope_index

    def timeless(self: Any, ids: Tensor, second_per_grid_ts: Any = None, **options: Any) -> Any:
        return own(self, ids, second_per_grid_ts=torch.zeros(len(ids)), **options)

    timeless.__signature__ = inspect.signature(own)
    monkeypatch.setattr(type(model.model), "get_rope_index", timeless)
    with pytest.raises(ValueError, match=r"a minute apart 0 positions apart and not 120 .*update transformers"):
        compress(model, processor, "none")


@tiny.hosts(REFUSED)
def test_hosts_that_this_transformers_cannot_run_are_refused(
    name: str, record_property: Callable[[str, object], None]
) -> None:
    model, processor = tiny.build(name)
    with pytest.raises(ValueError, match="takes video features by no way" if PLACED else "update transformers") as told:
        compress(model, processor, "none")
    record_property("refused", str(told.value))


@tiny.hosts(AXES)
def test_frames_count_as_temporal_patches(name: str) -> None:
    model, processor = shared(name)
    with pytest.raises(ValueError, match=r"12 frames are 6 temporal patches to this host: .*multiple of 4"):
        compress(model, processor, "tempme", 12, merge_frames=(2, 2))


@tiny.hosts([name for name in ("Qwen2.5-Omni",) if name in HOSTS])
def test_a_thinker_whose_parts_lie_elsewhere_is_refused(name: str) -> None:
    model, processor = tiny.build(name)
    del model.model.visual
    with pytest.raises(ValueError, match="lie elsewhere in this transformers: update transformers"):
        compress(model, processor, "none")


@tiny.hosts([name for name in ("Molmo2",) if name in HOSTS])
def test_tokens_behind_rows_are_refused(name: str) -> None:
    model, processor = tiny.build(name)
    processor.video_use_col_tokens = True
    with pytest.raises(ValueError, match="expected a Molmo2Processor with video_use_col_tokens=False"):
        compress(model, processor, "none")


@tiny.hosts([name for name in ("Qwen2.5-VL",) if name in HOSTS])
def test_videos_side_by_side_are_refused(name: str) -> None:
    compressed = compressed_by(name, "tempme")
    with pytest.raises(ValueError, match="side by side"):
        compressed.prepare("<|video_pad|><|video_pad|>", [tiny.video(0), tiny.video(1)])


@tiny.hosts([name for name in ("Qwen2.5-VL", "Qwen2.5-Omni") if name in HOSTS])
def test_where_text_goes_on_behind_a_video_is_told(name: str) -> None:
    """Between versions of transformers it differs."""
    compressed = compressed_by(name, "none")
    told = compressed.facts()["text behind a video"]
    still = tiny.video(0, 1).repeat(tiny.FRAMES, axis=0)
    places = torch.tensor(row_of(compressed, prompt(name), still, fps=0.1)) == compressed.host.token_id
    positions = compressed.prepare(prompt(name), [still], fps=0.1)["position_ids"][:, 0]
    video, behind = positions[:, places], int(positions[0, int(places.nonzero()[-1]) + 1])
    expected = video if told.startswith("behind the largest") else video[1:]
    assert behind == expected.max() + 1 and "behind" in told
