"""Compression inside a tower or behind it, by any method, within a budget: every host, and counts known ahead."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from integrations import tiny, tiny_post
from torch import Tensor

from tempme_vl import METHODS
from tempme_vl.compressors import COMPRESSORS
from tempme_vl.integrations import Compressed, compress, load_compressed
from tempme_vl.integrations.in_encoder import with_prefix
from tempme_vl.integrations.videos import sample

BEHIND = [name for name, record in METHODS.items() if not isinstance(record.behind, str)]
BEHIND = [name for name in BEHIND if not {*METHODS[name].reads} & {"cls_rows", "column_sums"}]
INSIDE = [name for name, record in COMPRESSORS.items() if record.keep_inside is not None]  # in the language model
PLAIN = [name for name in tiny.MODELS if not name.startswith("InstructBlip")]
POST = [name for name in tiny_post.MODELS if tiny_post.NEEDS.get(name, True)]
HOSTS = [*PLAIN, *POST]
TOWERS = [name for name in POST if name.startswith("Qwen") and name != "Qwen2.5-Omni"]
FRAMES = 8

plain_model, post_model = cache(tiny.build), cache(tiny_post.build)


def model_of(name: str) -> tuple[Any, Any]:
    return plain_model(name) if name in PLAIN else post_model(name)


def few(name: str) -> int:
    """Tokens of a video; a frame of Gemma 4 has 64 or more."""
    return 130 if name.startswith("Gemma") else 60


def prompt(name: str) -> str:
    return tiny.ASK if name in PLAIN else f"what is in {tiny_post.placeholder(name)} and why"


def video(seed: int = 0) -> np.ndarray:
    """Half of it stands still, with a little noise."""
    rng = np.random.default_rng(seed)
    frames = rng.integers(0, 256, (FRAMES, 32, 32, 3))
    frames[:, :16] = frames[:1, :16]
    return np.clip(frames + rng.integers(-3, 4, frames.shape), 0, 255).astype(np.uint8)


def made(name: str, method: str, **options: Any) -> Compressed:
    return compress(*model_of(name), method, FRAMES, "behind", **options)


@torch.no_grad()
def ids_of(compressed: Compressed, text: str, frames: np.ndarray) -> list[int]:
    tokens = compressed.host.encode([sample(frames, FRAMES, 2.0)], [text])
    assert all(torch.isfinite(each.features).all() for each in tokens)
    return compressed.host.input_ids(text, tokens)


@torch.no_grad()
def logits(compressed: Compressed, text: Any, videos: Any) -> Tensor:
    return compressed(**compressed.prepare(text, videos, fps=2.0)).logits[:, -1]


@pytest.mark.parametrize("name", PLAIN)
def test_behind_a_plain_vit_nothing_changes_where_nothing_merges(name: str) -> None:
    whole, behind = compress(*model_of(name), "none", FRAMES), made(name, "none")
    assert torch.equal(logits(behind, prompt(name), [video()]), logits(whole, prompt(name), [video()]))
    assert behind.counts() == whole.counts() and behind.counts().ours == behind.counts().native


@pytest.mark.parametrize("name", HOSTS)
def test_counts_are_known_ahead_and_within_the_budget(name: str) -> None:
    ids = {}
    for method in [*BEHIND, *COMPRESSORS]:
        for limit in ({"budget": 0.5}, {"tokens": few(name)}):
            try:
                compressed = made(name, method, **limit)
                native, ours = compressed.counts((32, 32))
            except ValueError as error:
                assert any(
                    words in str(error)
                    for words in ("no options that", "follows from the video", "reads", "share", "works between")
                )
                continue
            most = int(0.5 * native) if "budget" in limit else few(name)
            found = ids_of(compressed, prompt(name), video()).count(compressed.host.token_id)
            if method in INSIDE:
                assert found == native and ours is None
                continue
            assert found == ours or ours is None, method
            assert 0 < found <= (1.6 * most if ours is None else most), method
            ids[method, most] = found
    assert {method for method, _ in ids} >= {"tempme", "tome", "random", "uniform", "pool", "evs", "vidcom2", "storm"}


@pytest.mark.parametrize("method", [*COMPRESSORS])
@pytest.mark.parametrize("name", HOSTS)
def test_every_compressor_answers_alone_and_in_a_batch(name: str, method: str) -> None:
    try:
        compressed = made(name, method, **({"budget": 0.5} if COMPRESSORS[method].takes_budget else {}))
    except ValueError as error:
        assert ("reads" in str(error) and "which that of" in str(error)) or "works between the layers" in str(error)
        return
    videos, text = [[video()], [video(1)]], [prompt(name), f"why {prompt(name)}"]
    batch = logits(compressed, text, videos)
    for row in range(2):
        single = logits(compressed, text[row], videos[row])
        torch.testing.assert_close(batch[row], single[0], rtol=0, atol=1e-4)
    assert "nothing is known ahead" in compressed.describe() or compressed.counts().ours is not None


@pytest.mark.parametrize("name", HOSTS)
def test_folders_come_back(name: str, tmp_path: Path) -> None:
    for number, (method, options) in enumerate(
        [("tempme", {"budget": 0.4}), ("tome", {"r": 2}), ("evs", {"tokens": few(name)}), ("vidcom2", {"exact": False})]
    ):
        compressed = made(name, method, **options)
        compressed.save_pretrained(tmp_path / str(number))
        again = load_compressed(tmp_path / str(number))
        assert again.host.config() == compressed.host.config() and again.counts() == compressed.counts()
        expected = logits(compressed, prompt(name), [video()])
        torch.testing.assert_close(logits(again, prompt(name), [video()]), expected)


def test_cls_tokens_stand_in_front_of_their_frames() -> None:
    """Also of a frame whose own tokens are all gone, or have merged into an earlier one's."""
    from tempme_vl.compressors import Clip, KeptFeatures

    prefix = torch.arange(4.0).reshape(4, 1, 1)
    left = KeptFeatures(
        torch.tensor([[10.0], [11.0], [30.0]]), torch.tensor([0, 1, 6]), (), (Clip(2, 0, 1), Clip(1, 3, 3))
    )
    assert with_prefix(left, prefix).flatten().tolist() == [0, 1, 10, 11, 2, 3, 30]


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(ValueError, match=r"where is one of 'auto', 'tower', 'behind'; got 0.5"):
        compress(*model_of("VideoLlava"), "tempme", FRAMES, 0.5)
    with pytest.raises(ValueError, match="num_frames counts the frames of every video, 1 or more; got 0"):
        compress(*model_of("VideoLlava"), "tempme", 0)
    with pytest.raises(ValueError, match="give a budget or a number of tokens"):
        made("VideoLlava", "tempme", budget=0.5, tokens=3)
    with pytest.raises(ValueError, match=r"budget is the share .* 0 to 1; got 44"):
        made("VideoLlava", "tempme", budget=44)
    with pytest.raises(ValueError, match="tokens counts the visual tokens"):
        made("VideoLlava", "tempme", tokens=0)
    with pytest.raises(ValueError, match=r"expected where='behind' or 'auto'"):
        compress(*model_of("VideoLlava"), "evs", FRAMES, "tower")
    with pytest.raises(ValueError, match=r"nothing merges inside the tower of InternVL"):
        compress(*model_of("InternVL"), "tempme", FRAMES, "tower")
    with pytest.raises(ValueError, match="Q-Former gives a fixed number of tokens"):
        compress(*tiny.build("InstructBlipVideo"), "evs", FRAMES)
    with pytest.raises(ValueError, match=r"unknown method 'other'; expected one of none, .*evs"):
        made("VideoLlava", "other")
    with pytest.raises(ValueError, match=r"where 'evs' takes retention; got q"):
        made("VideoLlava", "evs", q=0.5)
    with pytest.raises(ValueError, match="'none' behind a tower has no options that a budget"):
        made("VideoLlava", "none", budget=0.5)
    with pytest.raises(ValueError, match="cannot be reached by testa behind a tower"):
        made("InternVL", "testa", tokens=1).counts()


