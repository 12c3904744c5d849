"""TempMe's own checkpoints: loaded as its users have them, they give the features that its own code gives.

The reference tensors are weights of the authors' model under the names of its best.pth, and the features that it made
of random videos and texts (LunarShen/TempMe e624930, tvr/models/modeling.py): once with merging, clip positions and
LoRA, once with LoRA alone.
"""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from tempme_vl.backbones.open_clip import TINY_CONFIGS
from tempme_vl.merging import make_schedule
from tempme_vl.tasks.retrieval import RetrievalModel, create_retrieval_model
from tempme_vl.tuning import Lora

DATA = Path(__file__).parent / "data" / "tuning"
MERGED = {"r": 1, "merge_layers": (1, 2), "merge_frames": (2, 2), "cross_percent": 30, "intra_percent": 10}
CASES = {"tempme_ckpt": (4, {"method": "tempme", **MERGED}, 25), "lora_only": (3, {"method": "none"}, 4 * 17)}


def weights_of(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {key.removeprefix("w."): value.float() for key, value in tensors.items() if key.startswith("w.")}


def check(model: RetrievalModel, t: dict[str, Tensor], tokens: int) -> None:
    output = model.frontend(t["in.video"].float(), t["in.video_mask"])
    text = model.text(t["in.text_ids"], t["in.text_mask"])
    assert output.tokens.shape[1] == tokens
    torch.testing.assert_close(output.pooled, t["out.video_feat"], rtol=0, atol=2e-5)
    torch.testing.assert_close(text, t["out.text_feat"], rtol=0, atol=2e-5)
    batch = {key.removeprefix("in."): t[key] for key in ("in.text_ids", "in.text_mask")}
    features = model({**batch, "video": t["in.video"].float(), "frame_mask": t["in.video_mask"]})
    logits = features["scale"] * features["text"] @ features["video"].T
    torch.testing.assert_close(logits, t["out.logits_eval"], rtol=0, atol=2e-4)


@pytest.mark.parametrize("name", CASES)
@torch.no_grad()
def test_a_checkpoint_gives_the_features_of_its_authors(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (layers, options, tokens), t = CASES[name], load_file(DATA / f"{name}.safetensors")
    sizes = {
        "embed_dim": 24,
        "vision_cfg": {"image_size": 32, "layers": layers, "width": 32, "head_width": 16, "patch_size": 8},
        "text_cfg": {"context_length": 16, "vocab_size": 40, "width": 32, "heads": 2, "layers": 2},
    }
    monkeypatch.setitem(TINY_CONFIGS, "golden", sizes)
    torch.save(weights_of(t), tmp_path / "best.pth")
    model = create_retrieval_model("open_clip:golden", str(tmp_path / "best.pth"), num_frames=4, **options)
    assert isinstance(model, RetrievalModel)
    check(model, t, tokens)

    # and so it does from a folder of this package, and from the state alone
    model.save_pretrained(tmp_path / "own")
    again = create_retrieval_model("open_clip:golden", str(tmp_path / "own"), num_frames=4, **options)
    assert isinstance(again, RetrievalModel)
    assert all(torch.equal(value, model.state_dict()[key]) for key, value in again.state_dict().items())
    schedule = make_schedule(layers=layers, frames=4, tokens=17, **options)
    check(RetrievalModel.from_openai_state_dict(weights_of(t), 2, schedule, 2), t, tokens)


@torch.no_grad()
def test_lora_and_clip_positions_matter() -> None:
    """Without either the features are others by far more than the tolerance."""
    (layers, options, _), t = CASES["tempme_ckpt"], load_file(DATA / "tempme_ckpt.safetensors")
    schedule = make_schedule(layers=layers, frames=4, tokens=17, **options)
    for part in ("TVPt_LoRA", "TVPt_Video"):
        state = {key: value for key, value in weights_of(t).items() if part not in key}
        model = RetrievalModel.from_openai_state_dict(state, 2, schedule, 2)
        difference = model.frontend(t["in.video"].float(), t["in.video_mask"]).pooled - t["out.video_feat"]
        assert difference.abs().max() > 1e-3, part


@pytest.mark.parametrize("name", CASES)
def test_lora_beside_frozen_weights_trains_as_its_authors_have_it(name: str) -> None:
    """Features, loss and gradients before LoRA is merged; merged, it is what their checkpoint loads as."""
    (layers, options, tokens), t = CASES[name], load_file(DATA / f"{name}.safetensors")
    schedule = make_schedule(layers=layers, frames=4, tokens=17, **options)
    weights = weights_of(t)
    plain = {key: value for key, value in weights.items() if "TVPt_LoRA" not in key}
    model = RetrievalModel.from_openai_state_dict(plain, 2, schedule, 2)
    model.tune(Lora())
    trained = {key: parameter for key, parameter in model.named_parameters() if parameter.requires_grad}
    own = {key: own_name(key) for key in weights if "TVPt" in key}
    if name == "lora_only":  # that code keeps positions of joins that it does not make
        own = {key: value for key, value in own.items() if "clip_position" not in value}
    assert trained.keys() == set(own.values())
    with torch.no_grad():
        for key, target in own.items():
            trained[target].copy_(weights[key].view_as(trained[target]))
        check(model, t, tokens)

    batch = {key.removeprefix("in."): value for key, value in t.items() if key.startswith("in.")}
    batch |= {"video": batch["video"].float(), "frame_mask": batch["video_mask"], "valid": torch.ones(3)}
    batch |= {"video_id": torch.arange(3), "text_id": torch.arange(3)}
    loss = model.loss(model(batch), batch)
    torch.testing.assert_close(loss, t["out.loss"], rtol=0, atol=2e-4)
    loss.backward()
    compared = 0
    for key in (key for key in t if key.startswith("grad.")):
        expected, gradient = t[key], trained[own[key.removeprefix("grad.")]].grad
        assert gradient is not None
        torch.testing.assert_close(
            gradient.view_as(expected), expected, rtol=0, atol=1e-4 * float(expected.abs().max()), msg=key
        )
        compared += 1
    assert compared == len(own)

    folded = RetrievalModel.from_openai_state_dict(weights, 2, schedule, 2).state_dict()
    merged = model.plain_state()
    assert merged.keys() == folded.keys()
    for key, value in folded.items():
        torch.testing.assert_close(merged[key], value, rtol=0, atol=1e-6, msg=key)


def own_name(key: str) -> str:
    """The parameter of a tuned model that holds a weight of theirs."""
    found = re.fullmatch(r"clip\.(visual\.|)transformer\.resblocks\.(\d+)\.(.*)", key)
    assert found is not None, key
    side, block, last = found.groups()
    tower = "frontend" if side else "text"
    if last == "TVPt_Video_Positional_embedding":
        return f"{tower}.blocks.{block}.before_attention.clip_position.weight"
    attention = f"{tower}.blocks.{block}.{'block.' if side else ''}attn.qkv"
    return f"{attention}.lora_{last[-1].upper()}.default.weight"
