"""Images in prompts: the host's own results, beside videos and alone, whatever merges in the videos."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate import cpu_offload
from accelerate.utils import send_to_device
from integrations import tiny, tiny_post
from integrations.tiny import NEW_WORDS, READS_IN_PARTS, mixes_up
from PIL import Image
from torch import Tensor

from tempme_vl.integrations import Compressed, compress
from tempme_vl.integrations.images import as_image

LEFT_OUT = ("InstructBlipVideo",)  # reads no images
HOSTS = [name for name in tiny.MODELS if name not in LEFT_OUT]
HOSTS += [name for name in tiny_post.MODELS if tiny_post.NEEDS.get(name, True)]
MIXING = [name for name in HOSTS if name not in tiny_post.APART]  # those that take images beside videos


def ways(name: str) -> list[str]:
    if name in tiny.MODELS:
        return tiny.feeds(name)
    return ["encoder_outputs"] * tiny_post.NEW + ["embeddings"] * (name not in tiny_post.BY_OUTPUTS)


def feeds(names: list[str], quick: int) -> list[Any]:
    """A host's first way (0) or last one (-1), and the others for slow tests."""
    return [
        pytest.param(name, feed, marks=[] if feed == ways(name)[quick] else pytest.mark.slow)
        for name in names
        for feed in ways(name)
    ]


pytestmark = pytest.mark.filterwarnings("ignore:.*nobody said so")


def kit(name: str) -> Any:
    return tiny if name in tiny.MODELS else tiny_post


@cache
def shared(name: str) -> tuple[Any, Any]:
    return kit(name).build(name)


def compressed_by(name: str, method: str, feed: Any = None) -> Compressed:
    model, processor = shared(name)
    if name in tiny.MODELS:
        layers = 4 if name in ("LlavaOnevision", "PerceptionLM") else 3
        options = tiny.schedule(method, layers)
    else:
        options = {"tempme": {"merge_frames": (2, 2), "cross_percent": 40, "intra_percent": 10}, "none": {}}[method]
    return compress(model, processor, method, kit(name).FRAMES, feed=feed, **options)


def prompt(name: str, words: str) -> str:
    """With "I" for an image and "V" for a video."""
    processor = shared(name)[1]
    video = tiny_post.placeholder(name) if kit(name) is tiny_post else "<video>"
    image = video.replace(processor.video_token, processor.image_token).replace("_of_video", "_of_image")
    return words.replace("V", video).replace("I", image)


def picture(number: int, height: int = 32, width: int = 32) -> Image.Image:
    pixels = np.random.default_rng(100 + number).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def frames_of(name: str, number: int) -> np.ndarray:
    return tiny.video(number, kit(name).FRAMES)


def pictures(name: str) -> list[list[Image.Image]]:
    """One for the first prompt and two for the second: of many shapes, but where the host's processor stacks them."""
    if name.startswith("PerceptionLM"):
        return [[picture(0, 32, 64)], [picture(1, 32, 64), picture(2, 32, 64)]]
    return [[picture(0, 32, 64)], [picture(1), picture(2, 50, 20)]]


def native_inputs(
    name: str, text: list[str], images: list[list[Image.Image]], videos: list[np.ndarray], monkeypatch: Any
) -> Any:
    """What the host's own processor makes of all of it, padded as ours."""
    processor = shared(name)[1]
    monkeypatch.setattr(processor.tokenizer, "padding_side", "left")
    options: dict[str, Any] = {"videos": videos} if videos else {}
    if videos and name in tiny_post.MODELS:
        options["do_sample_frames"] = False
    inputs = processor(text=text, images=images, return_tensors="pt", padding=True, **options)
    monkeypatch.undo()
    return inputs


@torch.no_grad()
def check_equals_the_host(compressed: Compressed, native: Any, *asked: Any, **more: Any) -> None:
    """Logits of all words, and what is written."""
    model, options = compressed.model, {"max_new_tokens": NEW_WORDS, "do_sample": False}
    expected = model(**native).logits
    inputs = compressed.prepare(*asked, **more)
    assert torch.equal(inputs["attention_mask"], native["attention_mask"])
    if compressed.feed == "encoder_outputs":
        assert torch.equal(inputs["input_ids"], native["input_ids"])
    seen = native["attention_mask"].bool()
    torch.testing.assert_close(compressed(**inputs).logits[seen], expected[seen], rtol=0, atol=1e-5)
    assert expected.std() > 0.5
    written = model.generate(**native, **options)[:, -NEW_WORDS:]
    assert torch.equal(compressed.generate(**compressed.prepare(*asked, **more), **options), written)