def test_a_limit_out_of_reach_is_told_with_the_tokens_that_always_stay() -> None:
    def left(tokens: int) -> int | None:
        host = model_of("VideoLlava")
        return compress(*host, "tempme", FRAMES, "behind", tokens=tokens, cross_percent=40).counts().ours

    with pytest.raises(
        ValueError, match=rf"^{FRAMES + 2} tokens .* and {FRAMES} that always stay .* lowest is "
    ) as caught:
        left(FRAMES + 2)
    lowest = int(str(caught.value).rpartition(" ")[2])
    assert left(lowest) == lowest
    for few in (1, FRAMES):
        with pytest.raises(ValueError, match=rf"^{few} tokens cannot be reached: .* {FRAMES} always stay"):
            left(few)


# ---- inside towers that need their grid


def inside(name: str, **options: Any) -> Compressed:
    return compress(*model_of(name), "tempme", FRAMES, "tower", **options)


def tall(seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (FRAMES, 32, 48, 3), dtype=np.uint8)


@pytest.mark.parametrize("name", TOWERS)
def test_inside_a_tower_nothing_changes_where_nothing_merges(name: str, tmp_path: Path) -> None:
    model, processor = model_of(name)
    whole = made(name, "none")
    expected = logits(whole, prompt(name), [tall()])
    plain = compress(model, processor, "none", FRAMES, "tower")
    plain.save_pretrained(tmp_path)
    for ours in (inside(name, budget=1.0), plain, load_compressed(tmp_path)):
        assert ours.counts() == (whole.counts().native,) * 2
        found = logits(ours, prompt(name), [tall()])
        if ours.model is model:
            assert torch.equal(found, expected)
        else:  # experts whose weights lie elsewhere in memory round differently
            torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("name", TOWERS)
