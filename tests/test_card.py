"""Cards: what they say is so, their code runs, and what somebody wrote stays."""

from __future__ import annotations

import json
import logging
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tamper
import torch
from data.video_files import write_video
from huggingface_hub import metadata_load
from integrations import tiny
from towers import TINY, tempme_schedule, tiny_frontend

from tempme_vl import MergeSchedule, VisualFrontend, create_retrieval_model
from tempme_vl.card import Result, is_own, write_card
from tempme_vl.integrations import compress
from tempme_vl.manifest import CARD_FILE, MANIFEST_FILE, check_manifest, write_manifest
from tempme_vl.tuning import Lora

TAKES_SECONDS = ("qa-llm", "compressed", "compressed-behind", "video-llm")


def code_of(card: str) -> str:
    (code,) = re.findall(r"```python\n(.*?)```", card, re.DOTALL)
    return code


@pytest.mark.parametrize(
    "name",
    [
        *("frontend", "frontend-umt", "retrieval", "umt-retrieval", "qa-classifier", "qa-decoder"),
        *(pytest.param(name, marks=pytest.mark.slow) for name in TAKES_SECONDS),
    ],
)
def test_the_code_of_a_card_runs(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tamper.KINDS[name].make(tmp_path / name)
    write_video(tmp_path / "clip.mp4")
    monkeypatch.chdir(tmp_path)
    code = code_of((tmp_path / name / CARD_FILE).read_text())
    assert code.count("path/to/this/folder") == 1
    assert len(code.partition("\n\n")[2].splitlines()) <= 4, "loading and using take three lines, or four"
    found: dict[str, Any] = {}
    with torch.no_grad():
        exec(code.replace("path/to/this/folder", name), found)
    if name.startswith("frontend"):
        said = re.search(r"# \((.*)\)", code)
        assert said and said[1] == ", ".join(map(str, found["tokens"].shape))
    elif name.endswith("retrieval"):
        assert found["scores"].shape == (1, 1)
    elif name.startswith("qa"):
        options = json.loads(code.partition("options=")[2].removesuffix(")\n"))
        assert found["answer"] in options
    else:
        assert isinstance(found["answer"][0], str)


def test_a_card_says_what_is_known_and_no_more(tmp_path: Path) -> None:
    model = create_retrieval_model(TINY, None, "tempme", 6, Lora(4), **tamper.OPTIONS)
    model.save_pretrained(tmp_path)
    text, frontend = (tmp_path / CARD_FILE).read_text(), model.frontend
    rows = dict(re.findall(r"^\| (.+) \| (.+) \|$", text, re.MULTILINE))
    assert rows == {
        "method": "tempme",
        "tower": "open_clip:tiny: 6 layers of width 64, patches of 8 px",
        "frames": "6 of 32 x 32 pixels",
        "tokens of a video": f"{frontend.schedule.output_tokens} of {6 * 17}",
        "GFLOPs of a video": f"{frontend.gflops():.4g}; 0.03334 without merging",
        "sampling of frames": "fps1",
        "words of a caption": "at most 32, start and end among them",
        "tuning": "lora (rank 4, dropout 0.0)",
    }
    assert metadata_load(tmp_path / CARD_FILE) == {
        "library_name": "tempme_vl",
        "pipeline_tag": "feature-extraction",
        "tags": ["video", "token-merging", "text-video-retrieval", "tempme"],
    }
    again = tamper.load_retrieval_model(tmp_path)
    assert "tuning" not in again.card().facts, "a loaded model does not know how it was trained"


def test_results_are_in_the_form_of_the_hub(tmp_path: Path) -> None:
    results = (Result("msrvtt", "test_1ka", "t2v R@1", 46.12346), Result("msrvtt", "test_1ka", "t2v R-Sum", 201.5))
    write_card(tmp_path, replace(tiny_frontend(tempme_schedule()).card(), results=results))
    header: Any = metadata_load(tmp_path / CARD_FILE)
    assert (header["datasets"], header["metrics"]) == (["msrvtt"], ["t2v R@1", "t2v R-Sum"])
    (found,) = header["model-index"][0]["results"]
    assert found["dataset"] == {"name": "msrvtt", "type": "msrvtt", "split": "test_1ka"}
    assert [metric["value"] for metric in found["metrics"]] == [46.1235, 201.5]
    assert "| msrvtt | test_1ka | t2v R@1 | 46.12 |" in (tmp_path / CARD_FILE).read_text()


def test_what_somebody_wrote_or_changed_stays(tmp_path: Path) -> None:
    first = tiny_frontend(tempme_schedule())
    other = tiny_frontend(MergeSchedule.identity(6, 6, 17))
    card = tmp_path / CARD_FILE
    first.save_pretrained(tmp_path)
    ours = card.read_text()
    assert is_own(ours) and not is_own(ours.replace("6 layers", "7 layers")) and not is_own("# Mine\n")
    other.save_pretrained(tmp_path)
    assert "| method | none |" in card.read_text() and is_own(card.read_text())
    for text in ("# Mine\n", ours.replace("# A front end", "# My front end"), ours + "\nTrained by me.\n"):
        card.write_text(text)
        other.save_pretrained(tmp_path)
        assert card.read_text() == text
        assert CARD_FILE in json.loads((tmp_path / MANIFEST_FILE).read_text())["files"]


def test_another_card_is_logged_and_no_error(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    frontend = tiny_frontend(tempme_schedule())
    frontend.save_pretrained(tmp_path)
    with caplog.at_level(logging.INFO):
        check_manifest(tmp_path)
        assert not caplog.records
        (tmp_path / CARD_FILE).write_text("# Mine\n")
        VisualFrontend.from_pretrained(tmp_path)
        (tmp_path / CARD_FILE).unlink()
        VisualFrontend.from_pretrained(tmp_path)
    assert [record.getMessage().partition(" is not")[0] for record in caplog.records] == [f"{tmp_path / CARD_FILE}"] * 2
    # a folder that was saved without one may get one
    write_manifest(tmp_path)
    caplog.clear()
    (tmp_path / CARD_FILE).write_text("# Mine\n")
    check_manifest(tmp_path)
    assert not caplog.records


@pytest.mark.slow
def test_the_card_of_peft_gives_way_and_one_of_a_user_does_not(tmp_path: Path) -> None:
    from peft import LoraConfig, get_peft_model

    model, processor = tiny.build("VideoLlava")
    tuned = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"]))
    compressed = compress(tuned, processor, "none", tiny.FRAMES)
    compressed.save_pretrained(tmp_path)
    assert "pipeline_tag: video-text-to-text" in (tmp_path / CARD_FILE).read_text()
    compressed.save_pretrained(tmp_path)
    assert is_own((tmp_path / CARD_FILE).read_text())
    (tmp_path / CARD_FILE).write_text("# Mine\n")
    compressed.save_pretrained(tmp_path)
    assert "# Mine" in (tmp_path / CARD_FILE).read_text()
