"""The page over an index without a model: what is rendered, and that nothing of it comes from elsewhere."""

from __future__ import annotations

import io
import re
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

pytest.importorskip("fastapi")
from fastapi.testclient import TestClient
from search.fake_index import FakeIndex, FakeQA, write_videos

from tempme_vl.search.web.app import create_app
from tempme_vl.search.web.overlay import boxes, svg_shade
from tempme_vl.search.web.views import clock


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("videos")
    write_videos(root)
    return root


@pytest.fixture
def client(root: Path) -> Iterator[TestClient]:
    with TestClient(create_app(FakeIndex(root), str, asker=FakeQA())) as client:
        yield client


def picture() -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (40, 30), (20, 200, 30)).save(file, "PNG")
    return file.getvalue()


def cards(page: str) -> list[str]:
    """What each card says to those who do not see it."""
    return re.findall(r'class="card"[^>]*aria-label="([^"]*)"', page)


def test_the_page_without_a_query_shows_what_there_is(client: TestClient) -> None:
    page = client.get("/").text
    assert "3 videos to search in" in page and page.count('class="card"') == 3
    assert 'href="/api/videos/more/green%20leaf.mp4"' in page and "a/model" in page


def test_hits_are_cards_in_order(client: TestClient) -> None:
    found = client.get("/api/search", params={"q": "blue", "k": 5}).json()["hits"]
    said = cards(client.get("/", params={"q": "blue", "k": 5}).text)
    assert len(said) == 5
    for rank, (label, hit) in enumerate(zip(said, found, strict=True), 1):
        name, minute = hit["path"].split("/")[-1], f"0:0{hit['start']:g} \N{EN DASH} 0:0{hit['end']:g}"
        assert label == f"{rank}: {name}, {minute}, score {hit['score']:.3f}"


def test_the_chosen_hit_plays_from_its_second(client: TestClient) -> None:
    third = client.get("/api/search", params={"q": "blue"}).json()["hits"][2]
    first, chosen = (client.get("/", params={"q": "blue"} | hit).text for hit in ({}, {"hit": 3}))
    assert f'src="/api/videos/{third["path"]}#t={third["start"]:g}"' in chosen
    assert re.findall(r"autoplay", first) == [] and len(re.findall(r"autoplay", chosen)) == 1
    for page, number in ((first, 1), (chosen, 3)):
        (current,) = re.findall(r'aria-current="true" aria-label="(\d+):', page)
        assert int(current) == number and f"{number} / 9" in page
    assert 'rel="prev"' not in first and 'href="/?q=blue&amp;hit=4"' in chosen
    assert "9 / 9" in client.get("/", params={"q": "blue", "hit": 50}).text  # the last one


@pytest.mark.parametrize("name", ["q", "where"])
def test_what_a_visitor_writes_stays_text(client: TestClient, name: str) -> None:
    evil = "path\"><script>alert(1)</script>'{{77777*7}}"
    page = client.get("/", params={"q": "red"} | {name: evil}).text
    assert "<script>alert" not in page and "544439" not in page and "&lt;script&gt;alert(1)" in page
    assert evil not in client.get("/ask", params={"path": evil, "start": 0, "end": 1, "question": evil}).text


def test_a_filter_that_cannot_be_used_is_told(client: TestClient) -> None:
    page = client.get("/", params={"q": "red", "where": "nothing"})
    assert page.status_code == 400 and "cannot be used" in page.text and 'value="nothing"' in page.text
    assert "Nothing was found with this filter" in client.get("/", params={"q": "red", "where": "path = 'x'"}).text
    assert "kept for a while only" in client.get("/", params={"upload": "gone"}).text


def test_a_picture_leads_to_its_own_page(client: TestClient) -> None:
    sent = {"file": ("my <leaf>.png", picture())}
    answer = client.post("/search", files=sent, data={"k": "3", "where": "path <> 'y more/green leaf.mp4'"})
    assert answer.history[0].status_code == 303 and answer.url.params["k"] == "3"
    assert [label.split(",")[0] for label in cards(answer.text)] == [f"{n}: green leaf.mp4" for n in (1, 2, 3)]
    upload = answer.url.params["upload"]
    preview = Image.open(io.BytesIO(client.get("/api/thumbnail", params={"upload": upload}).content))
    assert preview.size == (40, 30) and "my &lt;leaf&gt;.png" in answer.text
    strip = client.get("/regions", params={"path": "red.mp4", "segment": 0, "upload": upload})
    assert strip.status_code == 200 and 'data-seek="0.0"' in strip.text