def test_inside_a_tower_counts_batches_and_folders(name: str, tmp_path: Path) -> None:
    for options in ({}, {"budget": 0.44}, {"tokens": 12}, {"budget": 0.3, "attend": "clip"}, {"steps": [(1, 2, 2)]}):
        compressed = inside(name, **options)
        native, ours = compressed.counts((32, 48))
        found = ids_of(compressed, prompt(name), tall()).count(compressed.host.token_id)
        assert found == ours and ours is not None and ours < native
        assert compressed.host.costs((32, 48)).tower < compressed.host.costs((32, 48)).native_tower
        if "budget" in options:
            assert 0.7 * options["budget"] * native < ours <= options["budget"] * native
    text, videos = [prompt(name), f"why {prompt(name)} {prompt(name)}"], [[tall()], [video(1), tall(2)]]
    batch = logits(compressed, text, videos)
    for row in range(2):
        torch.testing.assert_close(batch[row], logits(compressed, text[row], [videos[row]])[0], rtol=0, atol=1e-4)
    compressed.save_pretrained(tmp_path)
    again = load_compressed(tmp_path)
    assert again.host.config() == compressed.host.config()
    torch.testing.assert_close(logits(again, text, videos), batch)


@pytest.mark.parametrize("name", TOWERS)
def test_auto_is_inside_a_tower_unless_options_are_of_behind(name: str) -> None:
    model, processor = model_of(name)
    places = [
        compress(model, processor, method, FRAMES, **options).host.config().get("where", "behind")
        for method, options in (("tempme", {}), ("tempme", {"merge_frames": (2, 2)}), ("tome", {}), ("evs", {}))
    ]
    assert places == ["tower", "behind", "behind", "behind"]
    with pytest.raises(ValueError, match=r"'tempme' takes steps, attend, compare; got merge_frames. Options of"):
        inside(name, merge_frames=(2, 2))
    with pytest.raises(ValueError, match=r"'tempme' merges along time; got 'tome': expected where='behind' or 'auto'"):
        compress(model, processor, "tome", FRAMES, "tower")
    with pytest.raises(ValueError, match="expected steps, or a budget or tokens that they follow from; got both"):
        inside(name, steps=[(1, 2, 2)], budget=0.5)


@pytest.mark.parametrize("name", TOWERS)
def test_gradients_reach_a_tower_that_merges_inside(name: str) -> None:
    model, processor = tiny_post.build(name)
    compressed = compress(model, processor, "tempme", FRAMES, "tower", budget=0.4)
    losses = []
    for recompute in (False, True):
        compressed.host.set_grad_checkpointing(recompute)
        loss = compressed(**compressed.prepare(prompt(name), [tall()], labels=True, fps=2.0)).loss
        loss.backward()
        losses.append(loss.detach())
    first = model.model.visual.blocks[0].attn.qkv.weight
    assert first.grad is not None and first.grad.abs().max() > 0 and torch.equal(*losses)


@tiny.hosts([name for name in ("Qwen2.5-Omni", "GLM-4.1V", "GLM-4.6V") if name in POST])
def test_other_towers_stay_whole(name: str) -> None:
    with pytest.raises(ValueError, match="expected a tower with the forward of"):
        compress(*model_of(name), "tempme", FRAMES, "tower")
    assert compress(*model_of(name), "tempme", FRAMES).host.config().get("where", "behind") == "behind"


@pytest.mark.parametrize("name", [name for name in POST if name == "Qwen2.5-VL"])
def test_a_limit_that_usual_frames_cannot_reach_is_left_to_the_videos(
    name: str, caplog: pytest.LogCaptureFixture
) -> None:
    model, processor = tiny_post.build(name)
    processor.video_processor.size = {"shortest_edge": 64, "longest_edge": 10**7}
    compressed = compress(model, processor, "dycoke", FRAMES, "behind", tokens=20)
    assert "of frames of a usual size: " in caplog.text and "every fourth frame stays whole" in caplog.text
    with pytest.raises(ValueError, match="every fourth frame stays whole"):
        compressed.counts((360, 640))
    native, ours = compressed.counts((32, 32))
    assert ours is not None and ours <= 20 < native
