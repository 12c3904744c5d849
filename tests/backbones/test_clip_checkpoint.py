"""CLIP's weights in every layout that people have them in: the same model, and what was recognised is said."""

from __future__ import annotations

import json
import logging
import math
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import open_clip
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from towers import random_video, small_clip
from transformers import CLIPConfig, CLIPModel

from tempme_vl import create_frontend
from tempme_vl.backbones.clip_checkpoint import name_clip, read_clip
from tempme_vl.backbones.open_clip import load_clip
from tempme_vl.backbones.open_clip_models import TINY_CONFIGS
from tempme_vl.tasks.retrieval import RetrievalModel, create_retrieval_model

# what `towers.small_clip` builds, by name
SMALL: dict[str, Any] = {
    "embed_dim": 16,
    "vision_cfg": {"image_size": 32, "layers": 4, "width": 32, "head_width": 16, "patch_size": 8},
    "text_cfg": {"context_length": 12, "vocab_size": 100, "width": 32, "heads": 2, "layers": 2},
}
NAME = "open_clip:small"
WORDS = torch.tensor([[98, 5, 7, 99, 0, 0]])
OPTIONS: dict[str, Any] = {"num_frames": 4, "method": "none"}
TEMPME: dict[str, Any] = {
    **{"num_frames": 4, "method": "tempme", "r": 1, "merge_layers": (1, 2), "merge_frames": (2, 2)},
    **{"cross_percent": 30, "intra_percent": 10},
}


@pytest.fixture(autouse=True)
def named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(TINY_CONFIGS, "small", SMALL)


def original(quick_gelu: bool = True) -> open_clip.CLIP:
    """Weights that float16 holds exactly."""
    clip = small_clip(quick_gelu)
    nn.init.constant_(clip.logit_scale, math.log(100))
    for parameter in clip.parameters():
        parameter.data = parameter.data.half().float()
    return clip


def state_of(clip: open_clip.CLIP) -> dict[str, Tensor]:
    return {key: value.clone() for key, value in clip.state_dict().items()}


def openai(state: dict[str, Tensor]) -> dict[str, Tensor]:
    sizes = {"input_resolution": torch.tensor(32), "context_length": torch.tensor(12), "vocab_size": torch.tensor(100)}
    return {**{key: value.half() for key, value in state.items()}, **sizes}


def clip4clip(state: dict[str, Tensor]) -> dict[str, Tensor]:
    heads = {
        "transformerClip.resblocks.0.attn.in_proj_weight": torch.zeros(3, 3),
        "frame_position_embeddings.weight": torch.zeros(12, 16),
        "lstm_visual.weight_ih_l0": torch.zeros(3),
        "cross.pooler.dense.weight": torch.zeros(3),
        "similarity_dense.weight": torch.zeros(3),
    }
    return {**{f"clip.{key}": value.half() if value.ndim > 1 else value for key, value in state.items()}, **heads}


