"""Videos encoded part by part, and as streams: the tokens of all frames at once, from fewer frames at a time."""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from integrations import tiny, tiny_post
from torch import Tensor

from tempme_vl import METHODS
from tempme_vl.compressors import COMPRESSORS
from tempme_vl.integrations import Compressed, Stream, VisualTokens, compress, load_compressed
from tempme_vl.integrations.parts import cut_up, same_size
from tempme_vl.integrations.videos import sample

FRAMES = 12
JOINS = {"merge_layers": (1, 2), "merge_frames": (2, 2)}
TEMPME: dict[str, Any] = {"r": 2, **JOINS, "cross_percent": 30, "intra_percent": 10}
INSIDE: dict[str, dict[str, Any]] = {
    "none": {},
    "tempme": TEMPME,
    "tome": {"r": 2},
    "evit": {"keep_rate": 0.7},
    "diffrate": {"tokens": 60},
    "temporal_only": JOINS,
    "reduction_only": {name: value for name, value in TEMPME.items() if name != "merge_frames"},
    "centerclip": {"tokens": 60},
    "uniform": {"drop": 5},
    "pool": {"side": 2, "join": 3},
}
STEPS = {"steps": [(1, 2, 1), (2, 4, 2)]}  # inside a Qwen tower: clips of 4 slots, thus 8 frames
PLAIN = list(tiny.MODELS)
POST = [name for name in tiny_post.MODELS if tiny_post.NEEDS.get(name, True)]
SOME = [name for name in ("Qwen2.5-VL", "Qwen3-VL", "VideoLLaMA 3", "SmolVLM") if name in POST]
TOWERS = [name for name in ("Qwen2-VL", "Qwen2.5-VL", "Qwen3-VL") if name in POST]

pytestmark = pytest.mark.filterwarnings("ignore:.*nobody said so")
plain_model, post_model = cache(tiny.build), cache(tiny_post.build)


def model_of(name: str) -> tuple[Any, Any]:
    return plain_model(name) if name in PLAIN else post_model(name)


def video(frames: int = FRAMES, height: int = 32, width: int = 32) -> np.ndarray:
    """Half of it stands still, with a little noise."""
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (frames, height, width, 3))
    pixels[:, :16] = pixels[:1, :16]
    return np.clip(pixels + rng.integers(-3, 4, pixels.shape), 0, 255).astype(np.uint8)


def pair(name: str, method: str, at_once: int, frames: int = FRAMES, **options: Any) -> tuple[Compressed, Compressed]:
    """Compressed alike, but for how much the tower sees at once; learnt positions are not 0."""
    whole = compress(*model_of(name), method, frames, clip_position_std=0.5, **options)
    parts = compress(*model_of(name), method, frames, frames_at_once=at_once, **options)
    parts.merging.load_state_dict(whole.merging.state_dict())
    return whole, parts


@torch.no_grad()
def encoded(compressed: Compressed, pixels: np.ndarray) -> VisualTokens:
    frames = sample(pixels, compressed.host.num_frames, 2.0)
    return compressed.host.encode([frames], [f"what is in {compressed.placeholder}"])[0]


def streamed(compressed: Compressed, pixels: np.ndarray, portion: int = 5) -> tuple[Stream, list[int]]:
    """With the number of tokens that each portion gave."""
    stream = compressed.stream(fps=2.0)
    found = [stream.add(pixels[start : start + portion]) for start in range(0, len(pixels), portion)]
    return stream, [0 if tokens is None else len(tokens.features) for tokens in found]


def assert_same(found: VisualTokens, expected: VisualTokens, exact: bool = False) -> None:
    """In the same places of the prompt, and bit for bit or as good as that: a product of few rows may be summed in
    another order than one of many."""
    known, wanted = dict(found.extra), dict(expected.extra)
    levels = zip(
        [found.features, *known.pop("deeper", ())], [expected.features, *wanted.pop("deeper", ())], strict=True
    )
    for level, whole in levels:
        torch.testing.assert_close(level, whole, rtol=0, atol=0 if exact else 1e-6 * float(whole.abs().max()))
    assert known == wanted


