"""The dual encoder: features, temperature, LoRA, frozen parts."""

from __future__ import annotations

import math
from copy import deepcopy
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor
from towers import TINY, random_video

from tempme_vl.tasks.losses import LogitScale, contrastive_loss
from tempme_vl.tasks.retrieval import RetrievalModel, create_retrieval_model
from tempme_vl.tuning import CLIP4Clip, Lora

OPTIONS = {"r": 2, "merge_layers": (2, 4), "merge_frames": (2, 3), "cross_percent": 40, "intra_percent": 20}


def tiny(seed: int = 0) -> RetrievalModel:
    torch.manual_seed(seed)
    return create_retrieval_model(TINY, num_frames=6, clip_position_std=0.1, **OPTIONS)


@pytest.fixture(scope="module")
def b32() -> RetrievalModel:
    """Its shapes alone."""
    return create_retrieval_model("open_clip:ViT-B-32-quickgelu").to("meta")


def make_batch() -> dict[str, Tensor]:
    ids = torch.tensor([[49406, 320, 49407, 0], [49406, 525, 786, 49407]])
    return {
        "video": random_video(6),
        "frame_mask": torch.tensor([[1, 1, 1, 1, 0, 0], [1] * 6]),
        "text_ids": ids,
        "text_mask": (ids > 0).long(),
        "video_id": torch.arange(2),
        "text_id": torch.arange(2),
        "valid": torch.ones(2),
    }


def loss_of(model: torch.nn.Module, batch: dict[str, Tensor]) -> Tensor:
    return model.loss(model(batch), batch)


def test_features_are_of_unit_length_in_float32() -> None:
    model, batch = tiny(), make_batch()
    for context in (torch.autocast("cpu", torch.bfloat16), torch.autocast("cpu", enabled=False)):
        with context:
            features = model(batch)
        for side in ("video", "text"):
            assert features[side].dtype == torch.float32 and features[side].shape == (2, 64)
            torch.testing.assert_close(features[side].norm(dim=-1), torch.ones(2))
    assert model.double()({**batch, "video": batch["video"].double()})["video"].dtype == torch.float64


def test_either_side_alone() -> None:
    model, batch = tiny(), make_batch()
    both = model(batch)
    video = model({key: batch[key] for key in ("video", "frame_mask")})
    text = model({key: batch[key] for key in ("text_ids", "text_mask")})
    assert video.keys() == {"video", "scale"} and text.keys() == {"text", "scale"}
    assert torch.equal(video["video"], both["video"]) and torch.equal(text["text"], both["text"])
    assert torch.equal(model.encode_video(batch["video"], batch["frame_mask"]), both["video"])
    assert torch.equal(model.encode_text(batch["text_ids"], batch["text_mask"]), both["text"])


def test_loss_hands_everything_over() -> None:
    model, batch = tiny(), make_batch()
    features = model(batch)
    expected = contrastive_loss(features["video"], features["text"], features["scale"])
    assert torch.equal(model.loss(features, batch), expected)
    assert model.loss(features, {**batch, "video_id": torch.zeros(2).long()}) == 0
    assert model.loss(features, {**batch, "text_id": torch.zeros(2).long()}) == 0
    assert model.loss(features, {**batch, "valid": torch.tensor([1.0, 0.0])}) == 0


@pytest.mark.parametrize(("log_scale", "scale"), [(0.0, 1.0), (math.log(1 / 0.07), 1 / 0.07), (4.0, math.e**4)])
def test_scale_is_learnt(log_scale: float, scale: float) -> None:
    module = LogitScale(log_scale)
    value = module()
    value.backward()
    assert value.ndim == 0 and value.item() == pytest.approx(scale, rel=1e-6)
    assert module.log_scale.grad.item() == pytest.approx(scale, rel=1e-6)


@pytest.mark.parametrize("log_scale", [math.log(100), 4.7, 50.0])
def test_scale_is_100_at_most(log_scale: float) -> None:
    assert LogitScale(log_scale)().item() == pytest.approx(100, rel=1e-5)
    assert LogitScale(log_scale).bfloat16()().dtype == torch.float32


@pytest.mark.parametrize("log_scale", [math.log(100), 4.61])
def test_scale_comes_down_from_its_limit(log_scale: float) -> None:
    module = LogitScale(log_scale)
    optimizer = torch.optim.Adam(module.parameters(), lr=1e-2)
    for _ in range(5):
        optimizer.zero_grad()
        module().backward()
        optimizer.step()
    assert module() < 99