@torch.no_grad()
def last_logits(compressed: Compressed, *asked: Any) -> Tensor:
    text, videos, images = asked
    return compressed(**compressed.prepare(text, videos, images=images)).logits[:, -1]


def new_words(compressed: Compressed, text: Any, videos: Any, images: Any, **options: Any) -> Tensor:
    options = {"max_new_tokens": NEW_WORDS, "do_sample": False, **options}
    with torch.no_grad():
        return compressed.generate(**compressed.prepare(text, videos, images=images), **options)


# ---- the host's own


@pytest.mark.parametrize(("name", "feed"), feeds(MIXING, 0))
def test_beside_videos_that_stay_whole_it_is_the_host_itself(
    name: str, feed: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = [prompt(name, "why I is V red"), prompt(name, "what is V doing and I in this I")]
    videos, images = [frames_of(name, 0), frames_of(name, 1)], pictures(name)
    native = native_inputs(name, text, images, videos, monkeypatch)
    compressed = compressed_by(name, "none", feed)
    check_equals_the_host(compressed, native, text, videos, images=images)
    kept = last_logits(compressed, text, videos, images)
    turned = last_logits(compressed, text, videos, [images[0], images[1][::-1]])
    other = last_logits(compressed, text, videos, [pictures(name)[1][:1], images[1]])
    assert (turned[1] - kept[1]).abs().max() > 1e-3 and (other[0] - kept[0]).abs().max() > 1e-3
    torch.testing.assert_close(turned[0], kept[0])


@pytest.mark.parametrize(("name", "feed"), feeds(HOSTS, -1))
def test_without_a_video_it_is_the_host_itself(name: str, feed: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    text, images = [prompt(name, "why I is"), prompt(name, "what is I in this I")], pictures(name)
    native = native_inputs(name, text, images, [], monkeypatch)
    check_equals_the_host(compressed_by(name, "tempme", feed), native, text, images=images)


@pytest.mark.parametrize("layout", [(64, 64), (32, 64), (64, 40)])
@pytest.mark.parametrize("name", ["InternVL", "SmolVLM"])
def test_images_in_tiles_are_written_as_the_host_writes_them(
    name: str, layout: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    processor = shared(name)[1]
    if name == "SmolVLM":
        monkeypatch.setattr(processor.image_processor, "size", {"longest_edge": 64})
    image, text = picture(0, *layout), [prompt(name, "why I is")]
    native = processor(text=text, images=[[image]], return_tensors="pt")
    tiles = (native["input_ids"] == processor.image_token_id).sum() // 16
    assert tiles > 2 and native["pixel_values"].flatten(0, -4).shape[0] == tiles
    check_equals_the_host(compressed_by(name, "tempme"), native, text, images=[[image]])


# ---- with merging, and all uses


@pytest.mark.parametrize(("name", "feed"), feeds(MIXING, -1))
def test_a_batch_equals_single_calls(name: str, feed: Any) -> None:
    compressed = compressed_by(name, "tempme", feed)
    words = ["why I", "what is V doing and I in this I", "how many", "is V red"]
    text, (one, two) = [prompt(name, each) for each in words], pictures(name)
    videos, images = [[], [frames_of(name, 0)], [], [frames_of(name, 1)]], [one, two, [], []]
    batch = last_logits(compressed, text, videos, images)
    rows = list(zip(text, videos, images, strict=True))
    for row, (each, own_videos, own_images) in enumerate(rows):
        single = last_logits(compressed, each, [own_videos], [own_images])
        torch.testing.assert_close(batch[row], single[0], rtol=0, atol=1e-4)
    for options in ({}, {"num_beams": 3}):
        if options and mixes_up(compressed.prepare(text, videos, images=images, fps=1.0)):
            with pytest.raises(ValueError, match=r"mixes up the visual tokens .*num_beams=3"):
                new_words(compressed, text, videos, images, **options)
            continue
        together = new_words(compressed, text, videos, images, **options)
        apart = [new_words(compressed, each, [v], [i], **options) for each, v, i in rows]
        assert torch.equal(together, torch.cat(apart))


@tiny.hosts([name for name in MIXING if len(ways(name)) == 2])
def test_feeds_give_the_same(name: str) -> None:
    one, other = (compressed_by(name, "tempme", feed) for feed in ways(name))
    asked = [prompt(name, "why I"), prompt(name, "is V red I and I")], [[], [frames_of(name, 0)]], pictures(name)
    torch.testing.assert_close(last_logits(one, *asked), last_logits(other, *asked), rtol=0, atol=1e-6)


@tiny.hosts([name for name in tiny_post.APART if name in HOSTS])
def test_images_or_videos_in_a_prompt(name: str) -> None:
    compressed, image, video = compressed_by(name, "tempme"), picture(0), frames_of(name, 0)
    text = [prompt(name, "why I"), prompt(name, "is V red")]
    batch = last_logits(compressed, text, [[], [video]], [[image], []])
    torch.testing.assert_close(batch[:1], last_logits(compressed, text[0], [], [image]), rtol=0, atol=1e-4)
    torch.testing.assert_close(batch[1:], last_logits(compressed, text[1], [video], []), rtol=0, atol=1e-4)
    both = prompt(name, "is V red I")
    model, processor = shared(name)
    videos = [[video]] if name == "SmolVLM" else [video]
    native = processor(text=[both], images=[[image]], videos=videos, do_sample_frames=False, return_tensors="pt")
    if name == "SmolVLM":
        assert native["pixel_values"].shape[1] < 1 + len(video)  # some are lost
    else:
        with pytest.raises(ValueError, match=r"do not match|at the same time"):
            model(**native)
    with pytest.raises(
        ValueError, match=r"takes images or videos in a prompt, and not both: (its processor|they have)"
    ):
        compressed.prepare(both, [video], images=[image])


@torch.no_grad()
@tiny.hosts([name for name in MIXING if "encoder_outputs" in ways(name)])
def test_a_second_turn_on_the_cache_of_the_first(name: str) -> None:
    compressed, options = compressed_by(name, "tempme"), {"max_new_tokens": 5, "do_sample": False}
    words, text = compressed.tokenizer, prompt(name, "why V and I ")
    asked = {"videos": [frames_of(name, 0)], "images": [picture(0)], "fps": 1.0}
    inputs = compressed.prepare(text, **asked)
    first = compressed.generate(**inputs, **options, return_dict_in_generate=True)
    more = torch.tensor([words(" how many", add_special_tokens=False)["input_ids"]])
    ids = torch.cat([inputs["input_ids"], first.sequences, more], dim=1)
    cache = {"past_key_values": first.past_key_values}
    again = compressed.model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), **cache, **options)
    written = words.decode(first.sequences[0])
    whole = compressed.prepare(f"{text}{written} how many", **asked)
    assert torch.equal(whole["input_ids"], ids)
    assert torch.equal(compressed.generate(**whole, **options), again[:, ids.shape[1] :])


@torch.no_grad()
@tiny.hosts(
    [name for name in ("VideoLlava", "LlavaOnevision", "Qwen3-VL", "InternVL") if "encoder_outputs" in ways(name)]
)
def test_inputs_that_others_make_anew(name: str) -> None:
    """Trainer and the hooks of a device_map copy them field by field, chunked prefill feeds them in parts. The hosts
    want tensors, lists, features for deeper layers, and images among frames."""
    compressed, options = compressed_by(name, "tempme"), {"max_new_tokens": 4, "do_sample": False}
    text, more = (
        prompt(name, "why I red V is I"),
        {"videos": [frames_of(name, 0)], "images": pictures(name)[1], "fps": 1.0},
    )
    expected = compressed(**compressed.prepare(text, **more)).logits
    copied = send_to_device(dict(compressed.prepare(text, **more)), torch.device("cpu"))
    assert torch.equal(compressed(**copied).logits, expected)
    written = compressed.generate(**compressed.prepare(text, **more), **options)
    inputs = compressed.prepare(text, **more)
    if READS_IN_PARTS:
        assert torch.equal(compressed.generate(**inputs, **options, prefill_chunk_size=7), written)
    else:
        with pytest.raises(ValueError, match="and writes other words; got prefill_chunk_size=7"):
            compressed.generate(**inputs, **options, prefill_chunk_size=7)


@pytest.mark.parametrize("name", MIXING)
def test_places_of_images_have_no_label(name: str) -> None:
    compressed = compressed_by(name, "tempme", None if name in tiny_post.BY_OUTPUTS else "embeddings")
    processor = shared(name)[1]
    text = [prompt(name, "why I is V red"), prompt(name, "what I is")]
    asked = {"videos": [[frames_of(name, 0)], []], "images": [[picture(0)], [picture(1)]]}
    bare = compressed_by(name, "tempme")
    if bare.feed == "encoder_outputs":
        inputs = bare.prepare(text, labels=True, **asked)
        ids, places = inputs["input_ids"], {bare.host.token_id, processor.image_token_id}
        visual = torch.isin(ids, torch.tensor(sorted(places)))
        unlabelled = inputs["labels"] == -100
        assert torch.equal(unlabelled, visual | (inputs["attention_mask"] == 0))
        assert torch.equal(inputs["labels"][~unlabelled], ids[~unlabelled])
    labels = compressed.prepare(text, labels=True, **asked)["labels"]
    assert not torch.isin(labels, torch.tensor([processor.image_token_id, compressed.host.token_id])).any()
    words = len(processor.tokenizer("why is red", add_special_tokens=False)["input_ids"])
    assert (labels[0] != -100).sum() >= words
    answers = compressed.prepare(text, labels=["red", "two"], **asked)
    end, tokenize = processor.tokenizer.eos_token_id, processor.tokenizer
    kept = [[i for i in row if i != -100] for row in answers["labels"].tolist()]
    assert kept == [tokenize(word, add_special_tokens=False)["input_ids"] + [end] for word in ("red", "two")]
    assert torch.isfinite(compressed(**answers).loss)


@pytest.mark.parametrize(("name", "part"), [("VideoLlava", "image_tower"), ("InternVL", "vision_tower")])
def test_gradients_reach_the_tower_of_images(name: str, part: str) -> None:
    compressed = compressed_by(name, "tempme")
    compressed(**compressed.prepare(prompt(name, "why I"), labels=["red"], images=[picture(0)])).loss.backward()
    gradients = [weight.grad for weight in getattr(compressed.model.model, part).parameters()]
    assert any(gradient is not None and gradient.abs().max() > 0 for gradient in gradients)
    compressed.model.zero_grad()


@torch.no_grad()
@pytest.mark.parametrize("name", ["VideoLlava", "LlavaNextVideo", "LlavaOnevision", "InternVL"])
def test_offloaded_weights_are_fetched(name: str) -> None:
    model, processor = kit(name).build(name)
    text, images = prompt(name, "why I"), [picture(0)]
    expected = new_words(compress(model, processor, "none", 4), text, [], images)
    cpu_offload(model, execution_device=torch.device("cpu"))
    assert all(weight.is_meta for weight in model.parameters())
    assert torch.equal(new_words(compress(model, processor, "none", 4), text, [], images), expected)


# ---- forms, and what does not fit


def test_images_come_in_the_forms_of_videos() -> None:
    compressed = compressed_by("VideoLlava", "tempme", "embeddings")
    text, (a, b, c) = ["why <image> and <image>", "how many", "is <image> red"], [picture(n) for n in range(3)]
    expected = compressed.prepare(text, images=[[a, b], [], [c]])["inputs_embeds"]
    arrays = [np.asarray(image) for image in (a, b, c)]
    channels_first = [torch.from_numpy(array.copy()).permute(2, 0, 1) for array in arrays]
    flat: list[Any] = [[a, b, c], (a, b, c), arrays, np.stack(arrays), channels_first, torch.stack(channels_first)]
    for images in [*flat, [arrays[:2], [], arrays[2:]]]:
        assert torch.equal(compressed.prepare(text, images=images)["inputs_embeds"], expected)
    one = compressed.prepare(text[2], images=[c])["inputs_embeds"]
    for images in (c, [[c]], [arrays[2]]):
        assert torch.equal(compressed.prepare(text[2], images=images)["inputs_embeds"], one)
    assert compressed.image_placeholder == "<image>"
    three = np.arange(27, dtype=np.uint8).reshape(3, 3, 3)  # channels are last where either could be
    assert as_image(a) is a and np.array_equal(np.asarray(as_image(three)), three)


@pytest.mark.parametrize(
    "image",
    [
        np.zeros((8, 8, 3), dtype=np.float32),
        np.zeros((8, 8), dtype=np.uint8),
        np.zeros((8, 8, 4), dtype=np.uint8),
        np.zeros((0, 8, 3), dtype=np.uint8),
        torch.zeros(2, 8, 8, 3, dtype=torch.uint8),
        "photo.png",
        Path("photo.png"),
        "https://example.org/photo.png",
    ],
)
def test_other_images_are_refused(image: Any) -> None:
    with pytest.raises(ValueError, match=r"expected an image of PIL, or uint8 pixels \(H, W, 3\)"):
        as_image(image)
    with pytest.raises(ValueError, match="expected"):
        compressed_by("VideoLlava", "tempme").prepare("why <image>", images=[image])


@pytest.mark.parametrize("name", HOSTS)
def test_each_placeholder_wants_one_image(name: str) -> None:
    compressed = compressed_by(name, "none")
    place = shared(name)[1].image_token
    with pytest.raises(ValueError, match=r"has a place for an image \(.*\): give images=, one for each place"):
        compressed.prepare(prompt(name, "why I"))
    for words, images in (("why I", []), ("why I", [picture(0), picture(1)]), ("why", [picture(0)])):
        with pytest.raises(ValueError, match=r"expected one image for every '.*': the prompts have"):
            compressed.prepare(prompt(name, words), images=images)
    with pytest.raises(ValueError, match=r"the answer .* has a place for an image \("):
        compressed.prepare(prompt(name, "why I"), labels=[f"a {place}"], images=[picture(0)])


def test_a_host_that_reads_no_images_says_so() -> None:
    compressed = compress(*tiny.build("InstructBlipVideo"), "none", tiny.FRAMES)
    assert compressed.image_placeholder is None
    assert compressed.prepare(f"<image> {tiny.ASK}", [tiny.video(0)])  # a word as any other, as to the host itself
    with pytest.raises(ValueError, match=r"takes videos alone: its InstructBlipVideoProcessor reads no images"):
        compressed.prepare(tiny.ASK, [tiny.video(0)], images=[picture(0)])


@pytest.mark.parametrize("name", ["PerceptionLM", "PerceptionLM, rotary"])
def test_images_that_the_processor_cannot_stack_are_refused_by_name(name: str) -> None:
    """By itself, too."""
    compressed, images = compressed_by(name, "none"), [picture(0, 32, 32), picture(1, 32, 64)]
    text = prompt(name, "why I and I")
    with pytest.raises((ValueError, RuntimeError)):
        shared(name)[1](text=[text], images=[images], return_tensors="pt")
    with pytest.raises(ValueError, match=r"does not take these images in one prompt \(32 x 32, 64 x 32 pixels\)"):
        compressed.prepare(text, images=images)
    assert compressed.prepare([prompt(name, "why I")] * 2, images=images)  # a prompt each


@tiny.hosts([name for name in tiny_post.AXES if name in HOSTS])
def test_images_side_by_side_are_refused(name: str) -> None:
    with pytest.raises(ValueError, match="two images stand side by side"):
        compressed_by(name, "none").prepare("<|image_pad|><|image_pad|>", images=[picture(0), picture(1)])


def test_a_processor_of_another_model_is_refused() -> None:
    model, processor = tiny.build("LlavaNextVideo")
    processor.num_additional_image_tokens = 0
    with pytest.raises(ValueError, match=r"writes 35 tokens for 1 images of which .* makes 36: check"):
        compress(model, processor, "none", tiny.FRAMES).prepare("why <image>", images=[picture(0)])


def test_the_processor_stays_what_it_was() -> None:
    compressed = compressed_by("VideoLlava", "tempme")
    processor = compressed.host.processor
    before = (processor.tokenizer, dict(vars(processor)))
    compressed.prepare("why <image>", images=[picture(0)])
    assert processor.tokenizer is before[0] and vars(processor) == before[1]


@pytest.mark.parametrize("mode", ["L", "RGBA", "P"])
def test_images_of_other_modes_are_the_processors_to_convert(mode: str) -> None:
    image = picture(0).convert(mode)
    text = [prompt("InternVL", "why I")]
    own = shared("InternVL")[1](text=text, images=[[image]], return_tensors="pt")
    check_equals_the_host(compressed_by("InternVL", "tempme"), own, text, images=[[image]])