@contextmanager
def frames_seen(compressed: Compressed) -> Iterator[list[int]]:
    """Frames that come into the host's preprocessing at a time, where they are pixels."""
    seen: list[int] = []
    host: Any = compressed.host
    own = host.preprocess

    def preprocess(videos: Any, **options: Any) -> Any:
        seen.extend(len(each) for each in videos if getattr(each, "device", None) != torch.device("meta"))
        return own(videos, **options)

    host.preprocess = preprocess
    yield seen
    del host.preprocess


def test_all_methods_that_cut_are_tried() -> None:
    assert set(INSIDE) == {name for name, method in METHODS.items() if method.apart}


@pytest.mark.parametrize("method", INSIDE)
def test_parts_inside_a_plain_vit(method: str) -> None:
    """Cut between the clips of its last block: 5 frames at once are 4 where 4 become one clip, and 3 of 3."""
    whole, parts = pair("VideoLlava", method, 5, **INSIDE[method])
    sizes = {"tempme": [4, 4, 4], "temporal_only": [4, 4, 4], "pool": [3, 3, 3, 3], "none": [5, 5, 2]}
    expected = encoded(whole, video())
    with frames_seen(parts) as seen:
        assert_same(encoded(parts, video()), expected, exact=True)
    assert seen == sizes[method] if method in sizes else max(seen) <= 5
    stream, _ = streamed(parts, video())
    assert_same(stream.finish(), expected, exact=True)


@pytest.mark.parametrize("name", PLAIN)
def test_parts_of_every_plain_vit(name: str) -> None:
    for method, where in (("tempme", "auto"), ("none", "auto"), ("tempme", "behind"), ("dycoke", "behind")):
        if name == "InstructBlipVideo" and where == "behind":
            continue
        whole, parts = pair(name, method, 4, where=where, **(TEMPME if where == "auto" and method == "tempme" else {}))
        with frames_seen(parts) as seen:
            assert_same(encoded(parts, video()), encoded(whole, video()))
        assert seen == [4, 4, 4]


@pytest.mark.parametrize("method", ["holitom", "fastvid", "flashvid", "visionzip"])
def test_what_compressors_read_is_joined(method: str) -> None:
    """Attention, keys and summaries of the parts' last blocks."""
    assert COMPRESSORS[method].keep is not None
    for name in ("VideoLlava", *(name for name in ("Qwen2.5-VL",) if name in POST)):
        whole, parts = pair(name, method, 4, where="behind", budget=0.5)
        assert_same(encoded(parts, video()), encoded(whole, video()))


@pytest.mark.parametrize(("name", "method"), [*((name, "none") for name in POST), *product(SOME, ("tempme", "evs"))])
def test_parts_behind_a_tower(name: str, method: str) -> None:
    """Four frames at once, or two slots; 11 frames, of which the last is alone in its slot, where nothing is joined."""
    frames = 11 if method == "none" else 16
    options: dict[str, Any] = {"tempme": {"merge_frames": [2]}}.get(method, {})
    whole, parts = pair(name, method, 4, frames, where="behind", **options)
    expected = encoded(whole, video(frames))
    assert_same(encoded(parts, video(frames)), expected)
    if method != "evs":
        stream, counts = streamed(parts, video(frames))
        assert_same(stream.finish(), expected)
        assert all(counts[:-1])


@pytest.mark.parametrize("name", TOWERS)
def test_parts_inside_a_qwen_tower(name: str) -> None:
    """Clips of 4 slots; the last one is short, its last slot too."""
    whole, parts = pair(name, "tempme", 9, 27, where="tower", **STEPS)
    expected = encoded(whole, video(27))
    with frames_seen(parts) as seen:
        assert_same(encoded(parts, video(27)), expected)
    assert seen == [8, 8, 8, 4]
    stream, counts = streamed(parts, video(27))
    assert [count > 0 for count in counts] == [False, True, False, True, True, False]
    assert_same(stream.finish(), expected)