def test_every_parameter_learns_and_checkpointing_is_exact() -> None:
    plain, batch = tiny(), make_batch()
    checkpointed = deepcopy(plain)
    checkpointed.set_grad_checkpointing()
    losses = [loss_of(model, batch) for model in (plain, checkpointed)]
    assert torch.equal(*losses)
    for loss in losses:
        loss.backward()
    for (name, a), b in zip(plain.named_parameters(), checkpointed.parameters(), strict=True):
        assert a.grad.any(), name
        assert torch.equal(a.grad, b.grad), name


def trainable(model: torch.nn.Module) -> int:
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


def test_clip4clip_freezes_the_input_side(b32: RetrievalModel) -> None:
    """The numbers of CLIP4Clip's full fine-tuning of B/32; clip positions come on top."""
    CLIP4Clip().apply(b32)
    new = sum(p.numel() for name, p in b32.named_parameters() if b32.is_new_parameter(name))
    assert new == (12 + 6 + 3) * 768
    assert trainable(b32) - new == 123_540_993
    frozen = {name for name, p in b32.named_parameters() if not p.requires_grad}
    assert frozen == {
        "frontend.embed.conv1.weight",
        "frontend.embed.class_embedding",
        "frontend.embed.positional_embedding",
        "frontend.embed.ln_pre.weight",
        "frontend.embed.ln_pre.bias",
        "text.embed.token_embedding.weight",
        "text.embed.positional_embedding",
    }
    b32.requires_grad_(True)


def lora(**options: object) -> LoraConfig:
    return LoraConfig(r=8, lora_alpha=8, target_modules=["qkv"], **options)


def test_lora_by_peft_trains_the_papers_numbers(b32: RetrievalModel) -> None:
    with torch.device("meta"):
        alone = get_peft_model(deepcopy(b32), lora())
        with_positions = get_peft_model(deepcopy(b32), lora(modules_to_save=["clip_position"]))
        tuned = deepcopy(b32)
        tuned.tune(Lora())
    assert trainable(alone) == 294_912 + 196_608 == 491_520
    assert trainable(with_positions) == trainable(tuned) == 491_520 + 16_128 == 507_648


def test_lora_by_peft_trains_merges_and_comes_back(tmp_path: Path) -> None:
    batch, base = make_batch(), tiny()
    before = base(batch)
    model = get_peft_model(base, lora(modules_to_save=["clip_position"]))
    assert all(torch.equal(model(batch)[side], before[side]) for side in ("video", "text")), "LoRA starts at zero"
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.5)
    frozen = {name: p.clone() for name, p in model.named_parameters() if not p.requires_grad}
    losses = []
    for _ in range(4):
        optimizer.zero_grad()
        losses.append(loss_of(model, batch))
        losses[-1].backward()
        optimizer.step()
    assert losses[-1] < losses[0]
    assert all(torch.equal(p, frozen[name]) for name, p in model.named_parameters() if name in frozen)
    adapted = model(batch)
    assert not torch.allclose(adapted["video"], before["video"], atol=1e-4)

    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(tiny(), tmp_path)(batch)
    merged_model = model.merge_and_unload()
    merged = merged_model(batch)
    for side in ("video", "text"):
        assert torch.equal(again[side], adapted[side])
        torch.testing.assert_close(merged[side], adapted[side], rtol=0, atol=1e-5)
    assert merged_model.state_dict().keys() == tiny().state_dict().keys()
    merged_model.save_pretrained(tmp_path / "merged")
    loaded = RetrievalModel.from_pretrained(tmp_path / "merged")(batch)
    assert all(torch.equal(loaded[side], merged[side]) for side in ("video", "text"))


def test_clip_positions_are_found_under_lora() -> None:
    model = get_peft_model(tiny(), lora(modules_to_save=["clip_position"]))
    positions = model.base_model.model.frontend.clip_positions
    assert {layer: tuple(p.shape) for layer, p in positions.items()} == {"2": (6, 64), "4": (3, 64)}
    assert all(p.requires_grad for p in positions.values())


@pytest.mark.parametrize("name", ["ViT-B-32", "own:tiny"])
def test_unknown_family(name: str) -> None:
    with pytest.raises(ValueError, match=rf"got '{name}' \(known families: open_clip, umt"):
        create_retrieval_model(name)


def test_towers_without_a_text_side() -> None:
    with pytest.raises(
        ValueError, match=r"retrieval needs a text tower, which no model of 'timm' has; .* umt, hf, testa have"
    ):
        create_retrieval_model("timm:vit_tiny_patch16_224")