def tempme(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """With LoRA that adds nothing, and clip positions."""
    found = {f"clip.{key}": value for key, value in state.items()}
    for tower, layers in (("clip.visual.transformer", 4), ("clip.transformer", 2)):
        for layer in range(layers):
            attention = f"{tower}.resblocks.{layer}.attn.TVPt_LoRA"
            found |= {f"{attention}_a": torch.randn(8, 32), f"{attention}_b": torch.zeros(96, 8)}
    for layer, clips in ((1, 4), (2, 2)):
        name = f"clip.visual.transformer.resblocks.{layer}.TVPt_Video_Positional_embedding"
        found[name] = torch.randn(1, clips, 1, 32)
    return found


def transformers_names(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """By a way of its own: from the public model, whose parameters are filled in their order of use."""
    model = transformers_model()
    fill(model, state)
    return {key: value.contiguous() for key, value in model.state_dict().items()}


def transformers_model() -> CLIPModel:
    text = {"vocab_size": 100, "max_position_embeddings": 12, "eos_token_id": 99}
    both = {"hidden_size": 32, "intermediate_size": 128, "num_attention_heads": 2, "hidden_act": "quick_gelu"}
    vision = {"image_size": 32, "patch_size": 8, "num_hidden_layers": 4}
    config = CLIPConfig(
        text_config={**text, **both, "num_hidden_layers": 2}, vision_config={**vision, **both}, projection_dim=16
    )
    return CLIPModel(config).eval()


def fill(model: CLIPModel, state: dict[str, Tensor]) -> None:
    def copy(module: nn.Module, name: str) -> None:
        module.load_state_dict({key: state[f"{name}.{key}"] for key in module.state_dict()})

    vision, text = model.vision_model, model.text_model
    with torch.no_grad():
        model.visual_projection.weight.copy_(state["visual.proj"].T)
        model.text_projection.weight.copy_(state["text_projection"].T)
        model.logit_scale.copy_(state["logit_scale"])
        vision.embeddings.class_embedding.copy_(state["visual.class_embedding"])
        vision.embeddings.position_embedding.weight.copy_(state["visual.positional_embedding"])
        text.embeddings.position_embedding.weight.copy_(state["positional_embedding"])
    copy(vision.embeddings.patch_embedding, "visual.conv1")
    copy(vision.pre_layrnorm, "visual.ln_pre")
    copy(vision.post_layernorm, "visual.ln_post")
    copy(text.embeddings.token_embedding, "token_embedding")
    copy(text.final_layer_norm, "ln_final")
    for tower, prefix in ((vision, "visual."), (text, "")):
        for number, layer in enumerate(tower.encoder.layers):
            block = f"{prefix}transformer.resblocks.{number}"
            for ours, theirs in (
                ("layer_norm1", "ln_1"),
                ("layer_norm2", "ln_2"),
                ("self_attn.out_proj", "attn.out_proj"),
            ):
                copy(layer.get_submodule(ours), f"{block}.{theirs}")
            copy(layer.mlp.fc1, f"{block}.mlp.c_fc")
            copy(layer.mlp.fc2, f"{block}.mlp.c_proj")
            for part in ("weight", "bias"):
                thirds = state[f"{block}.attn.in_proj_{part}"].chunk(3)
                for letter, third in zip("qkv", thirds, strict=True):
                    getattr(layer.self_attn, f"{letter}_proj").load_state_dict({part: third}, strict=False)


LAYOUTS: dict[str, tuple[Callable[[dict[str, Tensor]], dict[str, Tensor]], str, str]] = {
    # how it is made, what is said of it, what is unused
    "open_clip": (dict, "CLIP in open_clip's names", "nothing"),
    "openai": (openai, "OpenAI's CLIP", "nothing"),
    "clip4clip": (
        clip4clip,
        "CLIP4Clip's checkpoint",
        r"transformerClip \(1\), frame_position_embeddings \(1\), lstm_visual \(1\), cross \(1\), similarity_dense.*",
    ),
    "tempme": (tempme, "TempMe's checkpoint, LoRA folded in", "nothing"),
    "transformers": (transformers_names, "transformers' CLIP", "nothing"),
}


def said(caplog: pytest.LogCaptureFixture) -> str:
    return "\n".join(record.getMessage() for record in caplog.records if record.name.startswith("tempme_vl"))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_gives_the_same_model(layout: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    make, name, unused = LAYOUTS[layout]
    clip = original()
    torch.save(make(state_of(clip)), tmp_path / "weights.pt")
    if layout in ("open_clip", "transformers"):  # whose files do not tell the activation
        TINY_CONFIGS["small"] = {**SMALL, "quick_gelu": True}
    with caplog.at_level(logging.INFO, "tempme_vl"):
        model = create_retrieval_model(NAME, str(tmp_path / "weights.pt"), **OPTIONS)
    assert isinstance(model, RetrievalModel)
    loaded = model.openai_state_dict()
    assert loaded.keys() == state_of(clip).keys()
    for key, value in state_of(clip).items():
        assert loaded[key].dtype == torch.float32 and torch.equal(loaded[key], value), key
    video = random_video(4)
    expected = clip.visual(video.flatten(0, 1)).unflatten(0, (2, 4))
    torch.testing.assert_close(model.frontend(video).frames, expected, rtol=0, atol=1e-5)
    assert caplog.text.count("unused") == (2 if layout == "tempme" else 1)
    assert f"weights.pt (torch.save): {name}, " in said(caplog)
    assert re.search(rf"56 weights of the visual tower, 30 of the text side.*; unused: {unused}$", said(caplog), 8)


def test_transformers_names_are_those_of_its_model(tmp_path: Path) -> None:
    """The model that the library loads, the activation that its config.json tells, sharded or not."""
    model = transformers_model()
    video = random_video(4)
    expected = model.get_image_features(pixel_values=video.flatten(0, 1))
    expected = getattr(expected, "pooler_output", expected).unflatten(0, (2, 4))
    for folder, size in ((tmp_path / "whole", "1GB"), (tmp_path / "shards", "100KB")):
        model.save_pretrained(folder, max_shard_size=size)
        frontend = create_frontend(NAME, str(folder), **OPTIONS)
        assert frontend.shape.quick_gelu
        torch.testing.assert_close(frontend(video).frames, expected, rtol=0, atol=1e-5)
    assert (tmp_path / "shards" / "model.safetensors.index.json").is_file()
    config = json.loads((tmp_path / "whole" / "config.json").read_text())
    for activation, quick_gelu in (("gelu", False), ("relu", None)):
        config["vision_config"]["hidden_act"] = activation
        (tmp_path / "whole" / "config.json").write_text(json.dumps(config))
        if quick_gelu is None:
            with pytest.raises(ValueError, match=r"quick_gelu or gelu; .*says 'relu'"):
                create_frontend(NAME, str(tmp_path / "whole"), **OPTIONS)
        else:
            assert create_frontend(NAME, str(tmp_path / "whole"), **OPTIONS).shape.quick_gelu == quick_gelu


def test_the_activation_is_that_of_the_weights(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """OpenAI's were trained with QuickGELU, whatever the name says; another one would change the features unseen."""
    torch.save(openai(state_of(original())), tmp_path / "openai.pt")
    torch.save(state_of(original()), tmp_path / "plain.pt")
    with caplog.at_level(logging.INFO, "tempme_vl"):
        loaded = {name: load_clip("small", str(tmp_path / f"{name}.pt")) for name in ("openai", "plain")}
    assert loaded["openai"].config.quick_gelu and not loaded["plain"].config.quick_gelu
    assert "these weights were trained with QuickGELU, which is used; small has another" in said(caplog)
    assert "the file does not tell its activation; GELU is taken, as in small" in said(caplog)
    video = random_video(1).flatten(0, 1)
    assert torch.equal(loaded["openai"].clip.visual(video), original().visual(video))


def test_a_tag_gives_its_activation(monkeypatch: pytest.MonkeyPatch) -> None:
    """open_clip only warns of OpenAI's weights in a tower with GELU."""
    asked = {}

    def create(name: str, pretrained: str, **options: Any) -> open_clip.CLIP:
        asked[name] = options
        return original(options["force_quick_gelu"])

    monkeypatch.setattr(open_clip, "create_model", create)
    monkeypatch.setattr("tempme_vl.backbones.open_clip.require_hub", lambda *_: None)
    assert load_clip("ViT-B-32", "openai").config.quick_gelu
    assert not load_clip("ViT-B-32", "laion2b_s34b_b79k").config.quick_gelu
    assert asked == {"ViT-B-32": {"force_quick_gelu": False}}


def test_clip_positions_are_taken_where_they_fit(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    state = tempme(state_of(original()))
    torch.save(state, tmp_path / "best.pth")
    stem = "clip.visual.transformer.resblocks"
    expected = {layer: state[f"{stem}.{layer}.TVPt_Video_Positional_embedding"].view(-1, 32) for layer in "12"}

    def positions(**options: Any) -> dict[str, Tensor]:
        caplog.clear()
        with caplog.at_level(logging.INFO, "tempme_vl"):
            frontend = create_frontend(NAME, str(tmp_path / "best.pth"), **options)
        return {layer: position.detach() for layer, position in frontend.clip_positions.items()}

    found = positions(**TEMPME)
    assert found.keys() == expected.keys() and all(torch.equal(found[layer], expected[layer]) for layer in found)
    assert "clip positions of the layers 1, 2" in said(caplog) and "stay unused" not in said(caplog)

    # layer 2 joins the clips of another number, and layer 3 has none in the file
    found = positions(**{**TEMPME, "merge_layers": (1, 2, 3), "num_frames": 4, "merge_frames": (1, 2, 2)})
    assert found["3"].abs().max() == 0 and torch.equal(found["1"], expected["1"])
    assert "2 (2, 32) stay unused" in said(caplog) and "has 1 (4, 32), 2 (4, 32), 3 (2, 32)" in said(caplog)
    assert "clip positions of the layers 2, 3 are not among the weights and start anew" in said(caplog)

    assert positions(**OPTIONS) == {}
    assert "1 (4, 32), 2 (2, 32) stay unused; this front end (none, 4 frames) has none" in said(caplog)


def test_the_projects_own_model_goes_on(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """All of it for retrieval, the tower of any kind for a front end; its activation, pixels and clip positions too."""
    torch.save(openai(state_of(original())), tmp_path / "openai.pt")
    first = create_retrieval_model(NAME, str(tmp_path / "openai.pt"), clip_position_std=0.5, **TEMPME)
    tower = first.frontend.config
    first.frontend.config = replace(tower, preprocess=replace(tower.preprocess, mean=(0.5, 0.5, 0.5)))
    nn.init.constant_(first.logit_scale.log_scale, 2.5)
    first.save_pretrained(tmp_path / "best")
    first.frontend.save_pretrained(tmp_path / "tower")
    for path in (tmp_path / "best", tmp_path / "best" / "model.safetensors"):
        caplog.clear()
        with caplog.at_level(logging.INFO, "tempme_vl"):
            second = create_retrieval_model(NAME, str(path), **TEMPME)
        assert second.frontend.full_config() == first.frontend.full_config()
        expected = first.state_dict()
        assert all(torch.equal(value, expected[key]) for key, value in second.state_dict().items())
        assert "this package's retrieval model" in said(caplog) and "unused: nothing" in said(caplog)
    for folder in ("best", "tower"):
        frontend = create_frontend(NAME, str(tmp_path / folder), **TEMPME)
        assert all(torch.equal(value, first.frontend.state_dict()[key]) for key, value in frontend.state_dict().items())
        config = first.frontend.full_config().to_dict()
        assert {key: frontend.full_config().to_dict()[key] for key in config} == config
    with pytest.raises(ValueError, match=r"tower, this package's frontend model, holds no text tower"):
        create_retrieval_model(NAME, str(tmp_path / "tower"), **TEMPME)
    with pytest.raises(ValueError, match=r"holds a tower of the family 'open_clip'; expected one of 'umt'"):
        create_frontend("umt:tiny", str(tmp_path / "best"), method="none")


def broken(change: str) -> dict[str, Tensor]:
    state = state_of(original())
    if change == "other tower":
        return state_of(open_clip.CLIP(64, **{k: v for k, v in TINY_CONFIGS["tiny"].items() if k.endswith("cfg")}))
    key = "visual.transformer.resblocks.1.attn.in_proj_weight"
    if change == "missing":
        del state[key]
    elif change == "tuning method":
        state["visual.transformer.resblocks.1.mlp.adapter.down.weight"] = torch.zeros(4, 32)
    elif change == "quantised":
        state[key] = state[key].to(torch.int8)
    elif change == "not a number":
        state[key][3, 4] = math.nan
    elif change == "foreign":
        return {"encoder.layer.0.attention.query.weight": torch.zeros(3)}
    elif change == "half LoRA":
        return {key: value for key, value in tempme(state).items() if not key.endswith("resblocks.1.attn.TVPt_LoRA_b")}
    elif change == "LoRA of two ranks":
        return {**tempme(state), "clip.transformer.resblocks.1.attn.TVPt_LoRA_b": torch.zeros(96, 7)}
    elif change == "thirds":
        return {**transformers_names(state), "vision_model.encoder.layers.1.self_attn.k_proj.weight": torch.zeros(7)}
    elif change == "endless position":
        name = "clip.visual.transformer.resblocks.1.TVPt_Video_Positional_embedding"
        return {**tempme(state), name: torch.full((1, 4, 1, 32), math.inf)}
    elif change == "position":
        return {**tempme(state), "clip.visual.transformer.resblocks.1.TVPt_Video_Positional_embedding": torch.zeros(3)}
    return state


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("other tower", r"does not fit 'small': .*ln_final.bias \(64,\) instead of \(32,\).*; it looks like tiny"),
        ("missing", r"1 missing: visual.transformer.resblocks.1.attn.in_proj_weight; it looks like small"),
        ("tuning method", r"1 unknown: visual.transformer.resblocks.1.mlp.adapter.down.weight"),
        ("quantised", r"1 of a dtype that needs a scale, .*in_proj_weight torch.int8"),
        ("not a number", r"1 are not finite: .*in_proj_weight"),
        ("foreign", r"holds no CLIP ViT in a layout that is known \(TempMe's .*its 1 names are like encoder.layer.0"),
        (
            "half LoRA",
            r"TempMe's checkpoint, LoRA folded in, is damaged: expected transformer.resblocks.1.*in_proj_weight",
        ),
        ("LoRA of two ranks", r"is damaged: expected transformer.*got \[\(96, 32\), \(8, 32\), \(96, 7\)\]"),
        ("thirds", r"transformers' CLIP, is damaged: "),
        ("position", r"is damaged: expected visual.*of shape \(1, clips, 1, width\); got \(3,\)"),
    ],
)
def test_weights_that_do_not_fit_say_why_in_one_line(change: str, message: str, tmp_path: Path) -> None:
    save_file(broken(change), tmp_path / "weights.safetensors")
    with pytest.raises(ValueError, match=message) as caught:
        create_retrieval_model(NAME, str(tmp_path / "weights.safetensors"), **OPTIONS)
    assert "weights.safetensors" in str(caught.value) and "\n" not in str(caught.value)


def test_endless_clip_positions_are_refused(tmp_path: Path) -> None:
    save_file(broken("endless position"), tmp_path / "weights.safetensors")
    with pytest.raises(ValueError, match=r"clip positions of the layers 1 are not finite"):
        create_frontend(NAME, str(tmp_path / "weights.safetensors"), **TEMPME)


def test_other_heads_are_noticed(tmp_path: Path) -> None:
    """They are in no shape: the features would be others without an error."""
    create_retrieval_model(NAME, **OPTIONS).save_pretrained(tmp_path / "own")
    transformers_model().save_pretrained(tmp_path / "public")
    for tower, cfg, key, value in (("visual", "vision_cfg", "head_width", 8), ("text", "text_cfg", "heads", 4)):
        TINY_CONFIGS["small"] = {**SMALL, cfg: {**SMALL[cfg], key: value}}
        for folder in ("own", "public"):
            with pytest.raises(ValueError, match=rf"its {tower} tower has 2 heads instead of 4"):
                create_retrieval_model(NAME, str(tmp_path / folder), **OPTIONS)


def test_a_file_of_another_size_is_named(tmp_path: Path) -> None:
    with torch.device("meta"):
        clip = open_clip.CLIP(**open_clip.get_model_config("ViT-B-16"))
    visual = {f"visual.{key}": torch.zeros(1).expand(value.shape) for key, value in clip.visual.state_dict().items()}
    torch.save(visual, tmp_path / "b16.pt")
    with pytest.raises(ValueError, match=r"looks like .*ViT-B-16.*ViT-B-16-quickgelu") as caught:
        create_frontend("open_clip:ViT-B-32-quickgelu", str(tmp_path / "b16.pt"), method="none")
    assert "conv1.weight (768, 3, 16, 16) instead of (768, 3, 32, 32)" in str(caught.value)


def test_the_visual_tower_alone_is_enough_for_a_front_end(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    state = state_of(original())
    visual = {key.removeprefix("visual."): value for key, value in state.items() if key.startswith("visual.")}
    for name, weights in (("alone", visual), ("whole", state)):
        save_file(weights, tmp_path / f"{name}.safetensors")
        with caplog.at_level(logging.INFO, "tempme_vl"):
            frontend = create_frontend(NAME, str(tmp_path / f"{name}.safetensors"), **OPTIONS)
        assert all(torch.equal(value, visual[key]) for key, value in frontend.openai_state_dict().items())
    assert "unused: the text side (30)" in said(caplog).split("whole")[1]
    with pytest.raises(ValueError, match=r"alone.safetensors .*holds no text tower, which 'small' has"):
        create_retrieval_model(NAME, str(tmp_path / "alone.safetensors"), **OPTIONS)


def test_neither_a_tag_nor_a_file(tmp_path: Path) -> None:
    with pytest.raises(
        ValueError, match=r"pretrained='nowhere.pt' for 'ViT-B-32': expected one of its tags \(openai, "
    ):
        create_frontend("open_clip:ViT-B-32", "nowhere.pt", method="none")
    with pytest.raises(ValueError, match=r"is a folder without weights"):
        read_clip(tmp_path)


def test_named_weights_stay_as_they_are() -> None:
    state = state_of(original())
    named = name_clip(state)
    again = name_clip({**{f"visual.{key}": value for key, value in named.tower.items()}, **named.text})
    assert (again.tower.keys(), again.text.keys()) == (named.tower.keys(), named.text.keys())
    assert not again.unused and all(again.tower[key] is value for key, value in named.tower.items())
