"""Folders: what is saved comes back whole, and what does not fit is named."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from towers import TINY, random_video, small_clip, tempme_schedule, tiny_frontend

from tempme_vl import MergeSchedule, VisualFrontend
from tempme_vl.pretrained import load_answers, load_model, save_answers, save_model
from tempme_vl.tasks.retrieval import RetrievalModel, create_retrieval_model

VIDEO = random_video(6)
WORDS = torch.tensor([[49406, 320, 49407, 0]])


@pytest.mark.parametrize("quick_gelu", [False, True])
@pytest.mark.parametrize("schedule", [MergeSchedule.identity(4, 6, 17), MergeSchedule.tempme(4, 6, 17, 1, (1,), (3,))])
def test_front_end_comes_back(tmp_path: Path, schedule: MergeSchedule, quick_gelu: bool) -> None:
    saved = VisualFrontend.from_openai_state_dict(small_clip(quick_gelu).state_dict(), 2, schedule, quick_gelu)
    saved.init_clip_positions(0.3)
    saved.save_pretrained(tmp_path / "new" / "folder")
    loaded = VisualFrontend.from_pretrained(tmp_path / "new" / "folder")
    assert (loaded.schedule, loaded.shape) == (saved.schedule, saved.shape)
    assert loaded.full_config() == saved.full_config()
    expected, actual = saved(VIDEO, trace_source=True), loaded(VIDEO, trace_source=True)
    for field in ("tokens", "pooled", "size", "frames", "source"):
        assert torch.equal(getattr(actual, field), getattr(expected, field)), field


def test_config_holds_everything(tmp_path: Path) -> None:
    tiny_frontend(tempme_schedule()).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["kind"] == "frontend"
    frontend = config["frontend"]
    assert (frontend["family"], frontend["quick_gelu"]) == ("open_clip", False)
    assert frontend["schedule"]["frames"] == 6 and frontend["schedule"]["method"] == "tempme"
    preprocess = frontend["preprocess"]
    assert preprocess["image_size"] == 32 and len(preprocess["mean"]) == len(preprocess["std"]) == 3
    assert sorted(p.name for p in tmp_path.iterdir()) == ["config.json", "model.safetensors"]


def retrieval() -> RetrievalModel:
    torch.manual_seed(0)
    options = {"r": 2, "merge_layers": (2, 4), "merge_frames": (2, 3), "cross_percent": 40, "intra_percent": 20}
    model = create_retrieval_model(TINY, num_frames=6, clip_position_std=0.2, **options)
    torch.nn.init.constant_(model.logit_scale.log_scale, 1.5)
    return model


def test_retrieval_model_comes_back_and_its_front_end_alone(tmp_path: Path) -> None:
    saved = retrieval()
    saved.save_pretrained(tmp_path)
    loaded, frontend = RetrievalModel.from_pretrained(tmp_path), VisualFrontend.from_pretrained(tmp_path)
    batch = {"video": VIDEO, "frame_mask": torch.ones(2, 6), "text_ids": WORDS, "text_mask": WORDS > 0}
    expected, actual = saved(batch), loaded(batch)
    assert expected.keys() == actual.keys() == {"video", "text", "scale"}
    assert all(torch.equal(actual[key], value) for key, value in expected.items())
    assert torch.equal(frontend(VIDEO).tokens, saved.frontend(VIDEO).tokens)
    assert frontend.full_config() == saved.frontend.full_config()
    loaded.save_pretrained(tmp_path / "again")
    assert (tmp_path / "again" / "config.json").read_text() == (tmp_path / "config.json").read_text()


def test_weights_can_be_given(tmp_path: Path) -> None:
    model = retrieval()
    doubled = {key: 2 * value for key, value in model.state_dict().items()}
    model.save_pretrained(tmp_path, doubled)
    loaded = RetrievalModel.from_pretrained(tmp_path).state_dict()
    assert all(torch.equal(loaded[key], value) for key, value in doubled.items())


def test_views_and_gradients_can_be_saved(tmp_path: Path) -> None:
    weight = torch.randn(3, 4, requires_grad=True)
    save_model(tmp_path, {"kind": "x"}, {"a": weight.t()})
    config, state = load_model(tmp_path)
    assert config == {"kind": "x"} and torch.equal(state["a"], weight.detach().t())


@pytest.mark.parametrize("missing", ["config.json", "model.safetensors"])
def test_missing_file(tmp_path: Path, missing: str) -> None:
    tiny_frontend(tempme_schedule()).save_pretrained(tmp_path)
    (tmp_path / missing).unlink()
    (left,) = tmp_path.iterdir()
    for load in (VisualFrontend.from_pretrained, RetrievalModel.from_pretrained):
        with pytest.raises(ValueError, match=rf"expected {missing} in .*; found \['{left.name}'\]"):
            load(tmp_path)


def test_missing_folder(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"expected config.json and model.safetensors in .*; found no such folder"):
        VisualFrontend.from_pretrained(tmp_path / "nowhere")


def test_kinds_are_told_apart(tmp_path: Path) -> None:
    tiny_frontend(tempme_schedule()).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"expected a retrieval model in .*; got one of kind 'frontend'"):
        RetrievalModel.from_pretrained(tmp_path)


@pytest.mark.parametrize("change", ["missing", "unknown", "shape"])
def test_weights_that_do_not_fit(tmp_path: Path, change: str) -> None:
    retrieval().save_pretrained(tmp_path)
    state = load_file(tmp_path / "model.safetensors")
    key = "frontend.norm.weight"
    value = state.pop(key)
    if change == "unknown":
        state |= {key: value, "frontend.extra": value.clone()}
        key = "frontend.extra"
    elif change == "shape":
        state[key] = torch.ones(7)
    save_file(state, tmp_path / "model.safetensors")
    for load, name in ((RetrievalModel.from_pretrained, key), (VisualFrontend.from_pretrained, key[9:])):
        with pytest.raises(ValueError, match=rf"(?s)the weights of .* do not fit its config.json: .*{name}"):
            load(tmp_path)


@pytest.mark.parametrize(
    "answers",
    [("man", "guitar", "a man"), (), ("10", 'a "b"\\', "naïve", "两", "a\u2028b\n", " c "), ("last", "first")],
)
def test_answers_come_back_in_their_order(tmp_path: Path, answers: tuple[str, ...]) -> None:
    save_answers(tmp_path, answers)
    assert [file.name for file in tmp_path.iterdir()] == ["answers.json"] and load_answers(tmp_path) == answers
    assert json.loads((tmp_path / "answers.json").read_text()) == list(answers), "a list for anybody's reader"
    save_answers(tmp_path, answers[1:])
    assert load_answers(tmp_path) == answers[1:]


def test_folder_without_answers(tmp_path: Path) -> None:
    tiny_frontend(tempme_schedule()).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"expected the answers of the model in .*answers.json; there is no such file"):
        load_answers(tmp_path)
