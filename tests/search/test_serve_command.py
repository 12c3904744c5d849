"""The command over a real index and a tiny model."""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

pytest.importorskip("fastapi")
pytest.importorskip("lancedb")
from fastapi.testclient import TestClient
from search.search_runs import LENGTHS, scene

from tempme_vl import create_qa_model
from tempme_vl.cli import main
from tempme_vl.data.rendered import write_video
from tempme_vl.search import SearchIndex, serve
from tempme_vl.search.serve import TOKEN, ServeOptions, build_app
from tempme_vl.search.web.served import Served


@pytest.fixture(scope="module")
def client(made: Path, model: Path) -> TestClient:
    options = ServeOptions(
        made, checkpoint=str(model), device="cpu", qa_checkpoint=str(model), answers=("left", "right")
    )
    return TestClient(build_app(options), base_url="http://127.0.0.1:8000")


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"port": 70_000}, "--port must be from 0, any that is free, to 65535; got 70000"),
        ({"host": "203.0.113.7", "port": 0}, "--host 203.0.113.7 --port 0 cannot be listened on"),
        ({"max_upload_mb": 0}, "--max-upload-mb must be 1 or more"),
        ({"token": ""}, "--token must not be empty"),
        ({"answers": ("a",)}, "--answers needs --qa-checkpoint"),
        ({"index": Path("nothing")}, "expected the folder of an index"),
    ],
)
def test_options_that_cannot_be_are_refused(made: Path, given: dict[str, object], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        serve.main(replace(ServeOptions(made), **given))


def test_a_port_that_is_taken_is_told_before_models_are_loaded(capsys: pytest.CaptureFixture[str]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        with pytest.raises(SystemExit) as end:
            main(["serve", "nothing", "--port", str(port)])
    assert end.value.code == 2
    assert f"--port {port} cannot be listened on" in capsys.readouterr().err


def test_what_is_not_installed_is_named(
    made: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(serve, "find_spec", lambda name: None if name in ("uvicorn", "multipart") else name)
    with pytest.raises(SystemExit) as end:
        main(["serve", str(made), "--port", "0"])
    assert end.value.code == 2
    assert "needs uvicorn, multipart: pip install 'tempme_vl[search]'" in capsys.readouterr().err


def test_hits_are_those_of_the_index(client: TestClient, index: SearchIndex) -> None:
    for fine in ("none", "maxsim"):
        said = client.get("/api/search", params={"q": "a red ball", "k": 4, "fine": fine}).json()
        expected = index.search("a red ball", 4, fine=fine)
        assert [(hit["path"], hit["segment"], hit["score"]) for hit in said["hits"]] == [
            (hit.path, hit.segment, pytest.approx(hit.score, abs=1e-6)) for hit in expected
        ]
        assert set(said["times"]) == {"waiting", *expected.seconds}
    refused = client.get("/api/search", params={"q": "a", "where": "colour = 'red'"})
    assert refused.status_code == 400 and "may name path, segment" in refused.json()["detail"]


def test_a_video_of_the_folder_finds_itself(client: TestClient, videos: Path) -> None:
    with (videos / "deep/b.mp4").open("rb") as file:
        said = client.post("/api/search", files={"file": ("b.mp4", file)}, data={"k": 1}).json()
    assert said["hits"][0]["path"] == "deep/b.mp4" and said["hits"][0]["score"] > 0.99


def test_regions_are_the_patches_that_the_index_locates(client: TestClient, index: SearchIndex) -> None:
    (hit,) = index.search("a red ball", 1)
    said = client.get("/api/regions", params={"path": hit.path, "segment": hit.segment, "q": "a red ball", "tokens": 2})
    found = index.locate("a red ball", hit, 2)
    frames = said.json()["frames"]
    assert said.json()["scores"] == pytest.approx(found.scores.tolist(), abs=1e-6) and frames
    covered = {round(frame["time"], 3): sum(w * h for _, _, w, h in frame["boxes"]) for frame in frames}
    patch = (64 / found.patches.shape[-1]) ** 2  # videos of 64 x 64 pixels
    expected = dict(zip(found.times.round(3).tolist(), found.patches.any(0).sum((1, 2)) * patch, strict=True))
    assert covered == {round(time, 3): pytest.approx(area) for time, area in expected.items() if area}


def test_status_does_not_tell_where_things_lie(client: TestClient, made: Path, model: Path) -> None:
    said = client.get("/api/status")
    assert said.json()["videos"] == len(LENGTHS) and said.json()["index"]["model"].endswith("/model")
    assert str(model) not in said.text and str(made.parent) not in said.text


def test_only_this_machine_is_answered_by_default(client: TestClient) -> None:
    assert client.get("/api/status", headers={"host": "videos.example:8000"}).status_code == 400


def test_a_retrieval_model_chooses_an_answer(client: TestClient) -> None:
    asked = {"question": "which way does it go", "segments": [{"path": "a.mp4", "start": 0, "end": 1}]}
    (said,) = client.post("/api/ask", json=asked).json()["answers"]
    assert said["answer"] in ("left", "right") and 0.5 <= said["score"] <= 1


def test_a_question_answering_model_answers(made: Path, model: Path, tmp_path: Path) -> None:
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "which", "way"]
    create_qa_model("open_clip:tiny", words, "classifier", ("up", "down"), method="none", num_frames=2).save_pretrained(
        tmp_path / "qa"
    )
    options = ServeOptions(made, checkpoint=str(model), device="cpu", qa_checkpoint=str(tmp_path / "qa"))
    client = TestClient(build_app(options), base_url="http://localhost")
    asked = {"question": "which way", "segments": [{"path": "d'quoted.mp4", "start": 1, "end": 2}]}
    (said,) = client.post("/api/ask", json=asked).json()["answers"]
    assert said["answer"] in ("up", "down")
    gone = {"path": "d'quoted.mp4", "start": 100, "end": 101}
    refused = client.post("/api/ask", json={"question": "which way", "segments": [gone]})
    assert refused.status_code == 400 and "behind its last frame" in refused.json()["detail"]


def test_a_new_file_is_found_after_reindexing(
    copied: Callable[[], tuple[Path, Path]], model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the token of the environment, the model where it lies now, and the server going on."""
    here, folder = copied()
    monkeypatch.setenv(TOKEN, "secret")
    client = TestClient(
        build_app(ServeOptions(folder, checkpoint=str(model), device="cpu")), base_url="http://localhost"
    )
    write_video(here / "new.mp4", scene(77, 2.0))
    asked = {"q": "a red ball", "k": 50}
    before = client.get("/api/search", params=asked).json()["hits"]
    assert client.get("/api/videos/new.mp4").status_code == 404 and "new.mp4" not in [hit["path"] for hit in before]
    assert client.post("/api/reindex", headers={"authorization": "Bearer secret"}).status_code == 202
    for thread in threading.enumerate():
        if thread.name == "tempme_vl-reindex":
            thread.join(60)
    assert client.get("/api/status").json()["reindexing"] == "1 added, 0 changed, 0 gone"
    assert client.get("/api/videos/new.mp4").status_code == 200
    again = client.get("/api/search", params=asked).json()
    assert "new.mp4" in [hit["path"] for hit in again["hits"]] and not again["kept"]


def test_files_are_listed_anew_only_when_rows_change(index: SearchIndex, monkeypatch: pytest.MonkeyPatch) -> None:
    served, read = Served(index), []
    files = index.store.files
    monkeypatch.setattr(index.store, "files", lambda: read.append(1) or files())
    assert list(served.paths) == list(served.paths) == sorted(LENGTHS)
    assert len(read) == 1


def test_pictures_find_what_they_show(client: TestClient, tmp_path: Path, videos: Path) -> None:
    """A frame of a video is nearest to a segment of that video."""
    frames = scene(list(LENGTHS).index("deep/er/c.mp4"), LENGTHS["deep/er/c.mp4"])
    Image.fromarray(np.asarray(frames[4])).save(tmp_path / "frame.png")
    with (tmp_path / "frame.png").open("rb") as file:
        said = client.post("/api/search", files={"file": ("frame.png", file)}, data={"k": 1}).json()
    assert said["hits"][0]["path"] == "deep/er/c.mp4"
