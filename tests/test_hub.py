"""Folders of the hub: found by name, downloaded as far as they are read, and put there."""

from __future__ import annotations

import json
import logging
import os
import shutil
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import tamper
import torch
from fake_hub import Hub
from towers import random_video, tempme_schedule, tiny_frontend

from tempme_vl import VideoQA, VideoRetrieval, VisualFrontend, load_retrieval_model
from tempme_vl.hub import find_folder, push_folder
from tempme_vl.integrations import load_compressed
from tempme_vl.manifest import CARD_FILE, MANIFEST_FILE, FolderError
from tempme_vl.tasks.qa import load_qa_model
from tempme_vl.tasks.retrieval import RetrievalModel
from tempme_vl.tasks.umt_retrieval import UMTRetrievalModel
from tempme_vl.tasks.videollm import load_video_llm

NAME, COMMIT = "someone/tiny-tempme", "0123456789abcdef0123456789abcdef01234567"
LOADERS = (
    *(VisualFrontend.from_pretrained, RetrievalModel.from_pretrained, UMTRetrievalModel.from_pretrained),
    *(VideoQA.from_pretrained, VideoRetrieval.from_pretrained, load_retrieval_model, load_qa_model),
    *(load_compressed, load_video_llm),
)


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Hub:
    return Hub(tmp_path / "hub", monkeypatch)


def alike(first: torch.nn.Module, second: torch.nn.Module) -> bool:
    left, right = first.state_dict(), second.state_dict()
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


# ---- from the hub


