"""The REST interface over an index without a model: what it answers, and what it refuses."""

from __future__ import annotations

import asyncio
import io
import threading
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import numpy as np
import pytest
from PIL import Image

pytest.importorskip("fastapi")
from fastapi.testclient import TestClient
from search.fake_index import COLORS, FakeIndex, FakeQA, write_videos

from tempme_vl.search.web import engine
from tempme_vl.search.web.app import create_app

MOST = 200_000  # bytes of an upload
TRAVERSALS = (
    "../secret.mp4",
    "%2e%2e/secret.mp4",
    "more/%2e%2e/%2e%2e/secret.mp4",
    "..%2fsecret.mp4",
    "%252e%252e/secret.mp4",
    "..%5csecret.mp4",
    "/secret.mp4",
    "%2fetc%2fpasswd",
    "//etc/passwd",
    "red.mp4%00",
    "red.mp4%00.txt",
    "RED.MP4",
    "./red.mp4",
    "more/../red.mp4%2f..%2fred.mp4",
    "link.mp4",
    "folder/secret.mp4",
    "listed_link.mp4",
    "listed_folder/secret.mp4",
    "more",
    "unlisted.mp4",
)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Videos, with a secret beside their folder that links and names lead to."""
    outside = tmp_path_factory.mktemp("outside")
    root = outside / "videos"
    root.mkdir()
    write_videos(root)
    (outside / "secret.mp4").write_bytes(b"hidden words")
    (root / "unlisted.mp4").write_bytes(b"hidden words")
    (root / "broken.mp4").write_bytes(b"no video")
    for name in ("link.mp4", "listed_link.mp4"):
        (root / name).symlink_to(outside / "secret.mp4")
    for name in ("folder", "listed_folder"):
        (root / name).symlink_to(outside)
    return root


@pytest.fixture
def index(root: Path) -> FakeIndex:
    return FakeIndex(root, ("listed_link.mp4", "listed_folder/secret.mp4", "gone.mp4", "broken.mp4"))


@pytest.fixture
def client(index: FakeIndex) -> Iterator[TestClient]:
    app = create_app(index, lambda: "nothing new", asker=FakeQA(), token="right", max_upload=MOST)
    with TestClient(app) as client:
        yield client


def picture(color: tuple[int, int, int]) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (40, 30), color).save(file, "PNG")
    return file.getvalue()


def request(
    app: Any, method: str, path: str, headers: list[tuple[bytes, bytes]], pieces: Iterable[bytes] = (b"",)
) -> tuple[int, bytes]:
    """Status and content of an address as it stands, which clients would put in order first.

    Args:
        pieces: of the body, taken as the application asks for them.
    """
    sent: list[dict[str, Any]] = []
    coming = iter(pieces)

    async def receive() -> dict[str, Any]:
        piece = next(coming, None)
        if piece is None:
            return {"type": "http.disconnect"}
        return {"type": "http.request", "body": piece, "more_body": method == "POST"}

    async def send(message: dict[str, Any]) -> None:
        sent.append(message)

    scope = {"type": "http", "method": method, "path": unquote(path), "raw_path": path.encode(), "query_string": b""}
    scope |= {"http_version": "1.1", "scheme": "http", "headers": [(b"host", b"testserver"), *headers]}
    asyncio.run(app(scope, receive, send))
    return sent[0]["status"], b"".join(message.get("body", b"") for message in sent)


def test_a_text_finds_segments(client: TestClient) -> None:
    said = client.get("/api/search", params={"q": "red", "k": 4}).json()
    paths = [hit["path"] for hit in said["hits"]]
    assert len(paths) == 4 and paths[:3] == ["red.mp4"] * 3 and paths[3] != "red.mp4"
    first = said["hits"][0]
    assert (first["segment"], first["end"]) == (first["start"] // 2, first["start"] + 2)
    assert said["times"]["embed"] == pytest.approx(20) and said["times"]["coarse"] == pytest.approx(3)
    assert said["times"]["waiting"] >= 0 and "fine" not in said["times"] and not said["kept"]


def test_stages_and_filters_are_those_of_the_index(client: TestClient) -> None:
    fine = client.get("/api/search", params={"q": "red", "fine": "maxsim"}).json()
    assert fine["times"]["fine"] == pytest.approx(10)
    only = client.get("/api/search", params={"q": "red", "where": "path = 'more/blue.mp4'"}).json()
    assert {hit["path"] for hit in only["hits"]} == {"more/blue.mp4"}
    wrong = client.get("/api/search", params={"q": "red", "where": "1; drop"})
    assert wrong.status_code == 400 and "'1; drop' cannot be used" in wrong.json()["detail"]


@pytest.mark.parametrize(
    ("given", "status"),
    [
        *(({}, 400), ({"q": " "}, 400), ({"upload": "nothing"}, 404)),
        *(({"q": "a", "k": 0}, 422), ({"q": "a", "k": 101}, 422), ({"q": "a" * 501}, 422)),
        ({"q": "a", "fine": "finest"}, 422),
    ],
)
def test_what_is_no_search_is_refused(client: TestClient, given: dict[str, Any], status: int) -> None:
    assert client.get("/api/search", params=given).status_code == status


def test_a_search_is_kept_until_rows_change(client: TestClient, index: FakeIndex) -> None:
    first, again = (client.get("/api/search", params={"q": "red"}).json() for _ in range(2))
    assert (first["kept"], again["kept"]) == (False, True) and first["hits"] == again["hits"]
    assert not client.get("/api/search", params={"q": "red", "k": 3}).json()["kept"]
    index.version = 2
    assert not client.get("/api/search", params={"q": "red"}).json()["kept"]


def test_pictures_and_videos_are_searched_by(client: TestClient, index: FakeIndex, root: Path) -> None:
    said = client.post("/api/search", files={"file": ("a.png", picture(COLORS["more/blue.mp4"]))}, data={"k": 3}).json()
    assert [hit["path"] for hit in said["hits"]] == ["more/blue.mp4"] * 3
    # the same file again, by its name
    again = client.get("/api/search", params={"upload": said["upload"], "k": 3}).json()
    assert again["hits"] == said["hits"]
    video = (root / "red.mp4").read_bytes()
    client.post("/api/search", files={"file": ("../../mine.MP4", video)})
    sent = index.searched[-1]
    assert isinstance(sent, Path) and sent.read_bytes() == video and sent.suffix == ".mp4" and "mine" not in str(sent)


def test_other_files_are_refused(client: TestClient, index: FakeIndex) -> None:
    for name, content in (("a.txt", b"a text"), ("a.png", b"no picture"), ("a.svg", b"<svg/>")):
        refused = client.post("/api/search", files={"file": (name, content)})
        assert refused.status_code == 400 and "expected a picture" in refused.json()["detail"], name
    cut = client.post("/api/search", files={"file": ("a.png", picture((1, 2, 3))[:60])})
    assert cut.status_code == 400
    large = io.BytesIO()
    Image.new("1", (8000, 8000)).save(large, "PNG")
    bomb = client.post("/api/search", files={"file": ("a.png", large.getvalue())})
    assert bomb.status_code == 400 and "at most 50000000 pixels" in bomb.json()["detail"]
    assert not index.searched


def test_a_file_that_is_too_large_is_refused(client: TestClient) -> None:
    for path in ("/api/search", "/search"):
        refused = client.post(path, files={"file": ("a.mp4", bytes(MOST + 8000))})
        assert refused.status_code == 413 and f"at most {MOST + 4096} bytes" in refused.json()["detail"]
    assert client.post("/api/search", files={"file": ("a.mp4", bytes(MOST))}).status_code == 200
    assert client.post("/api/ask", json={"question": "a" * 70_000, "segments": []}).status_code == 413


@pytest.mark.parametrize("told", [None, "999999999999", "-5", "many"])
def test_no_more_is_read_than_may_come(index: FakeIndex, told: str | None) -> None:
    """Of a body without a length, or with a wrong one, of forty pieces."""
    app = create_app(index, str, max_upload=MOST)
    piece, taken = 50_000, 0
    start = b'--x\r\ncontent-disposition: form-data; name="file"; filename="a.mp4"\r\n\r\n'

    def pieces() -> Iterator[bytes]:
        nonlocal taken
        for one in [start, *[bytes(piece)] * 40]:
            taken += 1
            yield one

    headers = [(b"content-type", b"multipart/form-data; boundary=x")]
    headers += [] if told is None else [(b"content-length", told.encode())]
    status, _ = request(app, "POST", "/api/search", headers, pieces())
    assert status == 413
    assert taken == 0 if told is not None else 4 <= taken <= MOST // piece + 3


@pytest.mark.parametrize(
    ("asked", "first", "last"), [("bytes=0-99", 0, 99), ("bytes=100-", 100, None), ("bytes=-50", -50, None)]
)
def test_parts_of_a_video(client: TestClient, root: Path, asked: str, first: int, last: int | None) -> None:
    whole = (root / "more/green leaf.mp4").read_bytes()
    part = client.get("/api/videos/more/green%20leaf.mp4", headers={"range": asked})
    expected = whole[first:] if last is None else whole[first : last + 1]
    assert part.status_code == 206 and part.content == expected
    start = first % len(whole)
    assert part.headers["content-range"] == f"bytes {start}-{start + len(expected) - 1}/{len(whole)}"


def test_a_whole_video(client: TestClient, root: Path) -> None:
    whole = client.get("/api/videos/red.mp4")
    assert whole.status_code == 200 and whole.content == (root / "red.mp4").read_bytes()
    assert whole.headers["content-type"] == "video/mp4" and whole.headers["accept-ranges"] == "bytes"
    behind = client.get("/api/videos/red.mp4", headers={"range": "bytes=999999999-"})
    assert behind.status_code == 416


@pytest.mark.parametrize("path", TRAVERSALS)
def test_only_videos_of_the_index_are_given_out(client: TestClient, root: Path, path: str) -> None:
    status, content = request(client.app, "GET", f"/api/videos/{path}", [])
    assert status == 404 and b"hidden words" not in content
    for route, more in (("thumbnail", {}), ("regions", {"segment": 0, "q": "a"})):
        assert client.get(f"/api/{route}", params={"path": unquote(path), **more}).status_code == 404
    asked = {"question": "what", "segments": [{"path": unquote(path), "start": 0, "end": 1}]}
    assert client.post("/api/ask", json=asked).status_code == 404


def test_files_that_are_gone_or_broken(client: TestClient, root: Path) -> None:
    assert client.get("/api/videos/gone.mp4").status_code == 404
    broken = client.get("/api/thumbnail", params={"path": "broken.mp4"})
    assert broken.status_code == 400 and "cannot be read" in broken.json()["detail"]
    assert str(root) not in broken.text


def test_a_thumbnail_is_the_frame_of_that_time(client: TestClient) -> None:
    for path, color in COLORS.items():
        for time, expected in ((0, color), (3.9, color), (4, (255, 255, 255)), (100, (255, 255, 255))):
            answer = client.get("/api/thumbnail", params={"path": path, "time": time, "width": 48})
            image = Image.open(io.BytesIO(answer.content))
            assert image.size == (48, 32)
            assert np.abs(np.asarray(image).reshape(-1, 3).mean(0) - expected).max() < 12
    for wrong in ({"time": "nan"}, {"time": -1}, {"width": 100_000}):
        assert client.get("/api/thumbnail", params={"path": "red.mp4", **wrong}).status_code == 422


def test_regions_are_boxes_in_pixels_of_the_video(client: TestClient) -> None:
    asked = {"path": "red.mp4", "segment": 1, "q": "red", "tokens": 1}
    said = client.get("/api/regions", params=asked).json()
    # the square in the middle of 96 x 64 pixels begins at 16; one of its 4 x 4 patches has 16
    assert (said["width"], said["height"]) == (96, 64)
    assert said["frames"] == [{"time": 2.0, "score": pytest.approx(0.9), "boxes": [[16, 0, 16, 16]]}]
    more = client.get("/api/regions", params=asked | {"tokens": 3}).json()
    assert more["frames"][0]["boxes"] == [[16, 0, 16, 16], [64, 48, 16, 16]]
    assert more["scores"] == pytest.approx([0.9, 0.7, 0.5])


def test_questions_are_about_segments(client: TestClient) -> None:
    segments = [{"path": "red.mp4", "start": 1, "end": 2}, {"path": "more/blue.mp4", "start": 0, "end": 6}]
    said = client.post("/api/ask", json={"question": "what", "segments": segments}).json()
    assert [one["answer"] for one in said["answers"]] == ["what red.mp4 1 2", "what blue.mp4 0 6"]
    assert said["answers"][0]["score"] == 0.75 and said["times"]["answering"] >= 0


def test_without_a_model_no_question_is_answered(index: FakeIndex) -> None:
    client = TestClient(create_app(index, str))
    asked = {"question": "what", "segments": [{"path": "red.mp4", "start": 0, "end": 1}]}
    refused = client.post("/api/ask", json=asked)
    assert refused.status_code == 404 and "--qa" in refused.json()["detail"]
    assert client.get("/api/status").json()["questions"] is False


@pytest.mark.parametrize(
    ("given", "status"),
    [
        *((None, 401), (b"Bearer wrong", 401), (b"Bearer ", 401), (b"Basic right", 401), (b"right", 401)),
        *((b"Bearer right2", 401), (b"Bearer r\xc3\xacght", 401), (b"Bearer right", 202), (b"bearer right", 202)),
    ],
)
def test_reindexing_needs_the_token(client: TestClient, given: bytes | None, status: int) -> None:
    headers = {} if given is None else {"authorization": given}
    assert client.post("/api/reindex", headers=headers).status_code == status
    assert client.get("/api/reindex", headers=headers).status_code == 405


def test_reindexing_runs_once_at_a_time(index: FakeIndex) -> None:
    end, calls = threading.Event(), []

    def build() -> str:
        calls.append(1)
        end.wait(10)
        if len(calls) == 2:
            raise OSError("/a/secret/place is full")
        return "2 added"

    client, bearer = TestClient(create_app(index, build, token="right")), {"authorization": "Bearer right"}

    def ended() -> str:
        end.set()
        for thread in threading.enumerate():
            if thread.name == "tempme_vl-reindex":
                thread.join(10)
        end.clear()
        return client.get("/api/status").json()["reindexing"]

    assert client.post("/api/reindex", headers=bearer).json()["reindexing"] == "running"
    assert client.post("/api/reindex", headers=bearer).status_code == 409
    assert client.get("/api/search", params={"q": "red"}).status_code == 200  # meanwhile
    assert ended() == "2 added"
    assert client.post("/api/reindex", headers=bearer).status_code == 202
    assert ended().startswith("failed") and "secret" not in client.get("/api/status").text
    assert len(calls) == 2


def test_without_a_token_nobody_may_reindex(index: FakeIndex) -> None:
    client = TestClient(create_app(index, str))
    for headers in ({}, {"authorization": "Bearer "}, {"authorization": "Bearer None"}):
        assert client.post("/api/reindex", headers=headers).status_code == 403


def test_fifty_requests_at_once_get_what_each_alone_gets(client: TestClient, index: FakeIndex) -> None:
    queries = [f"{color} {number % 5}" for number in range(17) for color in ("red", "green", "blue")][:50]
    with ThreadPoolExecutor(50) as pool:
        together = list(pool.map(lambda q: client.get("/api/search", params={"q": q}), queries))
    assert {answer.status_code for answer in together} == {200}
    assert index.most == 1  # the model runs one request after the other
    for query, answer in zip(queries, together, strict=True):
        alone = FakeIndex(index.root).search(query, 10, None, "none")
        assert [(hit["path"], hit["score"]) for hit in answer.json()["hits"]] == [
            (one.path, one.score) for one in alone
        ]


def test_a_line_that_is_too_long_is_refused(client: TestClient, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine, "WAITING", 0)
    refused = client.get("/api/search", params={"q": "red"})
    assert refused.status_code == 503 and "try again later" in refused.json()["detail"]


def test_status(client: TestClient) -> None:
    said = client.get("/api/status").json()
    assert said["videos"] == 7 and said["index"] == {"segments": 9, "model": "a/model"}
    assert said["tokens"] and said["questions"] and said["max_upload_bytes"] == MOST


def test_other_names_of_this_machine_are_refused(index: FakeIndex) -> None:
    app = create_app(index, str, hosts=("localhost", "127.0.0.1"))
    for name, status in (("localhost", 200), ("127.0.0.1:8000", 200), ("evil.example", 400), ("localhost.evil", 400)):
        assert TestClient(app).get("/api/status", headers={"host": name}).status_code == status


@pytest.mark.parametrize("path", ["/", "/api/status", "/nothing", "/api/videos/red.mp4", "/static/page.js"])
def test_every_answer_says_that_nothing_from_elsewhere_runs(client: TestClient, path: str) -> None:
    headers = client.get(path).headers
    policy = headers["content-security-policy"]
    assert "unsafe" not in policy and ("default-src 'none'" in policy or policy == "sandbox")
    assert headers["x-content-type-options"] == "nosniff"


def test_the_interface_is_described(client: TestClient) -> None:
    described = client.get("/openapi.json").json()
    routes = {f"{method} {path}" for path, methods in described["paths"].items() for method in methods}
    assert routes == {
        *("get /api/search", "post /api/search", "get /api/regions", "post /api/ask", "get /api/videos/{path}"),
        *("get /api/thumbnail", "get /api/status", "post /api/reindex"),
    }
    for route in routes:
        method, path = route.split()
        assert described["paths"][path][method]["description"], route
        assert path in client.get("/docs").text