@pytest.mark.parametrize("where", ["tower", "behind"])
@pytest.mark.parametrize("name", ["VideoLlava", *TOWERS[1:2]])
def test_a_limit_is_that_of_the_whole_video(name: str, where: str) -> None:
    """A part by itself would keep as many tokens as all of it."""
    if (name, where) == ("VideoLlava", "tower"):
        limit: dict[str, Any] = {"tokens": 150, **JOINS}
    else:
        limit = {"tokens": 150 if name == "VideoLlava" else 64}
    whole, parts = pair(name, "tempme", 16, 32, where=where, **limit)
    expected = encoded(whole, video(32))
    assert 0.8 * limit["tokens"] < len(expected.features) <= limit["tokens"]
    with frames_seen(parts) as seen:
        assert_same(encoded(parts, video(32)), expected)
    assert seen == [16, 16]


@pytest.mark.parametrize("limits", [(64, 1024), (64, 12 * 700), (12 * 2500, 1 << 20)])
@pytest.mark.parametrize(
    "name", [name for name in ("Qwen2.5-VL", "Qwen3-VL", "GLM-4.1V", "VideoLLaMA 3") if name in POST]
)
def test_frames_of_parts_are_as_large_as_in_the_whole(name: str, limits: tuple[int, int]) -> None:
    """Where limits of pixels make frames smaller or larger, of each frame or of all together."""
    host = compress(*model_of(name), "none", FRAMES).host
    size = dict(zip(("shortest_edge", "longest_edge"), limits, strict=True))

    def preprocess(videos: Any, **options: Any) -> Any:
        return host.preprocess(videos, **{"size": size, **options})

    whole = sample(video(FRAMES, 40, 60), FRAMES)
    found = []
    for _, part in cut_up(whole, 4):
        found.append(preprocess([part.frames], **same_size(preprocess, part, size))["pixel_values_videos"])
    assert torch.equal(torch.cat(found), preprocess([whole.frames])["pixel_values_videos"])


def test_a_size_that_no_limits_give() -> None:
    def preprocess(videos: Any, size: object = None) -> dict[str, Tensor]:
        side = len(videos[0])
        return {"video_grid_thw": torch.tensor([[1, side, side]])}

    part = sample(video(), FRAMES).part(0, 4, FRAMES)
    with pytest.raises(ValueError, match="12 frames of this video become 12 x 12 patches each, and 4 of them alone do"):
        same_size(preprocess, part, {"shortest_edge": 1, "longest_edge": 2})


def test_a_clip_that_is_larger_is_said_once() -> None:
    whole, parts = pair("VideoLlava", "tempme", 3, **TEMPME)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("default")
        for _ in range(2):
            found = encoded(parts, video())
    (one,) = (str(one.message) for one in said)
    assert "a clip of the last block holds 4 frames" in one and "ask for frames_at_once=4" in one
    assert_same(found, encoded(whole, video()))


def test_gradients_are_refused_where_they_are_wanted() -> None:
    _, parts = pair("VideoLlava", "tempme", 4, **TEMPME)
    with pytest.raises(ValueError, match=r"frames_at_once=4 encodes part by part .* prepare under torch.no_grad\(\)"):
        parts.prepare(tiny.ASK, [video()])
    assert len(parts.answer(tiny.ASK, [video()], max_new_tokens=2)) == 1


@pytest.mark.parametrize("name", ["VideoLlava", *TOWERS[1:2]])
def test_a_folder_keeps_it(name: str, tmp_path: Path) -> None:
    for where in ("tower", "behind"):
        options = TEMPME if (name, where) == ("VideoLlava", "tower") else {}
        whole, parts = pair(name, "tempme", 16, 16, where=where, **options)
        parts.save_pretrained(tmp_path / where)
        again = load_compressed(tmp_path / where)
        assert again.host.frames_at_once == 16
        assert_same(encoded(again, video(16)), encoded(parts, video(16)))
        whole.save_merging(tmp_path / f"{where} whole")
        assert "frames_at_once" not in json.loads((tmp_path / f"{where} whole" / "tempme.json").read_text())