@pytest.mark.parametrize("load", LOADERS, ids=lambda load: load.__qualname__)
def test_every_loader_takes_a_name(load: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []

    def download(repo_id: str, **given: Any) -> str:
        asked.append((repo_id, given))
        raise OSError("stopped here")

    monkeypatch.setattr(huggingface_hub, "try_to_load_from_cache", lambda *_, **__: "there")
    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    options = {"revision": "v2", "token": "secret", "cache_dir": "/cache", "local_files_only": True}
    with pytest.raises(ValueError, match=f"'{NAME}': there is no such folder here, .*: stopped here"):
        load(NAME, **options)
    ((repo_id, given),) = asked
    assert repo_id == NAME and {name: given[name] for name in options} == options
    for name in ("best", "a/b/c", "/no/such/folder", "./runs/best", "-bad-/name", "a b/c"):
        with pytest.raises(ValueError, match=r"folder with .*json.* hub .*'organisation/model'.*no such folder"):
            load(name)
    assert len(asked) == 1, "nothing is asked of the hub for a name that no model can have"


def test_a_path_that_exists_wins(tmp_path: Path, hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    saved = tiny_frontend(tempme_schedule())
    saved.save_pretrained(NAME)
    assert alike(VisualFrontend.from_pretrained(NAME), saved) and not hub.asked
    assert find_folder(Path(NAME)) == Path(NAME)


def test_only_what_is_read_is_downloaded_and_no_pickles(hub: Hub) -> None:
    saved = tiny_frontend(tempme_schedule())
    saved.save_pretrained(hub.branch(NAME))
    for name in ("pytorch_model.bin", "training_args.bin", "optimizer.pt", "clip.mp4", "adapter/adapter_model.bin"):
        (hub.branch(NAME) / name).parent.mkdir(exist_ok=True)
        (hub.branch(NAME) / name).write_bytes(b"x")
    folder = find_folder(NAME)
    assert sorted(path.name for path in folder.rglob("*") if path.is_file()) == [
        *("README.md", "config.json", "manifest.json", "model.safetensors")
    ]
    (hub.branch(NAME) / "pytorch_model.bin").unlink()
    assert alike(VisualFrontend.from_pretrained(NAME), saved)


def cached(cache: Path, revision: str = "main") -> Path:
    """A folder in the layout of the hub client's cache: files are links to blobs."""
    repository = cache / f"models--{NAME.replace('/', '--')}"
    snapshot, blobs = repository / "snapshots" / COMMIT, repository / "blobs"
    for folder in (snapshot, blobs, repository / "refs"):
        folder.mkdir(parents=True)
    (repository / "refs" / revision).write_text(COMMIT)
    made = cache / "made"
    tamper.KINDS["retrieval"].make(made)
    for number, file in enumerate(sorted(made.iterdir())):
        shutil.move(file, blobs / str(number))
        (snapshot / file.name).symlink_to(os.path.relpath(blobs / str(number), snapshot))
    return snapshot


def test_the_clients_own_cache_is_enough(tmp_path: Path) -> None:
    snapshot = cached(tmp_path / "cache", "v2")
    where: dict[str, Any] = {"cache_dir": tmp_path / "cache", "local_files_only": True, "revision": "v2"}
    expected = load_retrieval_model(snapshot)
    assert alike(load_retrieval_model(NAME, **where), expected)
    retrieval = VideoRetrieval.from_pretrained(NAME, **where)
    video = random_video(6)
    assert torch.equal(retrieval.model.encode_video(video), expected.eval().encode_video(video))
    for change in ({"revision": "main"}, {"cache_dir": tmp_path / "empty"}):
        with pytest.raises(ValueError, match=f"got '{NAME}': there is no such folder here, and of the model"):
            VideoRetrieval.from_pretrained(NAME, **{**where, **change})


def test_no_network_is_said_after_one_request(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    class Session:
        def head(self, url: str, timeout: float) -> None:
            asked.append(url)
            raise OSError("Name or service not known")

    monkeypatch.setattr(huggingface_hub, "get_session", Session)
    monkeypatch.setattr(huggingface_hub, "try_to_load_from_cache", lambda *_, **__: None)
    with pytest.raises(ValueError, match="not in the local cache, and the hub cannot be reached"):
        VideoRetrieval.from_pretrained(NAME)
    assert len(asked) == 1


# ---- to the hub


@pytest.mark.parametrize(
    "name",
    [
        *("frontend", "retrieval", "umt-retrieval", "qa-classifier"),
        *(pytest.param(name, marks=pytest.mark.slow) for name in ("qa-lora", "compressed", "video-llm")),
    ],
)
def test_what_is_pushed_is_found(name: str, tmp_path: Path, hub: Hub) -> None:
    kind = tamper.KINDS[name]
    kind.make(tmp_path / name)
    model = kind.load(tmp_path / name)
    address = model.push_to_hub(NAME, private=True, token="secret", commit_message="First", revision="v2")
    assert address == f"https://hub/{NAME}/commit/1"
    assert "*.safetensors" in hub.told[-1][1].pop("delete_patterns") and hub.told[-1][1].pop("folder_path")
    assert hub.told == [
        ("HfApi", {"token": "secret"}),
        ("create_repo", {"repo_id": NAME, "private": True, "exist_ok": True}),
        ("create_branch", {"repo_id": NAME, "branch": "v2", "exist_ok": True}),
        ("upload_folder", {"repo_id": NAME, "commit_message": "First", "revision": "v2"}),
    ]
    card = (hub.branch(NAME, "v2") / CARD_FILE).read_text()
    assert f'("{NAME}")' in card and "path/to" not in card
    if name == "frontend":
        again = VisualFrontend.from_pretrained(NAME, revision="v2")
        assert alike(again, model) and again.full_config() == model.full_config()
        return
    load = {"retrieval": load_retrieval_model, "umt-retrieval": load_retrieval_model, "compressed": load_compressed}
    load |= {"video-llm": load_video_llm}
    again = load.get(name, load_qa_model)(NAME, revision="v2")
    assert tamper.content(kind, again, name) == tamper.content(kind, model, name)


def test_a_folder_is_pushed_as_it_is(tmp_path: Path, hub: Hub) -> None:
    """The files of its manifest alone; a second model takes the place of the first, and nothing else goes."""
    folder = tmp_path / "best"
    tamper.KINDS["umt-retrieval"].make(folder)
    (folder / "notes.txt").write_text("mine")
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    assert push_folder(folder, "tiny") == "https://hub/me/tiny/commit/1"
    there = hub.branch("me/tiny")
    assert {path.name for path in there.iterdir()} == before.keys() - {"notes.txt"}
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    assert 'from_pretrained("me/tiny")' in (there / CARD_FILE).read_text()
    assert hub.told[-1][1]["commit_message"] == "Upload of a tempme_vl model"
    (there / "figure.png").write_bytes(b"x")
    frontend = tiny_frontend(tempme_schedule())
    frontend.push_to_hub("me/tiny")
    assert {path.name for path in there.iterdir()} == {
        *("config.json", "model.safetensors", CARD_FILE, MANIFEST_FILE, "figure.png")
    }
    assert alike(VisualFrontend.from_pretrained("me/tiny"), frontend)


def test_a_card_that_somebody_wrote_on_the_hub_stays(hub: Hub, caplog: pytest.LogCaptureFixture) -> None:
    frontend = tiny_frontend(tempme_schedule())
    frontend.push_to_hub(NAME)
    (hub.branch(NAME) / CARD_FILE).write_text("# Ours\n\nTrained on many videos.\n")
    frontend.push_to_hub(NAME)
    assert (hub.branch(NAME) / CARD_FILE).read_text() == "# Ours\n\nTrained on many videos.\n"
    with caplog.at_level(logging.INFO):
        assert alike(VisualFrontend.from_pretrained(NAME), frontend)
    assert not caplog.records, "its manifest holds this card"


def test_what_cannot_be_pushed_is_said(tmp_path: Path, hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    frontend = tiny_frontend(tempme_schedule())
    frontend.save_pretrained(tmp_path / "front")
    config = tmp_path / "front" / "config.json"
    text = config.read_text()
    config.write_text(json.dumps({**json.loads(text), "kind": "x"}))
    with pytest.raises(FolderError, match=r"config\.json has"):
        push_folder(tmp_path / "front", NAME)
    config.write_text(text)
    (tmp_path / "front" / MANIFEST_FILE).unlink()
    with pytest.raises(ValueError, match=f"expected a folder that save_pretrained wrote, with {MANIFEST_FILE}"):
        push_folder(tmp_path / "front", NAME)

    def refused(*_: Any, **__: Any) -> None:
        raise OSError("401: you are not logged in")

    monkeypatch.setattr(hub, "create_repo", refused)
    with pytest.raises(ValueError, match=f"could not be put on the hub as '{NAME}': 401: you are not logged in"):
        frontend.push_to_hub(NAME)
