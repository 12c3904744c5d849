"""What compressors read of a tower is what the tower's own attention says."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
import transformers
from integrations import tiny, tiny_post
from torch import Tensor
from torchvision.transforms import InterpolationMode
from torchvision.transforms.functional import resize

from tempme_vl.compressors import FrameFeatures
from tempme_vl.integrations import compress
from tempme_vl.integrations.videos import sample

FRAMES = 4
QWEN = [
    name for name in tiny_post.NEEDS if tiny_post.NEEDS[name] and name.startswith("Qwen") and name != "Qwen2.5-Omni"
]


def video() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (FRAMES, 32, 32, 3), dtype=np.uint8)


def features_seen(compressed: Any, prompt: str, monkeypatch: pytest.MonkeyPatch) -> FrameFeatures:
    """What the method behind the tower gets of a video."""
    seen: list[FrameFeatures] = []
    own = compressed.host.reduction.reduce
    monkeypatch.setattr(
        compressed.host.reduction, "reduce", lambda frames, *of: (seen.append(frames), own(frames, *of))[1]
    )
    with torch.no_grad():
        compressed.host.encode([sample(video(), FRAMES, 2.0)], [prompt])
    return seen[0]


@pytest.mark.parametrize("name", ["VideoLlava", "LlavaNextVideo", "LlavaOnevision"])
def test_plain_vits(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Beside attention weights that the library itself gives."""
    model, processor = tiny.build(name)
    found = features_seen(compress(model, processor, "visionzip", FRAMES, budget=0.5), tiny.ASK, monkeypatch)
    host = compress(model, processor, "none", FRAMES).host
    tower = host.tower
    tower.set_attn_implementation("eager")
    with torch.no_grad():
        output = tower(host.pixels([sample(video(), FRAMES)])[0], output_attentions=True)
    received = output.attentions[model.config.vision_feature_layer].mean((1, 2))
    prefix = received.shape[1] - 16
    received = received[:, prefix:].unsqueeze(-1)
    pooled = {
        "VideoLlava": lambda x: x,
        "LlavaNextVideo": lambda x: model.model.vision_resampler(x),
        "LlavaOnevision": lambda x: model.model.apply_pooling(x),
    }[name](received)
    assert found.received is not None and found.keys is not None
    torch.testing.assert_close(found.received, pooled.squeeze(-1), rtol=0, atol=1e-6)
    assert found.keys.shape[:2] == found.received.shape and found.keys.shape[2] == 16


@pytest.mark.parametrize("name", QWEN)
def test_qwen(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Beside the weights of an attention function that keeps them, of the last block, in the order of the pixels."""
    model, processor = tiny_post.build(name)
    prompt = f"what {tiny_post.placeholder(name)}"
    found = features_seen(compress(model, processor, "visionzip", FRAMES, budget=0.5), prompt, monkeypatch)
    summed = features_seen(compress(model, processor, "fastvid", FRAMES, budget=0.5), prompt, monkeypatch)
    weights: list[Tensor] = []
    keys: list[Tensor] = []

    def keeping(module: Any, query: Tensor, key: Tensor, value: Tensor, scaling: float, **_: Any) -> Any:
        weights.append((query @ key.mT * scaling).softmax(-1))
        keys.append(key)
        return (weights[-1] @ value).transpose(1, 2), None

    transformers.AttentionInterface.register("keeping", keeping)
    model.model.visual.config._attn_implementation = "keeping"
    inputs = processor.video_processor(videos=[video()], do_sample_frames=False, return_tensors="pt")
    slots, rows, columns = inputs["video_grid_thw"][0].tolist()
    with torch.no_grad():
        model.model.get_video_features(inputs["pixel_values_videos"], inputs["video_grid_thw"])
    last, last_keys = torch.cat(weights[-slots:]), torch.cat(keys[-slots:])  # (T, heads, P, P): one call a frame
    received = last.mean((1, 2)).unflatten(1, (-1, 4)).mean(-1)
    if hasattr(model.model.visual, "fullatt_block_indexes"):
        from transformers.vision_utils import get_vision_window_index

        order, _ = get_vision_window_index(
            inputs["video_grid_thw"], 2, model.model.visual.window_size, model.model.visual.patch_size
        )
        back = order.argsort()[: rows * columns // 4]
        received, last_keys = received[:, back], last_keys.unflatten(2, (-1, 4))[:, :, back].flatten(2, 3)
    assert found.received is not None and found.keys is not None and summed.summary is not None
    torch.testing.assert_close(found.received, received, rtol=0, atol=1e-6)
    torch.testing.assert_close(found.keys, last_keys.mean(1).unflatten(1, (-1, 4)).mean(2), rtol=0, atol=1e-5)
    torch.testing.assert_close(summed.summary[0], summed.x.mean(1))
    assert summed.summary[1].sum(1).allclose(torch.ones(slots)) and summed.summary[1].std() > 1e-3


def test_pixels_of_qwen_are_those_of_the_frames(monkeypatch: pytest.MonkeyPatch) -> None:
    model, processor = tiny_post.build(QWEN[0])
    compressed = compress(model, processor, "dtd", FRAMES, by="pixel")
    found = features_seen(compressed, f"what {tiny_post.placeholder(QWEN[0])}", monkeypatch)
    assert found.pixels is not None
    rows, columns = found.grid
    values = processor.video_processor(videos=[video()], do_sample_frames=False, return_tensors="pt")
    height, width = (4 * int(side) for side in values["video_grid_thw"][0, 1:])
    frame = torch.from_numpy(video()[2]).permute(2, 0, 1).unsqueeze(0)
    frame = resize(frame, [height, width], InterpolationMode.BICUBIC)[0] / 255  # as the processor does it
    token = frame[:, : height // rows, : width // columns]
    assert found.pixels.shape[:3] == (FRAMES // 2, rows * columns, 2)
    got, expected = (values.flatten().sort().values for values in (found.pixels[1, 0, 0], token))
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-5)