def test_frames_are_shown_with_a_shade_around_the_best_patches(client: TestClient) -> None:
    strip = client.get("/regions", params={"path": "red.mp4", "segment": 1, "q": "red", "tokens": 1}).text
    assert 'viewBox="0 0 96 64"' in strip and 'data-seek="2.0"' in strip
    assert 'd="M0 0h96v64h-96zM16.0 0.0h16.0v16.0h-16.0z"' in strip
    lost = client.get("/regions", params={"path": "none.mp4", "segment": 1, "q": "red"})
    assert lost.status_code == 404 and 'role="alert"' in lost.text


def test_an_answer_about_a_hit(client: TestClient) -> None:
    said = client.get("/ask", params={"path": "red.mp4", "start": 2, "end": 4, "question": "what <moves>"}).text
    assert "what &lt;moves&gt; red.mp4 2 4" in said and "75%" in said


def test_what_an_index_cannot_do_is_not_offered(root: Path) -> None:
    page = TestClient(create_app(FakeIndex(root, has_tokens=False), str)).get("/", params={"q": "red"}).text
    for part in ("Ranking", "Highlight", "Ask about", "/regions", "/ask"):
        assert part not in page
    refused = TestClient(create_app(FakeIndex(root), str)).get(
        "/ask", params={"path": "red.mp4", "start": 0, "end": 1, "question": "what"}
    )
    assert refused.status_code == 404


@pytest.mark.parametrize(
    ("tokens", "fusion", "offered"),
    [(True, False, ["none", "maxsim"]), (True, True, ["none", "maxsim", "matching"]), (False, False, [])],
)
def test_rankings_that_an_index_has_are_offered(root: Path, tokens: bool, fusion: bool, offered: list[str]) -> None:
    client = TestClient(create_app(FakeIndex(root, has_tokens=tokens, has_fusion=fusion), str))
    for chosen in offered or ["none"]:
        page = client.get("/", params={"q": "red", "fine": chosen}).text
        assert re.findall(r'<option value="(\w+)"', page) == offered
        assert re.findall(r'<option value="(\w+)" selected', page) == [chosen][: len(offered)]
        assert ("</i>fine</th>" in page) == (chosen != "none")


def test_a_file_is_not_matched(root: Path) -> None:
    """Matching is of texts alone, and is not offered for a file."""
    client = TestClient(create_app(FakeIndex(root, has_fusion=True), str))
    sent = client.post("/search", files={"file": ("leaf.png", picture())})
    assert sent.status_code == 200 and 'value="maxsim"' in sent.text and 'value="matching"' not in sent.text


def test_nothing_comes_from_elsewhere(client: TestClient) -> None:
    """Neither the pages nor what they load name another server, and no script or style is written inside of them."""
    pages = [client.get(path).text for path in ("/", "/?q=red&hit=2&fine=maxsim", "/docs")]
    loaded = {path for page in pages for path in re.findall(r'(?:src|href)="(/[^"#?]*)', page)}
    static = {path for path in loaded if path.startswith("/static/")}
    assert len(static) >= 4
    for path in static:
        answer = client.get(path)
        assert answer.status_code == 200, path
        pages.append(answer.text)
    for page in pages:
        assert not re.findall(r"(?<!xmlns=\")https?:|(?<!xmlns=\"http:)//[\w-]+\.\w|@import|url\(", page)
        assert not re.findall(r"<style|\sstyle=|\son\w+=\"|<script(?! src=\"/static/)", page)


@pytest.mark.parametrize("resize", ["shortest", "squash"])
@pytest.mark.parametrize("size", [(96, 64), (64, 96), (64, 64)])
def test_boxes_cover_the_marked_patches_alone(resize: str, size: tuple[int, int]) -> None:
    """Painted on a frame they give the picture of the patches, scaled as the tower's input was."""
    width, height = size
    mask = np.random.default_rng(3).random((4, 4)) < 0.5
    painted = np.zeros((height, width), int)
    found = boxes(mask, width, height, resize)
    for left, top, across, down in found:
        painted[int(top) : int(top + down), int(left) : int(left + across)] += 1
    scaled = (height, width) if resize == "squash" else (64, 64)
    seen = np.asarray(Image.fromarray(mask).resize(scaled[::-1], Image.Resampling.NEAREST))
    expected = np.zeros((height, width), bool)
    top, left = (height - scaled[0]) // 2, (width - scaled[1]) // 2
    expected[top : top + scaled[0], left : left + scaled[1]] = seen
    assert (painted == expected).all()
    assert 0 < len(found) < mask.sum()  # neighbours are one box
    assert svg_shade(found, width, height).count("z") == 1 + len(found)


@pytest.mark.parametrize(
    ("seconds", "exact", "text"),
    [
        (0, True, "0:00.0"),
        (59.97, True, "1:00.0"),
        (61.25, False, "1:01"),
        (3599.99, True, "1:00:00.0"),
        (3723, False, "1:02:03"),
    ],
)
def test_times_are_read_as_a_clock(seconds: float, exact: bool, text: str) -> None:
    assert clock(seconds, exact) == text