@pytest.mark.parametrize("method", ["sta", "testa", "random"])
def test_methods_that_look_at_all_frames_are_refused(method: str) -> None:
    with pytest.raises(ValueError, match=rf"what '{method}' makes of a frame .* by one of none, tome, tempme"):
        compress(*model_of("VideoLlava"), method, FRAMES, tokens=60, frames_at_once=4)
    with pytest.raises(ValueError, match=rf"what '{method}' makes of a frame"):
        compress(*model_of("VideoLlava"), method, FRAMES, tokens=60).stream()
    whole, parts = pair("VideoLlava", method, 4, where="behind")  # which sees all features
    assert_same(encoded(parts, video()), encoded(whole, video()))
    with pytest.raises(ValueError, match=rf"what '{method}' makes of a frame"):
        parts.stream()


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(
        ValueError, match="frames_at_once counts frames that the tower sees at a time, 1 or more; got 0"
    ):
        compress(*model_of("VideoLlava"), "tempme", FRAMES, frames_at_once=0, **TEMPME)
    with pytest.raises(ValueError, match=r"'evs' looks at the features of all frames .* one of none, tome, tempme"):
        compress(*model_of("VideoLlava"), "evs", FRAMES).stream()
    with pytest.raises(ValueError, match="Q-Former reads a video with its prompt"):
        compress(*model_of("InstructBlipVideo"), "none", FRAMES).stream()
    compressed = compress(*model_of("VideoLlava"), "tempme", FRAMES, **TEMPME)
    stream = compressed.stream()
    with pytest.raises(ValueError, match="expected frames before the end of a stream"):
        stream.finish()
    stream.add(video(2))
    with pytest.raises(ValueError, match=r"expected frames of \(32, 32, 3\) as before; got \(32, 40, 3\)"):
        stream.add(video(2, 32, 40))
    with pytest.raises(ValueError, match="expected times of all frames of a stream, or of none"):
        stream.add(video(2), times=[0, 1])
    timed = compressed.stream()
    timed.add(video(2), times=[0, 1])
    with pytest.raises(ValueError, match="expected times of all frames of a stream"):
        timed.add(video(2))
    with pytest.raises(ValueError, match="expected times of 3 frames in seconds, finite and ascending"):
        timed.add(video(2), times=[0.5, 2])
    other = compress(*model_of("VideoLlava"), "tempme", FRAMES, **TEMPME)
    with pytest.raises(ValueError, match=r"expected streams of this compressed model"), torch.no_grad():
        other.prepare(tiny.ASK, [stream])


@torch.no_grad()
@pytest.mark.parametrize("name", ["VideoLlava", *TOWERS[1:3]])
def test_a_stream_stands_in_a_prompt(name: str) -> None:
    """Beside a video, and asked before it ends."""
    options = TEMPME if name == "VideoLlava" else {"where": "tower", **STEPS}
    compressed = compress(*model_of(name), "tempme", FRAMES, **options)
    place, times = compressed.placeholder, [0.5 * number for number in range(FRAMES)]
    text = f"what is in {place} and in {place} ?"
    stream = compressed.stream()
    for start in range(0, FRAMES, 5):
        stream.add(video()[start : start + 5], times[start : start + 5])
        compressed.prepare(f"why {place} ?", [stream])
    found = compressed(**compressed.prepare(text, [video(), stream], times=[times])).logits
    expected = compressed(**compressed.prepare(text, [video(), video()], times=[times, times])).logits
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


def test_a_longer_stream_goes_on() -> None:
    """With the clip positions of the first frames again; a short last clip is that of its last frame held."""
    compressed, _ = pair("VideoLlava", "tempme", 4, **TEMPME)
    stream, counts = streamed(compressed, np.concatenate([video(), video()[:5]]), 4)
    found, first = stream.finish().features, encoded(compressed, video()).features
    held = video()[[0, 1, 2, 3, 4, 4, 4, 4, *range(8, 12)]]
    again = encoded(compressed, held).features[: 2 * counts[0]]
    assert torch.equal(found, torch.cat([first, again]))
