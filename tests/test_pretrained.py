"""Folders: what is saved comes back whole, and what does not fit is named."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path

import huggingface_hub
import pytest
import torch
from safetensors.torch import load_file, save_file
from towers import TINY, random_video, small_clip, tempme_schedule, tiny_frontend

from tempme_vl import MergeSchedule, VisualFrontend, create_frontend
from tempme_vl.integrations import load_host
from tempme_vl.manifest import MANIFEST_FILE, write_manifest
from tempme_vl.pretrained import hub_file, load_answers, load_model, require_hub, save_answers, save_model
from tempme_vl.tasks.qa.llm import load_llm, load_tokenizer
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
    assert sorted(p.name for p in tmp_path.iterdir()) == ["config.json", "manifest.json", "model.safetensors"]


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
    (left,) = (path for path in tmp_path.iterdir() if path.name != MANIFEST_FILE)
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
    write_manifest(tmp_path)
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


class NoNetwork:
    """Counts the requests of the hub's client, all of which fail."""

    def __init__(self) -> None:
        self.asked: list[str] = []

    def head(self, url: str, timeout: float) -> None:
        self.asked.append(url)
        raise OSError("Name or service not known")


@pytest.mark.parametrize(
    "load",
    [
        lambda: hub_file("someone/no-such-model", "vocab.txt"),
        lambda: create_frontend("hf:someone/no-such-model", "default"),
        lambda: create_frontend("open_clip:ViT-B-32-quickgelu", "laion400m_e31"),
        lambda: create_frontend("timm:vit_tiny_patch16_224", "default"),
        lambda: load_host("someone/no-such-model"),
        lambda: load_llm("someone/no-such-model"),
        lambda: load_tokenizer("someone/no-such-model"),
    ],
    ids=["file", "transformers", "open_clip", "timm", "host", "llm", "tokenizer"],
)
def test_no_network_is_said_after_one_request(
    load: Callable[[], object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def tried(*_: object, **__: object) -> None:
        raise AssertionError("the client that tries again and again")

    network = NoNetwork()
    monkeypatch.setattr(huggingface_hub, "get_session", lambda: network)
    monkeypatch.setattr(huggingface_hub, "try_to_load_from_cache", lambda *_: None)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", tried)
    with pytest.raises(ValueError, match="not in the local cache, and the hub cannot be reached"):
        load()
    assert len(network.asked) == 1


def test_only_a_failing_network_is_called_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """The errors of the client's library, whatever they derive from; an error of the program stays what it is."""
    library = sys.modules[type(huggingface_hub.get_session()).__module__.partition(".")[0]]

    class Session:
        __module__ = library.__name__

        def __init__(self, error: Exception):
            self.error = error

        def head(self, url: str, timeout: float) -> None:
            raise self.error

    monkeypatch.setattr(huggingface_hub, "try_to_load_from_cache", lambda *_: None)
    names = [name for name in ("ConnectError", "ReadTimeout", "ConnectTimeout") if hasattr(library, name)]
    assert names
    for error in (*(getattr(library, name)("refused") for name in names), ConnectionError("offline mode")):
        monkeypatch.setattr(huggingface_hub, "get_session", lambda error=error: Session(error))
        with pytest.raises(ValueError, match=rf"the hub cannot be reached \({error}\)"):
            require_hub("someone/model")
    monkeypatch.setattr(huggingface_hub, "get_session", lambda: Session(TypeError("a wrong argument")))
    with pytest.raises(TypeError, match="a wrong argument"):
        require_hub("someone/model")


def test_what_is_in_the_cache_needs_no_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "vocab.txt").touch()
    monkeypatch.setattr(huggingface_hub, "try_to_load_from_cache", lambda repo, name: str(tmp_path / name))
    monkeypatch.setattr(huggingface_hub, "get_session", NoNetwork)
    assert hub_file("bert-base-uncased", "vocab.txt") == tmp_path / "vocab.txt"
    require_hub("someone/model")
    with pytest.raises(ValueError, match="Repo id must"):
        monkeypatch.undo()
        require_hub("no/such/folder")


def test_folder_without_answers(tmp_path: Path) -> None:
    tiny_frontend(tempme_schedule()).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"expected the answers of the model in .*answers.json; there is no such file"):
        load_answers(tmp_path)
