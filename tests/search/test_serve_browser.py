"""The page in a real browser that has no internet: keys, playing, regions, questions, files, and a phone's width."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from PIL import Image

pytest.importorskip("fastapi")
pytest.importorskip("uvicorn")
import uvicorn
from search.chromium import CHROMIUM, Chromium
from search.fake_index import FakeIndex, FakeQA, write_videos

from tempme_vl.search.web.app import create_app

pytestmark = [pytest.mark.slow, pytest.mark.skipif(CHROMIUM is None, reason="no Chromium is installed")]


@pytest.fixture(scope="module")
def address(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    root = tmp_path_factory.mktemp("videos")
    write_videos(root)
    app = create_app(FakeIndex(root, has_fusion=True), str, asker=FakeQA(), max_upload=1 << 20)
    server = uvicorn.Server(uvicorn.Config(app, port=0, log_level="error"))
    thread = threading.Thread(target=server.run)
    thread.start()
    while not server.started:
        time.sleep(0.02)
    yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    server.should_exit = True
    thread.join(20)


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Chromium]:
    browser = Chromium(tmp_path_factory.mktemp("profile"))
    yield browser
    browser.close()


@pytest.fixture(autouse=True)
def nothing_goes_wrong(browser: Chromium, address: str) -> Iterator[None]:
    """No error in the console, and no other server is asked."""
    browser.events.clear()
    yield
    browser.run("1")
    asked = [e["params"]["request"]["url"] for e in browser.events if e["method"] == "Network.requestWillBeSent"]
    assert asked and all(url.startswith((address, "about:", "data:")) for url in asked), asked
    wrong = [e for e in browser.events if e["method"] in ("Runtime.exceptionThrown", "Log.entryAdded")]
    assert not wrong, wrong


def test_by_keys_alone_a_hit_is_found_and_played(browser: Chromium, address: str) -> None:
    browser.open(address)
    browser.wait("document.activeElement.name === 'q'")
    browser.call("Input.insertText", text="blue")
    browser.press("Enter", "\r")
    browser.wait("document.querySelectorAll('.results .card').length === 9")
    assert browser.run("location.search") == "?q=blue"
    assert browser.run("document.querySelector('video').paused")  # nobody has chosen a hit
    browser.press("ArrowRight")
    browser.press("ArrowRight")
    label = browser.run("document.activeElement.getAttribute('aria-label')")
    browser.press("Enter", "\r")
    browser.wait("document.querySelector('[aria-current]')?.getAttribute('aria-label').startsWith('3:')")
    assert label == browser.run("document.querySelector('[aria-current]').getAttribute('aria-label')")
    start = float(browser.run("document.querySelector('video').dataset.start"))
    playing = "(v => !v.paused && v.currentTime > Number(v.dataset.start) + 0.2 && v.currentTime)"
    now = browser.wait(f"{playing}(document.querySelector('video'))")
    assert start + 0.2 < now < start + 3
    browser.press("/", "/")
    assert browser.run("document.activeElement.name") == "q"


def test_regions_follow_the_video(browser: Chromium, address: str) -> None:
    browser.open(f"{address}/?q=red&where=path+%3D+%27red.mp4%27")
    start = browser.wait("document.querySelector('.frames') && document.querySelector('video').dataset.start")
    shade = "document.querySelector('.overlay path').getAttribute('d')"
    assert browser.wait(shade) == "M0 0h96v64h-96zM16.0 0.0h16.0v16.0h-16.0zM64.0 48.0h16.0v16.0h-16.0z"
    tokens = "document.querySelector('#tokens input[type=range]')"
    browser.run(f"{tokens}.value = 1; {tokens}.dispatchEvent(new Event('change', {{bubbles: true}}))")
    browser.wait(f"{shade} === 'M0 0h96v64h-96zM16.0 0.0h16.0v16.0h-16.0z'")
    browser.run("document.querySelector('#highlight').click()")
    assert not browser.run(shade)
    browser.run("document.querySelector('#highlight').click()")
    assert browser.run(shade)
    outside = (float(start) + 4) % 6
    browser.run(f"document.querySelector('video').currentTime = {outside}")
    browser.wait(f"!{shade}")
    browser.run("document.querySelector('.frames [data-seek]').click()")
    browser.wait(shade)
    assert browser.run("document.querySelector('video').currentTime") == float(start)


def test_a_ranking_takes_effect_when_it_is_chosen(browser: Chromium, address: str) -> None:
    browser.open(f"{address}/?q=red")
    browser.wait("document.querySelector('select[name=fine]') !== null")
    for value, expected in (("matching", "?q=red&fine=matching"), ("none", "?q=red")):
        select = "document.querySelector('select[name=fine]')"
        browser.run(f"{select}.value = '{value}'; {select}.dispatchEvent(new Event('change', {{bubbles: true}}))")
        browser.wait(f"location.search === '{expected}' && {select}?.value === '{value}'")


def test_a_question_is_answered_while_the_video_stays(browser: Chromium, address: str) -> None:
    browser.open(f"{address}/?q=red&hit=1")
    browser.wait("document.querySelector('.ask input[name=question]') !== null")
    browser.run("window.same = true; document.querySelector('.ask input[name=question]').focus()")
    browser.call("Input.insertText", text="what <b>moves</b>")
    browser.press("Enter", "\r")
    said = browser.wait("document.querySelector('#answer b')?.textContent")
    assert said.startswith("what <b>moves</b> red.mp4") and browser.run("window.same")


def test_a_picture_is_sent_when_it_is_chosen(browser: Chromium, address: str, tmp_path: Path) -> None:
    Image.new("RGB", (60, 40), (20, 200, 30)).save(tmp_path / "leaf.png")
    browser.open(f"{address}/?q=red&k=3&fine=matching")  # which is of texts alone
    browser.wait("document.querySelector('[type=file]') !== null")
    root = browser.call("DOM.getDocument")["root"]["nodeId"]
    field = browser.call("DOM.querySelector", nodeId=root, selector="[type=file]")["nodeId"]
    browser.call("DOM.setFileInputFiles", nodeId=field, files=[str(tmp_path / "leaf.png")])
    browser.wait("document.querySelector('.chip img')?.naturalWidth === 60")
    assert "k=3" in browser.run("location.search") and "fine" not in browser.run("location.search")
    assert browser.run("document.querySelector('.results .name').textContent") == "green leaf.mp4"


@pytest.mark.parametrize("width", [390, 800, 1280])
def test_a_page_is_as_wide_as_its_window(browser: Chromium, address: str, width: int) -> None:
    """And on a phone the list comes before a segment is chosen, and the player first from then on."""
    for path in ("/", "/?q=red", "/?q=red&hit=2&fine=maxsim", "/docs"):
        browser.open(address + path, width, 844)
        browser.wait(f"location.href === {address + path!r}")
        assert browser.run("document.documentElement.scrollWidth") <= width, path
    for path, order in (("/?q=red", "list"), ("/?q=red&hit=2", "player")):
        browser.open(address + path, width, 844)
        browser.wait(f"location.href === {address + path!r}")
        top = "(name => document.querySelector(name).getBoundingClientRect())"
        player, cards = (browser.run(f"{top}('{name}').toJSON()") for name in (".player", ".results"))
        if width == 1280:
            assert player["left"] > cards["right"]
        else:
            assert player["height"] == 0 if order == "list" else player["bottom"] <= cards["top"]
