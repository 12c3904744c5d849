"""Families with a text side train for retrieval: features are the library's own, and a new family is a record."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import open_clip
import pytest
import torch
from models import SIDE, WORDS, add_open_clip, save_hf
from torch import Tensor, nn

from tempme_vl import FAMILIES, VisualFrontend, create_frontend, create_retrieval_model, load_retrieval_model
from tempme_vl.families import open_clip as clip_family
from tempme_vl.pipeline import VideoRetrieval
from tempme_vl.tasks.retrieval import RetrievalModel

TEXTS = ("A red ball moves", "a cube")
MERGING: dict[str, Any] = {"r": 1, "merge_layers": (1, 2), "merge_frames": (2, 2)}
MERGING |= {"cross_percent": 20, "intra_percent": 10}
HF = ("clip", "siglip", "siglip2")


def pooled(output: Any) -> Tensor:
    return getattr(output, "pooler_output", output)


def tokens(model: RetrievalModel) -> tuple[Tensor, Tensor]:
    tokenize = model.words.tokenizer(model.text.max_words(32))
    ids, mask = zip(*map(tokenize, TEXTS), strict=True)
    return torch.stack(ids), torch.stack(mask)


def batch(model: RetrievalModel) -> dict[str, Tensor]:
    ids, mask = tokens(model)
    frames = model.frontend.schedule.frames
    video = torch.randn(2, frames, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(1))
    video[1] = video[1] * 0.1 + 1.0
    given = {"video": video, "frame_mask": torch.ones(2, frames), "text_ids": ids, "text_mask": mask}
    return {**given, "video_id": torch.arange(2), "text_id": torch.arange(2), "valid": torch.ones(2)}


def both(model: nn.Module, given: Mapping[str, Tensor]) -> Tensor:
    with torch.no_grad():
        features = model.eval()(given)
    return torch.cat([features["video"], features["text"]])


def learns(model: RetrievalModel, rate: float = 0.003) -> None:
    """Two pairs."""
    torch.nn.init.constant_(model.logit_scale.log_scale, 2.0)
    given, trained = batch(model), [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=rate)
    losses = []
    for _ in range(40):
        loss = model.train().loss(model(given), given)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0], losses


def comes_back(model: RetrievalModel, folder: Path) -> None:
    given = batch(model)
    model.save_pretrained(folder)
    again = load_retrieval_model(folder)
    assert isinstance(again, RetrievalModel)
    torch.testing.assert_close(both(again, given), both(model, given), rtol=0, atol=1e-6)
    assert all(torch.equal(a, b) for a, b in zip(tokens(again), tokens(model), strict=True))


@pytest.mark.parametrize("kind", HF)
def test_features_are_those_of_transformers(kind: str, tmp_path: Path) -> None:
    host = save_hf(kind, tmp_path)
    model = create_retrieval_model(f"hf:{tmp_path}", "default", "none", 2).eval()
    ids, mask = tokens(model)
    assert ids.shape == (2, WORDS)
    words = {"attention_mask": mask} if kind == "clip" else {}
    with torch.no_grad():
        texts = pooled(host.get_text_features(input_ids=ids, **words))
        assert torch.equal(model.text(ids, mask), texts)
        video = torch.randn(1, 2, 3, SIDE, SIDE)
        if kind == "siglip2":
            patches = video[0].unfold(2, 4, 4).unfold(3, 4, 4).permute(0, 2, 3, 4, 5, 1).flatten(3).flatten(1, 2)
            side = torch.full((2, 2), SIDE // 4)
            seen = {"pixel_attention_mask": torch.ones(2, (SIDE // 4) ** 2), "spatial_shapes": side}
            images = pooled(host.get_image_features(pixel_values=patches, **seen))
        else:
            images = pooled(host.get_image_features(pixel_values=video[0]))
        torch.testing.assert_close(model.frontend(video).frames[0], images, rtol=1e-5, atol=1e-5)
    assert model.logit_scale().item() == pytest.approx(min(100.0, host.logit_scale.exp().item()))


@pytest.mark.parametrize("kind", HF)
def test_models_of_transformers_learn_and_come_back(kind: str, tmp_path: Path) -> None:
    save_hf(kind, tmp_path / "host")
    model = create_retrieval_model(f"hf:{tmp_path / 'host'}", "default", "tempme", 4, **MERGING)
    learns(model)
    comes_back(model, tmp_path / "out")
    second = create_retrieval_model(f"hf:{tmp_path / 'host'}", str(tmp_path / "out"), "tempme", 4, **MERGING)
    assert torch.equal(both(second, batch(model)), both(load_retrieval_model(tmp_path / "out"), batch(model)))


def test_lora_is_on_queries_keys_and_values_of_both_towers(tmp_path: Path) -> None:
    save_hf("siglip", tmp_path / "host")
    model = create_retrieval_model(f"hf:{tmp_path / 'host'}", "default", "tempme", 4, "lora", **MERGING)
    layers = {name.split(".lora_")[0] for name, p in model.named_parameters() if p.requires_grad and ".lora_" in name}
    assert len(layers) == 3 * (3 + 2)  # blocks of both towers
    learns(model, rate=0.02)
    comes_back(model, tmp_path / "out")


def test_towers_of_timm_in_open_clip(tmp_path: Path) -> None:
    torch.manual_seed(0)
    add_open_clip("nano-siglip", tmp_path)
    host = open_clip.create_model("nano-siglip").eval()
    torch.save(host.state_dict(), tmp_path / "host.pt")
    model = create_retrieval_model("open_clip:nano-siglip", str(tmp_path / "host.pt"), "none", 2).eval()
    ids, mask = tokens(model)
    assert ids.shape == (2, WORDS) and torch.equal(ids, open_clip.get_tokenizer("nano-siglip")(list(TEXTS)))
    video = torch.randn(1, 2, 3, SIDE, SIDE)
    with torch.no_grad():
        torch.testing.assert_close(model.text(ids, mask), host.encode_text(ids), rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(model.frontend(video).frames[0], host.encode_image(video[0]), rtol=1e-5, atol=1e-6)
    with pytest.raises(ValueError, match=rf"L = {WORDS}; got \(2, 4\)"):
        model.text(ids[:, :4], mask[:, :4])

    merged = create_retrieval_model("open_clip:nano-siglip", str(tmp_path / "host.pt"), "tempme", 4, **MERGING)
    learns(merged)
    comes_back(merged, tmp_path / "out")
    second = create_retrieval_model("open_clip:nano-siglip", str(tmp_path / "out"), "tempme", 4, **MERGING)
    assert torch.equal(both(second, batch(merged)), both(load_retrieval_model(tmp_path / "out"), batch(merged)))
    with pytest.raises(ValueError, match=r"OpenAI's names are those of CLIP"):
        merged.openai_state_dict()


def test_a_tower_of_timm_beside_clips_own_text(tmp_path: Path) -> None:
    torch.manual_seed(0)
    add_open_clip("nano-mixed", tmp_path, siglip=False)
    model = create_retrieval_model("open_clip:nano-mixed", None, "tempme", 4, "lora", **MERGING)
    learns(model)
    comes_back(model, tmp_path / "out")
    front = VisualFrontend.from_pretrained(tmp_path / "out")
    video = torch.randn(1, 4, 3, SIDE, SIDE)
    with torch.no_grad():
        expected = load_retrieval_model(tmp_path / "out").eval().frontend(video).pooled
        assert torch.equal(front.eval()(video).pooled, expected)


def test_a_text_is_encoded_without_a_video(tmp_path: Path) -> None:
    save_hf("siglip2", tmp_path / "host")
    create_retrieval_model(f"hf:{tmp_path / 'host'}", "default", "none", 2).save_pretrained(tmp_path / "out")
    found = VideoRetrieval.from_pretrained(tmp_path / "out").encode_text(TEXTS)
    assert found.shape == (2, 16) and torch.allclose(found.norm(dim=1), torch.ones(2))


def test_no_text_side_and_no_words_are_said(tmp_path: Path) -> None:
    import transformers

    config = transformers.Dinov2Config(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=16)
    transformers.Dinov2Model(config).save_pretrained(tmp_path / "dino")
    with pytest.raises(ValueError, match=r"is a 'dinov2' .*no text tower of it is known; .* clip, siglip, siglip2"):
        create_retrieval_model(f"hf:{tmp_path / 'dino'}", "default")
    save_hf("clip", tmp_path / "clip")
    for file in (tmp_path / "clip").glob("*token*"):
        file.unlink()
    with pytest.raises(ValueError, match=r"expected a tokenizer \(tokenizer.json, .* in .*clip"):
        create_retrieval_model(f"hf:{tmp_path / 'clip'}", "default")


@dataclass(frozen=True, kw_only=True)
class ToyConfig(clip_family.models.Config):
    family: Any = "toy"


def toy_config(config: clip_family.models.Config, name: str) -> ToyConfig:
    return ToyConfig(**{**vars(config), "family": "toy", "name": name})


def toy_tower(name: str, pretrained: str | None, num_frames: int) -> tuple[Any, ToyConfig]:
    backbone, config = clip_family.towers.load_tower("tiny", pretrained, num_frames)
    return backbone, toy_config(config, name)


def toy_pair(name: str, pretrained: str | None, num_frames: int) -> Any:
    pair = clip_family.load_pair("tiny", pretrained, num_frames)
    return replace(pair, config=toy_config(pair.config, name))


def test_a_family_from_outside(tmp_path: Path) -> None:
    own = clip_family.FAMILY
    assert own.texts is not None
    family = replace(own, load_tower=toy_tower, config=ToyConfig, texts=replace(own.texts, load=toy_pair))
    with pytest.raises(ValueError, match=r"got 'toy:small' \(known families: open_clip, umt, hf, timm, testa\)"):
        create_frontend("toy:small")
    FAMILIES.register("toy", family)
    try:
        front = create_frontend("toy:small", method="none", num_frames=2)
        front.save_pretrained(tmp_path / "front")
        assert VisualFrontend.from_pretrained(tmp_path / "front").config.family == "toy"
        model = create_retrieval_model("toy:small", None, "tempme", 4, **{**MERGING, "merge_layers": (2, 3)})
        model.save_pretrained(tmp_path / "model")
        again = load_retrieval_model(tmp_path / "model")
        assert again.frontend.config.name == "small"
        assert all(torch.equal(value, again.state_dict()[key]) for key, value in model.state_dict().items())
    finally:
        FAMILIES.unregister("toy")
